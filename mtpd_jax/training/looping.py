"""Looped extension (MTP-D §3.3): a run that starts from another one's parameters and trains more heads on top."""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from mtpd_jax.config import Config
from mtpd_jax.model.backbone import build_model
from mtpd_jax.training.checkpoint import latest_step, restored_parameters
from mtpd_jax.training.optimizer import make_optimizer
from mtpd_jax.training.state import abstract_state
from mtpd_jax.training.workdir import Workdir, open_workdir

# What the run that is extended may have otherwise: it changes no shape, and no more than the rounding of a state.
_FREE = {"remat", "dtype"}


def with_source(config: Config, place: Workdir) -> Config:
    """Fills in what a loop takes from the run that it extends: how many heads are frozen.

    Once a run has begun, its own config.json says so, and the run that it began from may be gone.

    Raises:
      ValueError: the run to extend is not there, is another model, or has too many heads already.
    """
    if config.objective.mode != "loop":
        return config
    if latest_step(place) is None:
        return _with_heads(config, _checked_source(config).heads.num_heads)
    begun = place.read_config()
    # Where one of the two is gone, moved or deleted, another name does not mean another run.
    if not all(source_of(one).config_file.exists() for one in (config, begun)):
        config = _replace_init(config, workdir=begun.init.workdir)
    return _with_heads(config, begun.init.num_heads or 0)


def source_of(config: Config) -> Workdir:
    """The workdir of the run to extend."""
    return open_workdir(config.init.workdir)


def source_parameters(config: Config, place: Workdir, mesh: Mesh) -> Any:
    """What a run starts from: the newest parameters of the run to extend (its average if it keeps one).

    None for a run that starts from nothing, or that has a checkpoint of its own.

    Raises:
      ValueError: the run to extend has no checkpoint, or none that can be read.
    """
    if config.objective.mode != "loop" or latest_step(place) is not None:
        return None
    source = _checked_source(config)
    abstract = abstract_state(build_model(source), make_optimizer(source), source, mesh)
    return restored_parameters(source_of(config), abstract)


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
