"""Trains a model: ``python -m mtpd_jax.train --config=configs/NAME.py --workdir=DIR [--config.section.field=value …]``.

Running the same command again resumes where it stopped; SIGTERM or Ctrl-C saves a checkpoint and exits with 128 plus
the signal's number. A loss that is not finite exits with status 1.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mtpd_jax import frontdoor
from mtpd_jax.config import Config
from mtpd_jax.data.pipeline import TrainingData
from mtpd_jax.data.sources import Source, open_source, split
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.evaluation.scoring import make_scorer, score_documents
from mtpd_jax.losses.objective import scoring_objective, training_objective
from mtpd_jax.model.backbone import LanguageModel, build_model, count_parameters
from mtpd_jax.sharding import check_divisible, make_mesh
from mtpd_jax.training.checkpoint import Checkpointer, latest_step
from mtpd_jax.training.interrupt import StopRequest
from mtpd_jax.training.loop import Evaluate, Loop
from mtpd_jax.training.looping import all_sources, beginning, held_out_note, source_of, with_source
from mtpd_jax.training.metrics import MetricsLog
from mtpd_jax.training.optimizer import learning_rate_schedule, make_optimizer
from mtpd_jax.training.progress import Progress
from mtpd_jax.training.state import abstract_state, initial_state, state_shardings
from mtpd_jax.training.step import make_step
from mtpd_jax.training.workdir import Workdir, open_workdir, write_atomically


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of ``run`` ended.

    Attributes:
      workdir: the run's folder.
      step: optimizer steps done, over all calls.
      finished: whether that is all of them.
      signal: the signal that ended the call early, or None.
      tokens: non-padding tokens trained on, over all calls.
      parameters: number of parameters, frozen ones included.
      seconds: wall time of the training loop, compilation and evaluation included, over all calls.
    """

    workdir: str
    step: int
    finished: bool
    signal: int | None
    tokens: int
    parameters: int
    seconds: float


def run(config: Config | ml_collections.ConfigDict, workdir: str) -> TrainResult:
    """Trains, or goes on training, the model of a config in a workdir.

    Args:
      config: a ``Config``, or the ConfigDict of a config file.
      workdir: the run's folder, local or ``gs://…``; created if it is not there.

    Raises:
      ValueError: bad config, data or workdir; raised before anything is created.
      DivergedError: the loss is not finite any more.
    """
    config = config if isinstance(config, Config) else Config.build(config.to_dict())
    config.validate()
    place = open_workdir(workdir)
    config = with_source(config, place)
    place.check(config)
    mesh = make_mesh(config.mesh)
    check_divisible(mesh, config.model, config.training)
    source = open_source(config.data)
    start, origin = beginning(config, place, mesh)
    tokenizer = _prepare(config, place, source)
    model, optimizer, objective = build_model(config), make_optimizer(config), training_objective(config)
    abstract = abstract_state(model, optimizer, config, mesh)
    step = make_step(model, objective, optimizer, mesh, state_shardings(abstract), config.optimizer.ema_decay)
    steps, trained = config.training.steps, count_parameters(abstract.parameters)
    with (
        Checkpointer(place, config.checkpoint.keep) as checkpointer,
        TrainingData(config, source, tokenizer) as data,
        StopRequest() as stop,
    ):
        done, tokens, seconds = 0, 0, 0.0
        if checkpointer.latest_step() is None:
            news = _beginning(config, mesh, trained)
            state = initial_state(model, optimizer, config, mesh, start)
            del start  # or it would be held, beside its copy, as long as the run lasts
        else:
            state, record = checkpointer.restore(abstract)
            done, tokens, seconds = int(state.step), record["tokens"], record["seconds"]
            data.set_state(record["data"])
            origin = record["origin"]
            finished = f"already finished, at step {done} of {steps}"
            news = finished if done >= steps else f"resuming from step {done} of {steps}"
        if done < steps and jax.process_index() == 0:
            place.write_config(config)  # with what a resume may change
        with (
            Progress("training", steps, done) as progress,
            MetricsLog(place, done, config.logging.tensorboard) as metrics,
        ):
            note = held_out_note(all_sources(data.identity, origin))
            progress.say(f"{place.path}: {news}" + (f"\n{note}" if note else ""))
            evaluate = _evaluator(config, model, mesh, source, tokenizer)
            loop = Loop(
                config, objective, step, learning_rate_schedule(config), evaluate, data, mesh, checkpointer, metrics,
                stop, progress, origin,
            )  # fmt: skip
            done = loop.run(state, done, tokens, seconds)
            if stop.signal is not None and done < steps:
                progress.say(f"{place.path}: asked to stop; saved step {done}")
    signal = None if done >= steps else stop.signal
    parameters = trained + count_parameters(abstract.frozen)
    return TrainResult(str(place.path), done, done >= steps, signal, loop.tokens, parameters, loop.seconds)


def _prepare(config: Config, place: Workdir, source: Source) -> Tokenizer:
    """Creates the workdir, once nothing can be wrong with the config any more; returns its tokenizer.

    The first process writes it, and all read what it wrote: one that made its own could differ.
    """
    new = not place.tokenizer_file.exists()
    given = _given_tokenizer(config) if new else None
    if jax.process_count() > 1:  # none writes before all have looked at what was there
        multihost_utils.sync_global_devices("workdir looked at")
    error = None
    if new and jax.process_index() == 0:
        try:
            _create(config, place, source, given)
        except (ValueError, OSError) as caught:
            error = caught
    # All learn whether it went well: whoever waited for a process that is gone would wait for ever.
    failed = jax.process_count() > 1 and bool(multihost_utils.broadcast_one_to_all(np.int32(error is not None)))
    if error is not None:
        raise error
    if failed:
        raise ValueError(f"{place.path}: the first process could not create it; its own message says why")
    return _checked(place.read_tokenizer(config), config)


def _create(config: Config, place: Workdir, source: Source, given: Tokenizer | None) -> None:
    """Writes config and tokenizer; one that is not given is trained, on training documents only."""
    tokenizer = given or Tokenizer.train(
        split(source, config.data.validation_fraction, validation=False),
        config.model.vocabulary_size,
        config.tokenizer.end_token,
        config.tokenizer.train_bytes,
    )
    place.write_config(config)
    write_atomically(place.tokenizer_file, tokenizer.to_json())


def _given_tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer of the run to extend, or of the config's file; None: one is to be trained."""
    if config.objective.mode == "loop":
        return _checked(source_of(config).read_tokenizer(config), config)
    if config.tokenizer.path:
        return _checked(Tokenizer.load(config.tokenizer.path, config.tokenizer.end_token), config)
    return None


def _checked(tokenizer: Tokenizer, config: Config) -> Tokenizer:
    """The tokenizer, whose every id has to have a row in the embedding."""
    if tokenizer.size > config.model.vocabulary_size:
        raise ValueError(
            f"config.model.vocabulary_size = {config.model.vocabulary_size}: expected at least {tokenizer.size}, "
            f"for the tokenizer's largest id is {tokenizer.size - 1}"
        )
    return tokenizer


def _beginning(config: Config, mesh: Mesh, trained: int) -> str:
    """What a new run is about to do."""
    news = f"training {trained:,} parameters for {config.training.steps} steps on {_describe(mesh)}"
    if config.frozen_heads is None:
        return news
    heads = f"heads {config.frozen_heads + 1} to {config.heads.num_heads}"
    return f"{news}: {heads} on top of {config.init.workdir}, step {latest_step(source_of(config))}"


def _describe(mesh: Mesh) -> str:
    """How many devices, and how they are arranged if they are more than one."""
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    used = f"{mesh.devices.size} of {jax.device_count()} {mesh.devices.flat[0].platform} devices"
    return f"{used} ({axes})" if axes else used


def _evaluator(config: Config, model: LanguageModel, mesh: Mesh, source: Source, tokenizer: Tokenizer) -> Evaluate:
    """The loop's evaluation: held-out documents scored as ``evaluate --split=validation`` does."""
    scorer = make_scorer(model, scoring_objective(config), mesh)

    def evaluate(parameters: Any, keep_going: Callable[[], bool]) -> dict[str, float | None] | None:
        held_out = split(source, config.data.validation_fraction, validation=True)
        score = score_documents(
            scorer,
            parameters,
            itertools.islice(held_out, config.evaluation.documents),
            tokenizer,
            mesh,
            num_heads=config.heads.num_heads,
            length=config.training.sequence_length,
            batch_size=config.training.batch_size // config.training.micro_batches,
            on_batch=keep_going,
        )
        if score is None:
            return None
        values = {f"main/{name}": value for name, value in dataclasses.asdict(score.main).items()}
        for k, head in enumerate(score.heads, 1):
            values |= {f"head_{k}/{name}": value for name, value in dataclasses.asdict(head).items()}
        return values

    return evaluate


def main() -> int:
    """Parses the flags, trains, reports."""
    config, workdir = frontdoor.parse_config_flags(sys.argv[1:], __doc__ or "")
    result = run(config, workdir)
    return 0 if result.signal is None else 128 + result.signal


if __name__ == "__main__":
    frontdoor.guarded(main)
