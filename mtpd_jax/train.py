"""Trains a model: ``python -m mtpd_jax.train --config=configs/NAME.py --workdir=DIR [--config.section.field=value …]``.

Running the same command again resumes where it stopped, or with --checkpoint=STEP from an earlier checkpoint; SIGTERM
or Ctrl-C saves a checkpoint and exits with 128 plus the signal's number. A loss that is not finite exits with status 1.
One process at a time trains in a workdir; --break_lock takes it from another. --dry_run says what a run would be, and
creates nothing.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import rich.console
from etils import epath
from jax.experimental import multihost_utils

from mtpd_jax import frontdoor
from mtpd_jax.config import Config
from mtpd_jax.data.pipeline import TrainingData
from mtpd_jax.dry_run import dry_run, show
from mtpd_jax.evaluation.held_out import HeldOut
from mtpd_jax.evaluation.proof import prove_parity
from mtpd_jax.evaluation.report import write_json
from mtpd_jax.interop.reading import BESIDE_TOKENIZER
from mtpd_jax.methods.method import Method
from mtpd_jax.model.backbone import count_parameters
from mtpd_jax.runs.checkpoint import Checkpointer, read_record, restore_state
from mtpd_jax.runs.choice import NEWEST, Choice, latest_step, parse_choice, steps_of
from mtpd_jax.runs.interruption import StopRequest
from mtpd_jax.runs.lock import Lock, take_lock
from mtpd_jax.runs.metrics import MetricsLog
from mtpd_jax.runs.models import all_sources, read_backbone
from mtpd_jax.runs.origin import Origin, beginning, held_out_note, source_of
from mtpd_jax.runs.plan import Plan, planned
from mtpd_jax.runs.processes import first_decides
from mtpd_jax.runs.progress import Progress
from mtpd_jax.runs.teacher import keep_teacher, read_teacher
from mtpd_jax.runs.workdir import Workdir, write_atomically
from mtpd_jax.shapes import Parameters
from mtpd_jax.sharding import describe_mesh
from mtpd_jax.trainer import Trainer
from mtpd_jax.training.state import TrainState, initial_state, state_shardings
from mtpd_jax.training.step import make_step

_CUT_SHORT = "; its evaluation was cut short: the same command does it again"
_NOTHING_HELD_OUT = "nothing is held out: there is no evaluation while training"


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of ``run`` ended.

    Attributes:
      workdir: the run's folder.
      step: optimizer steps done, over all calls.
      finished: whether that is all of them, and all is evaluated.
      signal: the signal that asked to stop, or None. It may have come too late to end the call early; who would go on
        with other work should not.
      tokens: non-padding tokens trained on, over all calls.
      parameters: number of parameters, frozen ones included.
      seconds: wall time of training, compilation and evaluation included, over all calls.
    """

    workdir: str
    step: int
    finished: bool
    signal: int | None
    tokens: int
    parameters: int
    seconds: float


def run(
    config: Config | ml_collections.ConfigDict | Mapping[str, Any],
    workdir: str,
    *,
    checkpoint: int | str = NEWEST,
    backbone: str | None = None,
    break_lock: bool = False,
) -> TrainResult:
    """Trains, or goes on training, the model of a config in a workdir.

    Args:
      config: a ``Config``, the ConfigDict of a config file, or the same as nested mappings.
      workdir: the run's folder, local or ``gs://…``; created if it is not there.
      checkpoint: the step to go on from, "newest", or "best" (see ``open_run``). Newer ones are set aside.
      backbone: of a run that names its backbone, or starts from one that does: where that lies now; None: where it lay.
      break_lock: take the run from another process that trains here.

    Raises:
      ValueError: bad config, data or workdir; raised before anything is created.
      DivergedError: the loss is not finite any more.
      OSError: something cannot be read or written.
    """
    # Everything that can be wrong is looked at before anything is created.
    config, chosen = Config.of(config), parse_choice(checkpoint)
    plan = planned(config, workdir, chosen)
    named, config, folder, method = config.objective.source_run, plan.config, plan.folder, plan.method
    origin = beginning(config, folder, method.mesh, backbone)
    with contextlib.ExitStack() as stack:
        # From here on the run exists.
        lock = stack.enter_context(_begin(plan, break_lock))
        tokenizer = plan.tokenizer()
        data = stack.enter_context(TrainingData(config, plan.source, tokenizer))
        stop = stack.enter_context(StopRequest())
        start = _restored(plan, chosen, data, backbone or _moved(named, folder)) or _fresh(plan, origin, lock)
        del origin  # or its parameters would be held, beside their copy, as long as the run lasts
        checkpointer = stack.enter_context(Checkpointer(folder, config.checkpoint.keep, lock))
        _record_config(config, folder, start.step)
        progress = stack.enter_context(Progress("training", config.training.steps, start.step))
        metrics = stack.enter_context(MetricsLog(folder, start.step, config, lock))
        evaluate = HeldOut.of(method, plan.source, tokenizer)
        notes = [*plan.notes, plan.source.note, start.note, metrics.note, *_held_out_notes(evaluate, data, start)]
        progress.say("\n".join([f"{folder.shown}: {start.message}", *filter(None, notes)]))
        if method.rehearses_decoding and not start.step:
            progress.say(prove_parity(method, start.parameters(method), plan.source, tokenizer))
        step = make_step(method, plan.optimizer, state_shardings(plan.abstract))
        about = {"tokenizer": folder.tokenizer_digest(), "origin": start.origin}
        trainer = Trainer(method, step, evaluate, data, checkpointer, metrics, stop, progress, about)
        done = trainer.run(start.take_state(), start.step, start.tokens, start.seconds)
        finished = done >= config.training.steps and trainer.evaluated
        if stop.signal is not None and not finished:
            progress.say(f"{folder.shown}: asked to stop; saved step {done}{'' if trainer.evaluated else _CUT_SHORT}")
    parameters = count_parameters(plan.abstract.parameters) + count_parameters(plan.abstract.frozen)
    return TrainResult(str(folder.path), done, finished, stop.signal, trainer.tokens, parameters, trainer.seconds)


@dataclasses.dataclass
class _Start:
    """Where a run stands before its first step here.

    Attributes:
      state: of ``step`` steps, ``tokens`` tokens and ``seconds`` of earlier calls.
      origin: of the run that it starts from, see ``origin.beginning``.
      message: what the run is about to do.
      note: what else has to be said; nothing where there is nothing to say.
    """

    state: TrainState | None
    step: int
    tokens: int
    seconds: float
    origin: dict[str, Any] | None
    message: str
    note: str

    def parameters(self, method: Method) -> Parameters:
        """Of the whole model."""
        assert self.state is not None  # it was not taken yet
        return method.merge(self.state.evaluated, self.state.frozen)

    def take_state(self) -> TrainState:
        """Hands the state over, which nobody else may hold then: the first step consumes it."""
        state, self.state = self.state, None
        assert state is not None  # it is taken once
        return state


def _fresh(plan: Plan, origin: Origin | None, lock: Lock) -> _Start:
    """A run that begins; what is left of the metrics of one that lost its checkpoints is put aside."""
    method, folder = plan.method, plan.folder
    if origin is not None and method.keeps_teacher:
        keep_teacher(folder, lock, origin.record, origin.parameters)
    state = initial_state(method, plan.optimizer, origin and origin.parameters)
    steps, trained = method.config.training.steps, count_parameters(plan.abstract.parameters)
    message = f"training {trained:,} parameters for {steps} steps on {describe_mesh(method.mesh)}"
    if origin is not None:
        message += f": {method.describe()}, step {origin.record['step']}"
    # Metrics without a checkpoint are of a run that cannot be gone on with.
    note = ""
    if jax.process_index() == 0 and folder.metrics_file.exists() and folder.metrics_file.stat().length:
        kept = folder.set_aside(folder.metrics_file)
        note = f"no checkpoint is there, so that the run begins anew; the metrics that were there are kept in {kept}"
    notes = "\n".join(filter(None, [note, origin.note if origin else ""]))
    return _Start(state, 0, 0, 0.0, origin and origin.record, message, notes)


def _restored(plan: Plan, checkpoint: Choice, data: TrainingData, backbone: str | None) -> _Start | None:
    """A run that goes on, or None without a checkpoint; newer checkpoints than the one that is used are put aside.

    ``backbone`` is where that of a run that names it lies now; None: where it lay.
    """
    config, folder, method = plan.config, plan.folder, plan.method
    if latest_step(folder) is None and checkpoint == NEWEST:
        return None
    restored = restore_state(folder, config, plan.abstract, checkpoint)
    state: TrainState = restored.tree
    origin = restored.record["origin"]
    if method.names_backbone:
        found = read_backbone(method, origin["backbone"], backbone)
        state, origin = dataclasses.replace(state, frozen=found.parameters), {**origin, "backbone": found.where}
    elif method.keeps_teacher:
        state = dataclasses.replace(state, frozen=read_teacher(folder, method, origin))
    folder.check_tokenizer(restored.record["tokenizer"])
    data.set_state(restored.record["data"])
    # Newer checkpoints, and the metrics of their steps, give way.
    newer = [step for step in steps_of(folder) if step > restored.step]
    if jax.process_index() == 0 and newer:
        for step in newer:
            folder.set_aside(folder.checkpoints / str(step))
        if folder.metrics_file.exists():  # the lines of those steps are dropped
            folder.copy_aside(folder.metrics_file)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("newer checkpoints put aside")
    # Counters go on from where they were.
    done, steps, record = restored.step, config.training.steps, restored.record
    message = f"resuming from step {done}" if done < steps else f"already finished, at step {done}"
    counters = record["tokens"], record["seconds"], origin
    return _Start(state, done, *counters, f"{message} of {steps}", restored.note(folder))


def _moved(named: str | None, folder: Workdir) -> str | None:
    """Where a run of heads on a frozen backbone may find that, if it is not where it lay; None: look there.

    Args:
      named: what the command line names as the run to start from: the backbone itself, as a rule.
      folder: of the run.
    """
    if named is None or latest_step(folder) is None:
        return None
    where = (read_record(folder)["origin"] or {}).get("backbone")
    return None if where is None or epath.Path(where["path"]).exists() else named


def _held_out_notes(evaluate: HeldOut | None, data: TrainingData, start: _Start) -> list[str]:
    """What has to be said of what is held out."""
    if evaluate is None:
        return [_NOTHING_HELD_OUT]
    return [held_out_note(all_sources(data.identity, start.origin)), evaluate.note]


def _record_config(config: Config, folder: Workdir, done: int) -> None:
    """Writes the config with what a resume may change; of a finished run, what scoring and decoding take from it."""
    if jax.process_index() == 0:
        if done >= config.training.steps:
            used = {"data": config.data, "model": config.model, "tokenizer": config.tokenizer}
            config = dataclasses.replace(folder.read_config(), **used)
        folder.write_config(config)


def _begin(plan: Plan, break_lock: bool) -> Lock:
    """Takes the workdir's lock and creates what is not there, once nothing can be wrong with the config any more.

    The first process does both, and all read the tokenizer that it wrote: one that made its own could differ.
    """
    config, folder = plan.config, plan.folder
    if jax.process_count() > 1:  # none writes before all have looked at what was there
        multihost_utils.sync_global_devices("workdir looked at")
    lock = error = None
    try:
        lock = take_lock(folder, break_lock)
        folder.check(config, begun=latest_step(folder) is not None)  # again: another process may have begun meanwhile
        if jax.process_index() == 0 and not folder.tokenizer_file.exists():
            _create(plan)
    except (ValueError, OSError) as caught:
        error = caught
    except BaseException:  # the process may go on, as in a notebook, and must not keep itself out
        if lock is not None:
            lock.__exit__()
        raise
    # All learn whether it went well: whoever waited for a process that is gone would wait for ever.
    failed = first_decides(error is not None)
    if error is None and not failed and lock is not None:
        return lock
    if lock is not None:
        lock.__exit__()
    raise error or ValueError(f"{folder.path}: the first process could not begin; its own message says why")


def _create(plan: Plan) -> None:
    """Writes config and tokenizer; one that is not given is trained."""
    config, folder = plan.config, plan.folder
    tokenizer = plan.tokenizer()
    folder.write_config(config)
    # What says how a pretrained model's tokenizer is used: it goes with the model.
    if config.objective.source_run is not None:
        beside = source_of(config).path
        for name in BESIDE_TOKENIZER:
            if (beside / name).exists():
                (beside / name).copy(folder.path / name, overwrite=True)
    write_atomically(folder.tokenizer_file, tokenizer.to_json())


def main() -> int:
    """Parses the flags, trains, reports."""
    flags = frontdoor.parse_config_flags(sys.argv[1:], __doc__ or "")
    if flags.dry_run:
        found = dry_run(flags.config, flags.workdir, flags.checkpoint)
        show(rich.console.Console(highlight=False), found)
        if flags.json:
            write_json(flags.json, dataclasses.asdict(found))
        return 0
    result = run(
        flags.config, flags.workdir, checkpoint=flags.checkpoint, backbone=flags.backbone, break_lock=flags.break_lock
    )
    return 0 if result.finished or result.signal is None else 128 + result.signal


if __name__ == "__main__":
    frontdoor.guarded(main)
