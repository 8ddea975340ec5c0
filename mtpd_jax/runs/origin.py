"""Where a run comes from: the run that its parameters start from, and the documents that both were trained on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from mtpd_jax.config import Config
from mtpd_jax.data.sources import UnknownData
from mtpd_jax.fields import require
from mtpd_jax.methods.method import METHODS, ReadTokenizer
from mtpd_jax.runs.checkpoint import read_record
from mtpd_jax.runs.choice import latest_step, parse_choice
from mtpd_jax.runs.models import FolderModel, RunModel, backbone_digest, open_model
from mtpd_jax.runs.teacher import teacher_record
from mtpd_jax.runs.workdir import Workdir
from mtpd_jax.shapes import Parameters


def completed(config: Config, workdir: Workdir) -> Config:
    """Fills in what a config leaves to the run that it starts from.

    Once a run has begun, its checkpoints say what it began from, which may be gone. It may also have been moved;
    another one in its place is told by its config and its data.

    Raises:
      ValueError: the run to start from is not there, or does not fit; or it is not the one that this run began from.
    """
    if config.objective.source_run is None:
        return config
    if latest_step(workdir) is None:
        model = source_of(config)
        return _complete(config, model.config, model.tokenizer)
    # The run has begun: what it began from is on record, and may be gone.
    origin, begun = read_record(workdir)["origin"], workdir.read_config()
    if begun.objective.source_run is None:
        return config  # and is refused, as any other config
    if origin is None:
        raise ValueError(f"{workdir.path}: written by an earlier version, which did not record what a run began from")
    if config.objective.source_run != begun.objective.source_run:
        if not source_of(config).is_origin(origin):
            needed = "" if METHODS[begun.objective.mode].names_backbone else ", though it need not be there any more"
            raise ValueError(
                f"config.objective.source = {config.objective.source_run!r}: not the run that {workdir.path} began "
                f"from, which is {begun.objective.source_run!r}; name that one{needed}"
            )
        config = dataclasses.replace(config, objective=config.objective.starting_from(begun.objective.source_run))
    return _complete(config, Config.stored(origin["config"]), workdir.read_tokenizer)


def _complete(config: Config, source: Config, read_tokenizer: ReadTokenizer) -> Config:
    where, mode = config.objective.source_run, config.objective.mode
    # What was held out there stays held out here.
    fraction, most = config.data.validation_fraction, source.data.validation_fraction
    expected = (
        f"at most {most}, that of the run in {where}; with more, text that it was trained on would count as held out"
    )
    known = source.data.source != UnknownData.case
    require(fraction <= most or not known, "data.validation_fraction", fraction, expected)
    expected = f"nothing with objective.mode = {mode!r}, which takes the tokenizer of {where}"
    require(not config.tokenizer.path, "tokenizer.path", config.tokenizer.path, expected)
    # The tokenizer is that run's, and so is what begins its texts, and what ends them, unless somebody says otherwise.
    tokenizer = config.tokenizer
    more = tokenizer.more_end_tokens or source.tokenizer.more_end_tokens
    tokenizer = dataclasses.replace(tokenizer, more_end_tokens=more, begin_token=source.tokenizer.begin_token)
    config = dataclasses.replace(config, tokenizer=tokenizer)
    config = METHODS[config.objective.mode].complete(config, source, read_tokenizer)
    config.validate()
    return config


def source_of(config: Config) -> RunModel | FolderModel:
    """The model to start from."""
    assert config.objective.source_run is not None  # or nobody asks
    return open_model(config.objective.source_run)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a run begins from.

    Attributes:
      parameters: of the run that it starts from (its average if it keeps one).
      record: what the new run's checkpoints will say of where it comes from: ``config`` and ``step`` of that run,
        ``sources``, which documents that run and those before it were trained on (see ``sources.identity``), and
        ``backbone``, where it lies and its digest, of a run that does not store it; or ``teacher``, the digest of the
        one that it keeps.
      note: what has to be said of it; nothing where there is nothing to say.
    """

    parameters: Parameters
    record: dict[str, Any]
    note: str


def beginning(config: Config, workdir: Workdir, mesh: Mesh, backbone: str | None = None) -> Origin | None:
    """The model to start from, as it is opened; None for a run that starts from nothing, or has a checkpoint.

    Args:
      config: of the new run.
      workdir: its folder.
      mesh: where parameters are to lie.
      backbone: where that of the model to start from lies now; None: where it lay.

    Raises:
      ValueError: the run to start from has no checkpoint, or none that can be read.
    """
    if config.objective.source_run is None or latest_step(workdir) is not None:
        return None
    source = source_of(config)
    model = source.read(mesh, parse_choice(config.objective.source_choice), backbone)
    record = {"config": source.config.to_dict(), "step": model.step, "sources": model.sources}
    # What is frozen of it, if the run only names that.
    if METHODS[config.objective.mode].names_backbone:
        record["backbone"] = {**model.backbone, "digest": backbone_digest(model.parameters)}
    elif METHODS[config.objective.mode].keeps_teacher:
        record["teacher"] = teacher_record(model.parameters)
    return Origin(model.parameters, record, model.note)


def held_out_note(sources: Sequence[dict[str, Any]]) -> str:
    """What has to be said of the held-out text of a run, from ``trained_on``; nothing where there is nothing to say."""
    if all(source == sources[0] for source in sources):
        return ""
    return (
        "held-out text: held out of this run; the run that it starts from was trained on other documents, "
        "and what this one holds out may be among them, changed"
    )
