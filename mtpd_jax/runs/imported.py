"""Other people's models as runs: what was read of a folder becomes a workdir, of step 0."""

import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp

from mtpd_jax.interop.reading import BESIDE_TOKENIZER, TOKENIZER, Found, read_parameters
from mtpd_jax.runs.checkpoint import Checkpointer
from mtpd_jax.runs.lock import Lock
from mtpd_jax.runs.progress import Progress
from mtpd_jax.runs.whole import whole_folder
from mtpd_jax.runs.workdir import Workdir
from mtpd_jax.training.state import TrainState


def import_model(found: Found, target: pathlib.Path) -> None:
    """Writes a workdir, whole or not at all.

    Args:
      found: the model's folder.
      target: the workdir, which ``whole.check_free`` has found to be free.

    Raises:
      ValueError: a tensor is not what it has to be; or another process writes this workdir.
      OSError: something cannot be read or written.
    """
    with whole_folder(target) as (workdir, lock):
        # The tokenizer as it is, and what says how it is used.
        for name in (TOKENIZER, *BESIDE_TOKENIZER):
            if (found.path / name).exists():
                shutil.copyfile(found.path / name, workdir.path / name)
        workdir.write_config(found.config)
        workdir.read_tokenizer(found.config)
        with Progress(f"reading {found.path}", len(found.places)) as progress:
            tree = read_parameters(found, progress.advance)
        _save(found, workdir, lock, tree)


def _save(found: Found, workdir: Workdir, lock: Lock, tree: Any) -> None:
    """Saves parameters as step 0 of a run."""
    device = jax.local_devices(backend="cpu")[0]  # where they are, whatever else there is
    parameters = jax.tree.map(lambda array: jax.device_put(array, device, may_alias=True), tree)
    state = TrainState(jnp.zeros((), jnp.int32), parameters, optimizer=None, average=None, frozen=None)
    record = {"data": {"source": found.identity()}, "tokenizer": workdir.tokenizer_digest(), "origin": None}
    with Checkpointer(workdir, keep=1, lock=lock) as checkpointer:
        checkpointer.save(0, state, found.config, {**record, "tokens": 0, "seconds": 0.0})
