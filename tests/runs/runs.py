"""What tests of whole runs share: what a run left behind, and how it is stopped or started."""

import json
import os
import pathlib
import signal
import sys

import jax
import numpy as np

from mtpd_jax import train
from mtpd_jax.runs.checkpoint import restore_state
from mtpd_jax.runs.interruption import StopRequest
from mtpd_jax.runs.workdir import open_workdir
from mtpd_jax.sharding import make_mesh
from mtpd_jax.training.optimizer import make_optimizer
from mtpd_jax.training.state import abstract_state
from tests.builders import method_on, replace

ROOT = pathlib.Path(__file__).parents[2]


def restored(workdir, config, step=None, mesh=None):
    """A checkpoint's state as NumPy arrays, and what was stored beside it."""
    mesh = mesh or make_mesh(config.mesh)
    abstract = abstract_state(method_on(config, mesh), make_optimizer(config))
    folder = open_workdir(str(workdir))
    found = restore_state(folder, folder.read_config(), abstract, step)
    return jax.device_get(found.tree), found.record


def assert_bitwise(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def lines(workdir):
    return [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def comparable(workdir):
    timing = ("tokens_per_second", "mfu")
    return [{name: value for name, value in line.items() if name not in timing} for line in lines(workdir)]


def stop_after(monkeypatch, step):
    real, done = train.make_step, []

    def counted(*arguments):
        run = real(*arguments)
        return lambda state, batch: (done.append(int(state.step) + 1), run(state, batch))[1]

    monkeypatch.setattr(train, "make_step", counted)
    monkeypatch.setattr(StopRequest, "asked", lambda self: done[-1:] == [step])
    monkeypatch.setattr(StopRequest, "signal", property(lambda self: signal.SIGTERM))


def command(config, workdir, **more):
    """The command line that trains this config."""
    overrides = []
    for section, fields in replace(config, **more).to_dict().items():
        for name, value in fields.items():
            if value is not None:
                text = repr(tuple(value)) if isinstance(value, list | tuple) else value
                overrides.append(f"--config.{section}.{name}={text}")
    return [sys.executable, "-m", "mtpd_jax.train", "--config=configs/base.py", f"--workdir={workdir}", *overrides]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}
