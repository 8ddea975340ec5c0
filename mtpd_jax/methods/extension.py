"""Looped extension (MTP-D §3.3): more heads for a trained run, whose own backbone and heads stay as they are."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtpd_jax.config import Config, HeadsConfig
from mtpd_jax.fields import POSITIVE, field, require
from mtpd_jax.losses.objective import HeadsObjectiveConfig
from mtpd_jax.methods.frozen import HeadsOnFrozen
from mtpd_jax.methods.method import ReadTokenizer
from mtpd_jax.methods.partition import cut_heads, extend_heads, join_heads
from mtpd_jax.methods.source import FREE, SourceConfig
from mtpd_jax.model.heads import HEAD_KINDS
from mtpd_jax.shapes import Array, Parameters


@dataclasses.dataclass(frozen=True)
class ExtensionConfig(SourceConfig, HeadsObjectiveConfig, case="extension"):
    """More heads for a trained run: up to ``heads.num_heads``; all that the run has stays frozen."""

    frozen_heads: int | None = field(None, POSITIVE)  # heads of that run; None: read from it, and recorded

    def trained_heads(self, heads: HeadsConfig) -> int | None:
        return None if self.frozen_heads is None else heads.num_heads - self.frozen_heads

    def check(self, config: Config) -> None:
        kind, number = config.heads.kind, config.heads.num_heads
        shared = kind in HEAD_KINDS and HEAD_KINDS[kind].shared
        require(not shared, "heads.kind", kind, "cascade: a recurrent head runs to any depth as it is")
        if self.frozen_heads is not None:
            expected = f"more than the {self.frozen_heads} heads of {self.source}, which is to be extended"
            require(number > self.frozen_heads, "heads.num_heads", number, expected)
        super().check(config)


class Extension(HeadsOnFrozen, section=ExtensionConfig):
    """The new heads begin as copies of those that are there, in turn, and are trained alone."""

    def __init__(self, config: Config, mesh: Mesh):
        assert isinstance(config.objective, ExtensionConfig)
        if config.objective.frozen_heads is None:
            raise ValueError("config.objective.frozen_heads = None: expected the heads of the run that is extended")
        super().__init__(config, mesh, config.objective.frozen_heads)

    @classmethod
    def complete(cls, config: Config, source: Config, tokenizer: ReadTokenizer) -> Config:
        where = config.objective.source_run
        # What is frozen stays as it is stored.
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, weights=source.model.weights))
        # All but the number of heads has to be the source's.
        wanted, there = (_shape(one) for one in (config, source))
        for name, value in wanted.items():
            if there[name] != value:
                raise ValueError(
                    f"config.{name} = {value!r}: the run in {where}, which is to be extended, "
                    f"has {there[name]!r}; more heads are all that can be added to it"
                )
        assert isinstance(config.objective, ExtensionConfig)
        # How many heads are frozen is a property of the source.
        named, number = config.objective.frozen_heads, source.heads.num_heads
        if named not in (None, number):
            raise ValueError(f"config.objective.frozen_heads = {named}: {where} has {number}; leave it out")
        require(number > 0, "objective.source", where, "a run that has heads")
        return dataclasses.replace(config, objective=dataclasses.replace(config.objective, frozen_heads=number))

    def initial_parameters(self, key: Array, source: Parameters | None) -> Parameters:
        if source is None:
            return super().initial_parameters(key, None)
        extended = extend_heads(source, self.config.heads.num_heads)
        # All heads are kept as those that are trained.
        weights = jnp.dtype(self.config.heads.weights)
        return {**extended, "heads": jax.tree.map(lambda leaf: leaf.astype(weights), extended["heads"])}

    def split(self, parameters: Parameters) -> tuple[Parameters, Parameters | None]:
        return cut_heads(parameters, self._frozen_heads)

    def merge(self, trained: Parameters, frozen: Parameters | None) -> Parameters:
        assert frozen is not None  # see ``split``
        return join_heads(trained, frozen)

    def describe(self) -> str:
        first, last = self._frozen_heads + 1, self.config.heads.num_heads
        new = f"head {last}" if first == last else f"heads {first} to {last}"
        return f"{new} on top of {self.config.objective.source_run}"


def _shape(config: Config) -> dict[str, Any]:
    """What has to be the same in both runs, by the names of its fields."""
    model = dataclasses.asdict(config.model)
    fields = {f"model.{name}": value for name, value in model.items() if name not in FREE}
    heads = {"heads.kind": config.heads.kind, "heads.pass_normed": config.heads.pass_normed}
    return {**fields, **heads, "tokenizer.end_token": config.tokenizer.end_token}
