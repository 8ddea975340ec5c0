"""Two real processes with four devices each against one process with eight."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

from mtpd_jax import train
from tests.builders import assert_trees_close, replace, tiny_config
from tests.training.test_run import comparable, lines, restored

ROOT = pathlib.Path(__file__).parents[2]

PROCESS = """
    import json, sys
    import jax
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    from mtpd_jax import train
    from mtpd_jax.config import Config
    assert jax.device_count() == 8 and jax.local_device_count() == 4
    result = train.run(Config.build(json.load(open(sys.argv[3]))), sys.argv[4])
    assert result.finished or result.signal
"""


def start_two(config, workdir, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }  # fmt: skip
    command = [sys.executable, "-c", textwrap.dedent(PROCESS), address]
    return [
        subprocess.Popen([*command, str(number), str(folder / "config.json"), str(workdir)], env=environment,
                         cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]  # fmt: skip


def run_two(config, workdir, folder):
    processes = start_two(config, workdir, folder)
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)


@pytest.mark.slow
def test_two_processes_equal_one_and_go_on_where_one_stopped(text_file, tmp_path):
    """The same loss step by step, and a checkpoint of one process restored on two."""
    config = tiny_config(
        data__source="text", data__paths=(text_file,), training__steps=8, logging__every_steps=1,
        evaluation__every_steps=4, checkpoint__every_steps=4, mesh__data=4, mesh__fsdp=2,
    )  # fmt: skip
    train.run(config, str(tmp_path / "one"))
    run_two(config, tmp_path / "two", tmp_path)
    for name in ("one", "two"):
        assert [line["step"] for line in lines(tmp_path / name)] == list(range(1, 9))
    for left, right in zip(comparable(tmp_path / "two"), comparable(tmp_path / "one"), strict=True):
        assert left.keys() == right.keys()
        np.testing.assert_allclose([left[k] or 0 for k in left], [right[k] or 0 for k in right], rtol=2e-3, atol=1e-4)
    assert restored(tmp_path / "two", config)[1]["data"] == restored(tmp_path / "one", config)[1]["data"]
    longer = replace(config, training__steps=10)
    run_two(longer, tmp_path / "one", tmp_path)
    train.run(longer, str(tmp_path / "two"))
    states = [restored(tmp_path / name, longer)[0] for name in ("one", "two")]
    assert_trees_close(*(jax.tree.map(np.asarray, state.optimizer[1][0].mu) for state in states), 1e-2)


@pytest.mark.slow
def test_sigterm_to_one_process_saves_in_all(text_file, tmp_path):
    """In the middle of an evaluation that would take minutes: both stop at the same place, and the step is saved."""
    config = tiny_config(
        data__source="text", data__paths=(text_file,), training__steps=100_000, logging__every_steps=1,
        evaluation__every_steps=2, evaluation__documents=12, checkpoint__every_steps=100_000,
    )  # fmt: skip
    processes = start_two(config, tmp_path / "run", tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while all(process.poll() is None for process in processes) and not (
        metrics.exists() and metrics.read_text().count("\n") >= 3
    ):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert "asked to stop; saved step" in errors[0], errors
    steps = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(steps) == 1 and steps[0] >= 2
