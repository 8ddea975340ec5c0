"""Real processes that train together, against one process with as many devices."""

import json
import os
import pathlib
import re
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
from tests.runs.runs import comparable, lines, restored

ROOT = pathlib.Path(__file__).parents[2]

PROCESS = """
    import json, sys
    import jax
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[1], num_processes=int(sys.argv[2]), process_id=int(sys.argv[3]))
    from mtpd_jax import train
    from mtpd_jax.config import Config
    from mtpd_jax.data.tokenizer import Tokenizer
    if jax.process_index():  # all others read what the first one wrote
        Tokenizer.train = lambda *_: sys.exit("a process made a tokenizer of its own")
    result = train.run(Config.build(json.load(open(sys.argv[4]))), sys.argv[5])
    assert result.finished or result.signal
"""


def start(number, devices, config, workdir, folder, cached=True):
    """Starts ``number`` processes with so many devices each; ``cached`` programs are not compiled again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    command = [sys.executable, "-c", textwrap.dedent(PROCESS), address, str(number)]
    left_out = () if cached else ("JAX_COMPILATION_CACHE_DIR",)
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    return [
        subprocess.Popen([*command, str(process), str(folder / "config.json"), str(workdir)], cwd=ROOT,
                         env={**environment, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}, stderr=subprocess.PIPE,
                         text=True)
        for process in range(number)
    ]  # fmt: skip


def run_together(number, devices, config, workdir, folder, cached=True):
    processes = start(number, devices, config, workdir, folder, cached)
    deadline = time.monotonic() + 300
    # One that fails leaves the others waiting for it.
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.poll() for process in processes):
            break
        time.sleep(0.1)
    for process in processes:
        process.kill()
    errors = [process.communicate()[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)


def assert_same_metrics(left, right):
    for one, other in zip(comparable(left), comparable(right), strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose([one[k] or 0 for k in one], [other[k] or 0 for k in one], rtol=2e-3, atol=1e-4)


@pytest.mark.slow
def test_four_two_and_one_process_go_on_from_each_other(text_file, tmp_path):
    """A run begun by four processes, gone on with by two and finished by one is the run of one: loss by loss, the same
    data in the same order, and the tokenizer that the first process made."""
    config = tiny_config(
        data__source="text", data__paths=(text_file,), training__steps=6, logging__every_steps=1, heads__num_heads=1,
        evaluation__every_steps=6, optimizer__warmup_steps=1, optimizer__final_fraction=1.0, model__layers=1,
    )  # fmt: skip
    train.run(config, str(tmp_path / "one"))
    for processes, steps in ((4, 2), (2, 4)):
        part = replace(config, training__steps=steps, evaluation__every_steps=1000)
        run_together(processes, 1, part, tmp_path / "several", tmp_path)
        assert lines(tmp_path / "several")[-1]["step"] == steps
    train.run(config, str(tmp_path / "several"))
    for line in (several := lines(tmp_path / "several")):
        if line["step"] < 6:  # the last step of each part is evaluated
            for name in [name for name in line if name.startswith("eval/")]:
                del line[name]
    (tmp_path / "several" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in several))
    assert_same_metrics(tmp_path / "several", tmp_path / "one")
    records = [restored(tmp_path / name, config)[1] for name in ("several", "one")]
    assert records[0]["data"] == records[1]["data"] and records[0]["tokens"] == records[1]["tokens"]
    tokenizers = [(tmp_path / name / "tokenizer.json").read_text() for name in ("several", "one")]
    assert tokenizers[0] == tokenizers[1]


@pytest.mark.slow
def test_two_processes_equal_one_and_go_on_where_one_stopped(text_file, tmp_path):
    """The same loss step by step, and a checkpoint of one process restored on two."""
    config = tiny_config(
        data__source="text", data__paths=(text_file,), training__steps=8, logging__every_steps=1,
        evaluation__every_steps=4, checkpoint__every_steps=4, mesh__data=4, mesh__fsdp=2,
    )  # fmt: skip
    train.run(config, str(tmp_path / "one"))
    run_together(2, 4, config, tmp_path / "two", tmp_path)
    for name in ("one", "two"):
        assert [line["step"] for line in lines(tmp_path / name)] == list(range(1, 9))
    assert_same_metrics(tmp_path / "two", tmp_path / "one")
    assert restored(tmp_path / "two", config)[1]["data"] == restored(tmp_path / "one", config)[1]["data"]
    longer = replace(config, training__steps=10)
    run_together(2, 4, longer, tmp_path / "one", tmp_path)
    train.run(longer, str(tmp_path / "two"))
    states = [restored(tmp_path / name, longer)[0] for name in ("one", "two")]
    assert_trees_close(*(jax.tree.map(np.asarray, state.optimizer[1][0].mu) for state in states), 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 2, 2)])
def test_heads_on_a_frozen_backbone_are_trained_by_two_processes_as_by_one(axes, workdir, text_file, tmp_path):
    """With the proof before the first step, and held-out prompts that are decoded where parameters are split."""
    data, fsdp, tensor = axes
    config = tiny_config(
        objective__mode="posthoc", objective__source=str(workdir), data__source="text", data__paths=(text_file,),
        training__steps=4, logging__every_steps=1, evaluation__every_steps=2, evaluation__prompts=6,
        heads__kind="recurrent", heads__cache="shared", mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor,
    )  # fmt: skip
    train.run(config, str(tmp_path / "one"))
    run_together(2, 4, config, tmp_path / "two", tmp_path, cached=False)
    assert_same_metrics(tmp_path / "two", tmp_path / "one")
    assert "selection/tokens_per_pass" in lines(tmp_path / "two")[-1]


@pytest.mark.slow
def test_sigterm_to_one_process_saves_in_all(text_file, tmp_path):
    """In the middle of an evaluation that would take minutes: both stop at the same place, and the step is saved."""
    config = tiny_config(
        data__source="text", data__paths=(text_file,), training__steps=100_000, logging__every_steps=1,
        evaluation__every_steps=2, evaluation__documents=12, checkpoint__every_steps=100_000,
    )  # fmt: skip
    processes = start(2, 4, config, tmp_path / "run", tmp_path)
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


@pytest.mark.slow
def test_what_one_process_cannot_read_none_uses(text_file, tmp_path):
    """A file of the newest checkpoint that only the second process reads: both go back to the one before."""
    config = tiny_config(
        data__source="text", data__paths=(text_file,), training__steps=8, logging__every_steps=1, mesh__data=1,
        evaluation__every_steps=100, checkpoint__every_steps=4, mesh__fsdp=2,
    )  # fmt: skip
    # Not from the cache: XLA's collectives between processes on CPUs hang in programs of this mesh that come out of it.
    run_together(2, 1, config, tmp_path / "run", tmp_path, cached=False)
    expected = restored(tmp_path / "run", config)[1]["digests"]
    files = (tmp_path / "run" / "checkpoints" / "8" / "parameters" / "ocdbt.process_1" / "d").iterdir()
    largest = max(files, key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    run_together(2, 1, config, tmp_path / "run", tmp_path, cached=False)
    assert (tmp_path / "run" / "set_aside" / "8").is_dir()
    assert restored(tmp_path / "run", config)[1]["digests"] == expected
