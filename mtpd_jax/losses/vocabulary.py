"""Reductions over the vocabulary, which a mesh axis may split."""

import dataclasses

import jax
import jax.numpy as jnp

from mtpd_jax.shapes import Array, Bool, Float, Int, Num


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The last axis of an array of logits, whole or one device's shard of it.

    Attributes:
      axis: the mesh axis that splits it, bound by ``shard_map``; None where each device holds all of it.
      on_cpu: a CPU looks up single logits where an accelerator joins a sum over all of them to a pass that it makes
        anyway.
    """

    axis: str | None = None
    on_cpu: bool = True

    def size(self, logits: Float[Array, "*rows V"]) -> int:
        """V, over all shards."""
        return logits.shape[-1] * (jax.lax.axis_size(self.axis) if self.axis else 1)

    def ids(self, logits: Float[Array, "*rows V"]) -> Int[Array, "*rows V"]:
        """The token that each logit belongs to."""
        return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) + self._first(logits)

    def _first(self, logits: Array) -> Array | int:
        return jax.lax.axis_index(self.axis) * logits.shape[-1] if self.axis else 0

    def sum(self, values: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
        """The sum over all tokens."""
        total = jnp.sum(values, axis=-1)
        return jax.lax.psum(total, self.axis) if self.axis else total

    def max(self, values: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
        """The maximum over all tokens."""
        largest = jnp.max(values, axis=-1)
        return jax.lax.pmax(largest, self.axis) if self.axis else largest

    def min(self, values: Num[Array, "*rows V"]) -> Num[Array, "*rows"]:
        """The minimum over all tokens."""
        smallest = jnp.min(values, axis=-1)
        return jax.lax.pmin(smallest, self.axis) if self.axis else smallest

    def count(self, values: Bool[Array, "*rows V"]) -> Float[Array, "*rows"]:
        """How many are true, exact up to 2^24; float32 because XLA's CPU backend does not vectorise integer sums."""
        return self.sum(values.astype(jnp.float32))

    def argmax(self, logits: Float[Array, "*rows V"]) -> Int[Array, "*rows"]:
        """The first token with the largest logit; on XLA's CPU backend many times faster than ``jnp.argmax``."""
        last = self.size(logits) - 1  # for rows with NaN
        return self.min(jnp.where(logits == self.max(logits)[..., None], self.ids(logits), last))

    def at(self, logits: Float[Array, "J P V"], tokens: Int[Array, " P"]) -> Float[Array, "J P"]:
        """The logit of one token per row, the same for all heads."""
        if not self.on_cpu:
            return self.sum(jnp.where(self.ids(logits) == tokens[None, :, None], logits, 0))
        place = tokens - self._first(logits)
        here = (place >= 0) & (place < logits.shape[-1])
        found = jnp.take_along_axis(logits, jnp.where(here, place, 0)[None, :, None], axis=-1)[..., 0]
        return self.sum(jnp.where(here[None], found, 0)[..., None])


# All of it, on the CPU.
WHOLE = Vocabulary()
