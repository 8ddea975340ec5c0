"""Looped extension (MTP-D §3.3): a run that starts from another one's parameters and trains more heads on top."""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from mtpd_jax.config import Config
from mtpd_jax.model.backbone import build_model
from mtpd_jax.training.checkpoint import restored_parameters
from mtpd_jax.training.optimizer import make_optimizer
from mtpd_jax.training.state import abstract_state
from mtpd_jax.training.workdir import Workdir, open_workdir

# What the run that is extended may have otherwise: nothing of it changes a shape or what the model computes.
_FREE = {"remat", "dtype"}


def with_source(config: Config, place: Workdir) -> Config:
    """Fills in how many heads are frozen: those of the run to extend, or what this run's own config.json recorded.

    Once a run has begun, the one that it started from is not needed any more.

    Raises:
      ValueError: the run to extend is not there, is another model, or has too many heads already.
    """
    if config.objective.mode != "loop":
        return config
    if place.config_file.exists():
        recorded = place.read_config().init.num_heads
        return config if config.init.num_heads else _with_heads(config, recorded)
    source = source_of(config).read_config()
    _check_model(config, source)
    return _with_heads(config, source.heads.num_heads)


def source_of(config: Config) -> Workdir:
    """The workdir of the run to extend."""
    return open_workdir(config.init.workdir)


def source_parameters(config: Config, mesh: Mesh) -> Any:
    """The newest parameters of the run to extend: its average if it keeps one.

    Raises:
      ValueError: it has no checkpoint, or none that can be read.
    """
    place = source_of(config)
    source = place.read_config()
    abstract = abstract_state(build_model(source), make_optimizer(source), source, mesh)
    return restored_parameters(place, abstract)


def _with_heads(config: Config, num_heads: int | None) -> Config:
    given = config.init.num_heads
    if given not in (None, num_heads):
        raise ValueError(f"config.init.num_heads = {given}: {config.init.workdir} has {num_heads}; leave it out")
    config = dataclasses.replace(config, init=dataclasses.replace(config.init, num_heads=num_heads))
    config.validate()
    return config


def _check_model(config: Config, source: Config) -> None:
    wanted, found = (_shape(one) for one in (config, source))
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(
                f"config.{name} = {value!r}: the run in {config.init.workdir}, which is to be extended, "
                f"has {found[name]!r}; more heads are all that can be added to it"
            )


def _shape(config: Config) -> dict[str, Any]:
    """What has to be the same in both runs, by the names of its fields."""
    model = dataclasses.asdict(config.model)
    fields = {f"model.{name}": value for name, value in model.items() if name not in _FREE}
    heads = {"heads.kind": config.heads.kind, "heads.pass_normed": config.heads.pass_normed}
    return {**fields, **heads, "tokenizer.end_token": config.tokenizer.end_token}
