"""Looped extension (MTP-D §3.3): a run that starts from another one's parameters and trains more heads on top."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from mtpd_jax.config import Config, differences
from mtpd_jax.model.backbone import build_model
from mtpd_jax.training.checkpoint import latest_step, read_record, restore_parameters
from mtpd_jax.training.optimizer import make_optimizer
from mtpd_jax.training.state import abstract_state
from mtpd_jax.training.workdir import Workdir, open_workdir

# What the run that is extended may have otherwise: it changes no shape, and no more than the rounding of a state.
_FREE = {"remat", "dtype"}


def with_source(config: Config, place: Workdir) -> Config:
    """Fills in what a loop takes from the run that it extends: how many heads are frozen.

    Once a run has begun, its own config.json says so, and the run that it began from may be gone. It may also have
    been moved; another one in its place is told by its config and its data.

    Raises:
      ValueError: the run to extend is not there, is another model, or has too many heads already; or it is not the one
        that this run began from.
    """
    if config.objective.mode != "loop":
        return config
    if latest_step(place) is None:
        return _with_heads(config, _checked_source(config).heads.num_heads)
    begun = place.read_config()
    if begun.objective.mode != "loop":
        return config  # and is refused, as any other config
    if config.init.workdir != begun.init.workdir:
        if not _is_origin(source_of(config), read_record(place)["origin"]):
            raise ValueError(
                f"config.init.workdir = {config.init.workdir!r}: not the run that {place.path} began from, which is "
                f"{begun.init.workdir!r}; name that one, though it need not be there any more"
            )
        config = _replace_init(config, workdir=begun.init.workdir)
    return _with_heads(config, begun.init.num_heads or 0)


def _is_origin(found: Workdir, origin: dict[str, Any]) -> bool:
    """Whether a folder holds the run that another one began from: by its config, and by what it was trained on."""
    return (
        latest_step(found) is not None
        and not differences(found.read_config(), Config.build(origin["config"]))
        and trained_on(read_record(found)) == origin["sources"]
    )


def source_of(config: Config) -> Workdir:
    """The workdir of the run to extend."""
    return open_workdir(config.init.workdir)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What an extension begins from.

    Attributes:
      parameters: of the run to extend (its average if it keeps one).
      record: what the new run's checkpoints will say of where it comes from: ``config`` and ``step`` of the run that it
        extends, and ``sources``, which documents that run and those before it were trained on (see
        ``sources.identity``).
    """

    parameters: Any
    record: dict[str, Any]


def beginning(config: Config, place: Workdir, mesh: Mesh) -> Origin | None:
    """The newest parameters of the run to extend; None for a run that starts from nothing, or that has a checkpoint.

    Raises:
      ValueError: the run to extend has no checkpoint, or none that can be read.
    """
    if config.objective.mode != "loop" or latest_step(place) is not None:
        return None
    source = _checked_source(config)
    abstract = abstract_state(build_model(source), make_optimizer(source), source, mesh)
    found = restore_parameters(source_of(config), source, abstract)
    source_of(config).read_tokenizer(source, found.record["tokenizer"])
    record = {"config": source.to_dict(), "step": found.step, "sources": trained_on(found.record)}
    return Origin(found.tree, record)


def trained_on(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Which documents a run was trained on, by its record: see ``all_sources``."""
    return all_sources(record["data"]["source"], record["origin"])


def all_sources(own: dict[str, Any], origin: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Which documents a run was trained on (see ``sources.identity``), its own first, then those of what it extends."""
    return [own] if origin is None else [own, *origin["sources"]]


def held_out_note(sources: Sequence[dict[str, Any]]) -> str:
    """What has to be said of the held-out text of a run, from ``trained_on``; nothing where there is nothing to say."""
    if all(source == sources[0] for source in sources):
        return ""
    return (
        "held-out text: held out of this run; the run that it extends was trained on other documents, "
        "and what this one holds out may be among them, changed"
    )


def _with_heads(config: Config, num_heads: int) -> Config:
    given = config.init.num_heads
    if given not in (None, num_heads):
        raise ValueError(f"config.init.num_heads = {given}: {config.init.workdir} has {num_heads}; leave it out")
    config = _replace_init(config, num_heads=num_heads)
    config.validate()
    return config


def _replace_init(config: Config, **fields: Any) -> Config:
    return dataclasses.replace(config, init=dataclasses.replace(config.init, **fields))


def _checked_source(config: Config) -> Config:
    """The config of the run to extend, whose model has to be this one's."""
    source = source_of(config).read_config()
    wanted, found = (_shape(one) for one in (config, source))
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(
                f"config.{name} = {value!r}: the run in {config.init.workdir}, which is to be extended, "
                f"has {found[name]!r}; more heads are all that can be added to it"
            )
    if config.data.validation_fraction > source.data.validation_fraction:
        raise ValueError(
            f"config.data.validation_fraction = {config.data.validation_fraction}: expected at most "
            f"{source.data.validation_fraction}, that of the run in {config.init.workdir}; with more, text that its "
            "trunk was trained on would count as held out"
        )
    if config.tokenizer.path:
        raise ValueError(
            f"config.tokenizer.path = {config.tokenizer.path!r}: expected nothing with objective.mode = 'loop', "
            f"which takes the tokenizer of {config.init.workdir}"
        )
    return source


def _shape(config: Config) -> dict[str, Any]:
    """What has to be the same in both runs, by the names of its fields."""
    model = dataclasses.asdict(config.model)
    fields = {f"model.{name}": value for name, value in model.items() if name not in _FREE}
    heads = {"heads.kind": config.heads.kind, "heads.pass_normed": config.heads.pass_normed}
    return {**fields, **heads, "tokenizer.end_token": config.tokenizer.end_token}
