"""Checkpoints with orbax: written in the background, complete or absent, restored onto whatever mesh there is."""

import importlib.metadata
from typing import Any

import jax
import orbax.checkpoint as ocp

from mtpd_jax.config import Config
from mtpd_jax.training.partition import merge
from mtpd_jax.training.state import TrainState
from mtpd_jax.training.workdir import Workdir

# What stands beside every state.
_RECORDED = {"config", "versions", "data", "origin", "tokens", "seconds"}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what a step computes."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


class Checkpointer:
    """Saves and restores a run: the state, and beside it the data iterator, counters, config and package versions.

    Orbax writes into a temporary folder that it renames when all is there, so a process killed at any moment leaves
    the checkpoint before. A context manager: leaving it waits for a save that is still being written.
    """

    def __init__(self, workdir: Workdir, keep: int | None = None):
        """Opens a run's checkpoints; ``keep`` of them are retained, newest first (None: opened for reading)."""
        self._path = workdir.checkpoints
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=keep is not None,
            read_only=keep is None,
            cleanup_tmp_directories=keep is not None,  # what a killed process left of a save
            enable_async_checkpointing=keep is not None,
        )
        self._manager = ocp.CheckpointManager(self._path, options=options)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, config: Config, progress: dict[str, Any]) -> None:
        """Starts saving; returns when the state has been copied off the devices.

        Args:
          step: optimizer steps done.
          state: may be donated as soon as this returns.
          config: written beside the state.
          progress: JSON: the data iterator's state and the counters of the loop.
        """
        record = {"config": config.to_dict(), "versions": package_versions(), **progress}
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), progress=ocp.args.JsonSave(record))
        self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Waits until what was saved is complete on disk."""
        self._manager.wait_until_finished()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores the newest checkpoint into an explicit tree of shapes and shardings.

        Raises:
          ValueError: it cannot be read, or its shapes are others.
        """
        state = ocp.args.PyTreeRestore(abstract, ocp.checkpoint_utils.construct_restore_args(abstract))
        # The record first: a checkpoint of other code is better named than by the shapes that do not fit.
        record = self.record()
        return self._restore(ocp.args.Composite(state=state))["state"], record

    def record(self) -> dict[str, Any]:
        """What was stored beside the newest state: ``progress`` of ``save``, config and package versions.

        Raises:
          ValueError: there is no checkpoint, it cannot be read, or another version of this code wrote it.
        """
        record = self._restore(ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
        if not record.keys() >= _RECORDED:
            raise ValueError(
                f"{self._path}: written by another version of this code (without {min(_RECORDED - record.keys())}); "
                "train the run again"
            )
        return record

    def restore_parameters(self, abstract: TrainState) -> Any:
        """Restores only the parameters that are evaluated: the average if there is one, and those that are frozen.

        Raises:
          ValueError: there is no checkpoint, it cannot be read, or its shapes are others.
        """
        name = "parameters" if abstract.average is None else "average"
        wanted = {name: getattr(abstract, name), "frozen": abstract.frozen}
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        state = ocp.args.PyTreeRestore(wanted, restore_args, partial_restore=True)
        restored = self._restore(ocp.args.Composite(state=state))["state"]
        return merge(restored[name], restored["frozen"])

    def _restore(self, items: ocp.args.Composite) -> Any:
        step = self.latest_step()
        if step is None:
            raise ValueError(f"{self._path}: holds no complete checkpoint")
        try:
            return self._manager.restore(step, args=items)
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged or foreign checkpoint
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(
                f"{self._path / str(step)}: not a readable checkpoint of this run ({reason[:200]}); "
                "delete that folder to go on from the one before"
            ) from error


def latest_step(workdir: Workdir) -> int | None:
    """The newest complete checkpoint's step, or None; creates nothing."""
    if not workdir.checkpoints.exists():
        return None
    with Checkpointer(workdir) as checkpointer:
        return checkpointer.latest_step()


def stored_record(workdir: Workdir) -> dict[str, Any]:
    """The newest checkpoint's record.

    Raises:
      ValueError: see ``Checkpointer.record``.
    """
    with Checkpointer(workdir) as checkpointer:
        return checkpointer.record()


def restored_parameters(workdir: Workdir, abstract: TrainState) -> tuple[Any, dict[str, Any]]:
    """The newest checkpoint's evaluated parameters, and its record.

    Raises:
      ValueError: see ``Checkpointer.restore_parameters``.
    """
    if not workdir.checkpoints.exists():
        raise ValueError(f"{workdir.checkpoints}: holds no complete checkpoint")
    with Checkpointer(workdir) as checkpointer:
        return jax.block_until_ready(checkpointer.restore_parameters(abstract)), checkpointer.record()
