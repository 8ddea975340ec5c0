"""Heads for a pretrained model that stays as it is ("Evolving LLMs from Next-Token Prediction to MTP", Electronics
15(7):1533, 2026): they learn the backbone's own next-token distribution.

Of the paper an abstract and a summary could be read; what they leave open is our choice, and said where it is made.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtpd_jax.config import Config
from mtpd_jax.fields import field, require
from mtpd_jax.losses.objective import HeadsObjectiveConfig
from mtpd_jax.methods.frozen import HeadsOnFrozen
from mtpd_jax.methods.method import ReadTokenizer
from mtpd_jax.methods.partition import without_heads
from mtpd_jax.methods.source import SourceConfig, with_model_of
from mtpd_jax.shapes import Array, Parameters


@dataclasses.dataclass(frozen=True)
class PosthocConfig(SourceConfig, HeadsObjectiveConfig, case="posthoc"):
    """Heads on a frozen backbone, that of the source, whose ``model`` section it is."""

    # What the heads are before the first step: random, with output projections of zero; copies of the backbone's last
    # block, on the sum of embedding and state; or those of the source, a run that has such heads.
    initial_heads: Literal["random", "last_block", "source"] = field("random")

    def default_coefficients(self, num_heads: int) -> tuple[float, float]:
        """The backbone's distribution is all that is taught, at every depth alike (our choice)."""
        return 0.0, 1 / max(num_heads, 1)

    def check(self, config: Config) -> None:
        super().check(config)
        require(config.heads.num_heads > 0, "heads.num_heads", config.heads.num_heads, "at least one, to be trained")
        alpha, beta = self.coefficients(config.heads.num_heads)
        require(any((*alpha, *beta)), "objective.beta", self.beta, "something to learn: alpha or beta above zero")


class Posthoc(HeadsOnFrozen, section=PosthocConfig):
    """All heads are trained; the backbone is neither differentiated nor stored: the run names it, and its digest."""

    names_backbone: ClassVar[bool] = True
    rehearses_decoding: ClassVar[bool] = True

    def __init__(self, config: Config, mesh: Mesh):
        super().__init__(config, mesh, frozen_heads=0)

    @classmethod
    def complete(cls, config: Config, source: Config, tokenizer: ReadTokenizer) -> Config:
        assert isinstance(config.objective, PosthocConfig)
        initial_heads, config = config.objective.initial_heads, with_model_of(config, source)
        if initial_heads == "source":
            _check_heads(config, source)
        return config

    def initial_parameters(self, key: Array, source: Parameters | None) -> Parameters:
        fresh, objective = super().initial_parameters(key, None), self.config.objective
        assert isinstance(objective, PosthocConfig)
        if source is None:
            return fresh
        heads: Any = nn.meta.unbox(fresh["heads"])
        if objective.initial_heads == "source":
            heads = source["heads"]
        elif objective.initial_heads == "last_block":
            heads = {"head": _from_last_block(heads["head"], source["backbone"])}
        weights = jnp.dtype(self.config.heads.weights)
        return {**source, "heads": jax.tree.map(lambda leaf: leaf.astype(weights), heads)}

    def split(self, parameters: Parameters) -> tuple[Parameters, Parameters | None]:
        return {"heads": parameters["heads"]}, without_heads(parameters)

    def merge(self, trained: Parameters, frozen: Parameters | None) -> Parameters:
        assert frozen is not None  # see ``split``
        return {**frozen, **trained}

    def describe(self) -> str:
        number, heads = self.config.heads.num_heads, self.config.heads
        what = f"heads 1 to {number}" if heads.kind == "cascade" else f"a {heads.kind} head, {number} times"
        return f"{what} on top of {self.config.objective.source_run}"


def _check_heads(config: Config, source: Config) -> None:
    """Checks that heads can begin as those of the source."""
    for name in ("num_heads", "kind", "cache", "pass_normed"):
        wanted, there = getattr(config.heads, name), getattr(source.heads, name)
        require(wanted == there, f"heads.{name}", wanted, f"{there!r}, with objective.initial_heads = 'source'")


def _from_last_block(head: Any, backbone: Any) -> Any:
    """A head, or a stack of them, that begins as the backbone's last block and final norm.

    The block reads the sum of both inputs, each normalised, as a residual stream holds what was read and what was made
    of it. Our choice.
    """

    def copies(like: Array, last: Array) -> Array:
        return jnp.broadcast_to(last, like.shape)

    width = head["projection"]["kernel"].shape[-1]
    last = jax.tree.map(lambda stacked: stacked[-1], backbone["blocks"])
    return {
        **head,
        "projection": {"kernel": copies(head["projection"]["kernel"], jnp.tile(jnp.eye(width), (2, 1)))},
        "block": jax.tree.map(copies, head["block"], last),
        "output_norm": jax.tree.map(copies, head["output_norm"], backbone["final_norm"]),
    }
