"""Checkpoints with orbax: written in the background, complete or absent, restored onto whatever mesh there is.

Each field of a state is an item of its own, so that who reads a model reads its parameters and nothing else. What is
read is held to digests of what was written. One that differs is passed over for the one before.
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN, PreservationPolicy

from mtpd_jax.config import Config, differences
from mtpd_jax.data.files import json_digest
from mtpd_jax.methods.method import METHODS, Method
from mtpd_jax.runs.choice import NEWEST, Choice, candidates, latest_step, ratings_of
from mtpd_jax.runs.digests import digests_of
from mtpd_jax.runs.lock import Lock
from mtpd_jax.runs.processes import together
from mtpd_jax.runs.storage import is_passing, reason
from mtpd_jax.runs.workdir import Workdir
from mtpd_jax.training.state import DivergedError, TrainState, abstract_parameters

# What stands beside every state.
_RECORDED = {"config", "versions", "digests", "tokenizer", "data", "origin", "tokens", "seconds"}
# What a record means that was written before there were digests, and so neither seal nor these.
_BEFORE_DIGESTS: dict[str, Any] = {"digests": None, "tokenizer": None, "origin": None}
# The item that held all of them before fields of a state were items.
_WHOLE_STATE = "state"
# Bytes of an array that are compressed at once, and of a file. By measurement: with the library's own sizes, what waits
# to be written comes to as much as the arrays themselves, and takes half as long again.
_CHUNK_BYTES, _FILE_BYTES = 16 << 20, 32 << 20
_Read = TypeVar("_Read")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


class DamagedError(ValueError):
    """A checkpoint is not what was written."""


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what a step computes."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


class _NewestAndBest(PreservationPolicy):
    """Keeps so many of the newest checkpoints, and the best, a step and its rating."""

    def __init__(self, newest: int, best: tuple[int, float] | None):
        self._newest, self._best = LatestN(newest), best

    def rate(self, step: int, rating: float) -> None:
        if self._best is None or rating >= self._best[1]:
            self._best = step, rating

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        newest, best = self._newest.should_preserve(checkpoints, context=context), self._best and self._best[0]
        return [keep or one.step == best for keep, one in zip(newest, checkpoints, strict=True)]


class Checkpointer:
    """Saves a run: the state, and beside it its digests, the data iterator, counters, config and package versions.

    Orbax writes into a temporary folder that it renames when all is there, so a process killed at any moment leaves
    the checkpoint before. A context manager: leaving it waits for a save that is still being written.
    """

    def __init__(self, workdir: Workdir, keep: int, lock: Lock):
        """Opens a run's checkpoints for writing; ``keep`` of them are retained, newest first, and the best."""
        self._workdir, self._lock = workdir, lock
        self._newest, ratings = latest_step(workdir), ratings_of(workdir)
        self._kept = _NewestAndBest(keep, max(ratings.items(), key=lambda item: item[::-1], default=None))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._kept,
            cleanup_tmp_directories=True,  # what a killed process left of a save
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(workdir.checkpoints, options=options)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self._manager.close()
        except Exception as error:
            if kind is None:  # else what went wrong before is what is reported
                raise self._failure(error) from error

    @property
    def newest(self) -> int | None:
        """The step that was saved last, complete or not yet; None without any."""
        return self._newest

    def save(self, step: int, state: TrainState, config: Config, progress: dict[str, Any]) -> None:
        """Starts saving; returns when the state has been copied off the devices.

        Args:
          step: optimizer steps done.
          state: may be donated as soon as this returns.
          config: written beside the state.
          progress: JSON: digest of the tokenizer, the data iterator's state, and the counters of training.

        Raises:
          DivergedError: the state holds a number that is not finite; nothing is saved.
          ValueError: another process has taken the run over.
          OSError: this one, or the one before, cannot be written.
        """
        self._lock.check()
        # Digests are of what lies in memory, so that no storage can change it unseen.
        fields = _fields_of(state, config)
        digests, broken = digests_of(fields)
        if broken is not None:
            raise DivergedError(f"step {step}: {broken} is not finite any more; {self.kept()}")
        # What it is held to when it is read, sealed.
        record = {"config": config.to_dict(), "versions": package_versions(), "digests": digests, **progress}
        sealed = {"sha256": json_digest(record), **record}
        arrays = {name: _saved(tree) for name, tree in fields.items()}
        items = ocp.args.Composite(**arrays, progress=ocp.args.JsonSave(sealed))
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._failure(error) from error
        self._newest = step

    def rate(self, step: int, rating: float) -> None:
        """Says how good a checkpoint is; the best is retained."""
        self._kept.rate(step, rating)

    def wait(self) -> None:
        """Waits until what was saved is complete on disk.

        Raises:
          OSError: it cannot be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(error) from error

    def kept(self) -> str:
        """What of the run is safe, for messages."""
        good = latest_step(self._workdir)
        return "there is no checkpoint yet" if good is None else f"the last good checkpoint is step {good}"

    def _failure(self, error: Exception) -> OSError:
        return OSError(f"{self._workdir.checkpoints}: a checkpoint cannot be written ({reason(error)}); {self.kept()}")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
      tree: what was asked for: a ``TrainState``, parameters, or fields of a state by name.
      record: what was stored beside it: ``progress`` of ``save``, config, package versions and digests.
      step: optimizer steps done.
      damaged: newer ones that could not be used, and why.
    """

    tree: Any
    record: dict[str, Any]
    step: int
    damaged: tuple[tuple[int, str], ...]

    def note(self, workdir: Workdir) -> str:
        """What has to be said of it; nothing where there is nothing to say."""
        if not self.damaged:
            return ""
        steps = ", ".join(f"{step} ({why})" for step, why in self.damaged)
        return f"{workdir.checkpoints}: damaged: {steps}; step {self.step} is used instead"


def restore_state(workdir: Workdir, config: Config, abstract: TrainState, choice: Choice = NEWEST) -> Restored:
    """Restores the state of a run into an explicit tree of shapes and shardings.

    Args:
      workdir, config: of the run.
      abstract: what the checkpoint was, wherever it is to lie now.
      choice: of a checkpoint; see ``choice``.

    Returns:
      With the state, without what is frozen where that is not stored with it.

    Raises:
      ValueError: there is none, none that can be read, or config.json is not that of the run any more.
    """
    restored = _read_fields(workdir, config, _fields_of(abstract, config), choice)
    done = jax.device_put(np.int32(restored.step), abstract.step.sharding)
    state = TrainState(**{"average": None, "frozen": None, "step": done, **restored.tree})
    return dataclasses.replace(restored, tree=state)


def restore_parameters(workdir: Workdir, method: Method, choice: Choice = NEWEST) -> Restored:
    """Restores only the parameters that are evaluated: the average if there is one, and those that are frozen.

    Args:
      workdir, method: of the run.
      choice: of a checkpoint; see ``restore_state``, also for errors.

    Returns:
      With both, those that are frozen being None where there are none or they are not stored with it. They lie on the
      method's mesh by the rules. Whoever wants a whole model asks ``runs.models``.
    """
    # Shapes and shardings from the model alone: what an optimizer keeps is never asked for.
    trained, frozen = abstract_parameters(method)
    name = "parameters" if method.config.optimizer.ema_decay is None else "average"
    wanted = {name: trained} if frozen is None or not method.stores_frozen() else {name: trained, "frozen": frozen}
    restored = _read_fields(workdir, method.config, wanted, choice)
    return dataclasses.replace(restored, tree=(restored.tree[name], restored.tree.get("frozen")))


def _fields_of(state: TrainState, config: Config) -> dict[str, Any]:
    """What is stored of a state, or of shapes of one, by name; its step is that of the checkpoint."""
    left_out = {"step", *([] if METHODS[config.objective.mode].stores_frozen() else ["frozen"])}
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: tree for name, tree in fields.items() if name not in left_out and tree is not None}


def read_record(workdir: Workdir) -> dict[str, Any]:
    """The record of the newest checkpoint that has one; see ``Restored``.

    Raises:
      ValueError: there is none.
    """
    return chosen_record(workdir, NEWEST)[0]


def chosen_record(workdir: Workdir, choice: Choice) -> tuple[dict[str, Any], int]:
    """The record of the first checkpoint for a choice that has one, and its step.

    Raises:
      ValueError: there is none.
    """
    record, step, _ = _first_whole(workdir, choice, lambda step: _record(workdir, step))
    return record, step


def _read_fields(workdir: Workdir, config: Config, wanted: dict[str, Any], choice: Choice) -> Restored:
    """Reads fields of a state, given as shapes by name, from the first checkpoint for a choice that is whole."""

    def files(step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        # The record first: another config is better named than by the shapes that do not fit.
        record = _record(workdir, step)
        _check_config(workdir, config, record)
        return _restore_fields(workdir, step, wanted), record

    def read(step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        # A file may be damaged that one process reads and others do not; digests are of all of it, in all of them.
        parts, record = together(lambda: files(step), DamagedError)
        digests, broken = digests_of(parts)
        expected = digests if record["digests"] is None else record["digests"]
        changed = next((name for name, digest in digests.items() if expected.get(name) != digest), None)
        if changed is not None:
            raise DamagedError(f"{changed} is not what was written")
        if broken is not None:
            raise DamagedError(f"{broken} holds numbers that are not finite")
        return parts, record

    (parts, record), step, damaged = _first_whole(workdir, choice, read)
    return Restored(parts, record, step, damaged)


def _saved(tree: Any) -> ocp.args.PyTreeSave:
    """What the library is asked for; in small parts, of which few are in memory at once beside the arrays."""
    parts = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    return ocp.args.PyTreeSave(tree, parts, ocdbt_target_data_file_size=_FILE_BYTES)


def _restore_fields(workdir: Workdir, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
    def arguments(tree: Any, **options: Any) -> ocp.args.PyTreeRestore:
        return ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree), **options)

    if (workdir.checkpoints / str(step) / _WHOLE_STATE).exists():
        whole = ocp.args.Composite(**{_WHOLE_STATE: arguments(wanted, partial_restore=True)})
        return _restore(workdir, step, whole)[_WHOLE_STATE]
    items = {name: arguments(tree) for name, tree in wanted.items()}
    return dict(_restore(workdir, step, ocp.args.Composite(**items)).items())


def _first_whole(
    workdir: Workdir, choice: Choice, read: Callable[[int], _Read]
) -> tuple[_Read, int, tuple[tuple[int, str], ...]]:
    """What the first checkpoint that is not damaged holds, its step, and those before it that are, with the reasons."""
    steps, damaged = [], []
    for _ in range(3):  # a run that goes on meanwhile deletes its oldest
        steps = candidates(workdir, choice)
        damaged = []
        for step in steps:
            try:
                return read(step), step, tuple(damaged)
            except DamagedError as error:
                damaged.append((step, str(error)))
        if steps == candidates(workdir, choice):
            break
    # None was there, or none was whole.
    if not steps:
        raise ValueError(f"{workdir.checkpoints}: holds no complete checkpoint")
    why = "; ".join(f"step {step}: {cause}" for step, cause in damaged)
    raise ValueError(f"{workdir.checkpoints}: no checkpoint that can be used: {why}; to begin anew, move it away")


def _record(workdir: Workdir, step: int) -> dict[str, Any]:
    sealed = _restore(workdir, step, ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
    if not isinstance(sealed, dict):
        raise DamagedError("its record is no record")
    # What is sealed has to be what was written; checkpoints of before seals have none.
    record = {name: value for name, value in sealed.items() if name != "sha256"}
    if not {"sha256", "digests"} & sealed.keys():
        record = {**_BEFORE_DIGESTS, **record}
    elif sealed.get("sha256") != json_digest(record):
        raise DamagedError("its record is not what was written")
    if not record.keys() >= _RECORDED:
        raise ValueError(
            f"{workdir.checkpoints}: written by another version of this code (without "
            f"{min(_RECORDED - record.keys())}); train the run again"
        )
    return record


def _check_config(workdir: Workdir, config: Config, record: dict[str, Any]) -> None:
    try:
        changed = differences(Config.stored(record["config"]), config)
    except ValueError as error:
        raise ValueError(
            f"{workdir.checkpoints}: written by another version of this code ({error}); train the run again"
        ) from error
    if changed:
        raise ValueError(
            f"{workdir.config_file}: {', '.join(changed)} is not what the run's checkpoints were written with; "
            "config.json was changed, and has to be put back"
        )


def _reader() -> ocp.Checkpointer:
    """Reads for this process alone: one that fails must not leave the others waiting in a barrier of the library."""
    own = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
    )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=options),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _restore(workdir: Workdir, step: int, items: ocp.args.Composite) -> Any:
    try:
        with _reader() as reader:
            return reader.restore(workdir.checkpoints / str(step), args=items)
    except MemoryError:
        raise
    except Exception as error:  # orbax and tensorstore raise many kinds for a damaged or foreign checkpoint
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise  # of the device, not of the files
        if is_passing(error):
            raise OSError(f"{workdir.checkpoints / str(step)}: cannot be read now ({reason(error)})") from error
        raise DamagedError(f"not readable: {reason(error)}") from error
