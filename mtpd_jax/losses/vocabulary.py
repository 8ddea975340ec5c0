"""Reductions over the vocabulary, which a mesh axis may split."""

import dataclasses

import jax
import jax.numpy as jnp

from mtpd_jax.shapes import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The last axis of an array of logits, whole or one device's shard of it.

    Attributes:
      axis: the mesh axis that splits it, bound by ``shard_map``; None where each device holds all of it.
    """

    axis: str | None = None

    def size(self, logits: Float[Array, "*rows V"]) -> int:
        """V, over all shards."""
        return logits.shape[-1] * (jax.lax.axis_size(self.axis) if self.axis else 1)

    def ids(self, logits: Float[Array, "*rows V"]) -> Int[Array, "*rows V"]:
        """The token that each logit belongs to."""
        first = jax.lax.axis_index(self.axis) * logits.shape[-1] if self.axis else 0
        return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) + first

    def sum(self, values: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
        """The sum over all tokens."""
        total = jnp.sum(values, axis=-1)
        return jax.lax.psum(total, self.axis) if self.axis else total

    def max(self, values: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
        """The maximum over all tokens."""
        largest = jnp.max(values, axis=-1)
        return jax.lax.pmax(largest, self.axis) if self.axis else largest

    def min(self, values: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
        """The minimum over all tokens."""
        smallest = jnp.min(values, axis=-1)
        return jax.lax.pmin(smallest, self.axis) if self.axis else smallest

    def count(self, values: Bool[Array, "*rows V"]) -> Float[Array, "*rows"]:
        """How many are true, exact up to 2^24; float32 because XLA's CPU backend does not vectorise integer sums."""
        return self.sum(values.astype(jnp.float32))
