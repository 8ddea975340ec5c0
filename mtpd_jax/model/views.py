"""What a layer is told of the tokens that pass through it: where they stand, and what they may see.

A view is handed to every layer of a pass. In training, tokens see those of their own packed row; in decoding they are
written to the layer's cache first, and see that.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import struct

from mtpd_jax.config import ModelConfig
from mtpd_jax.model.attention import (
    Documents,
    Drawn,
    Pattern,
    Slots,
    attend,
    attend_to_slots,
    kernel_for,
    knows_documents,
)
from mtpd_jax.model.cache import KVCache
from mtpd_jax.shapes import Array, AttentionMask, Float, Int, Positions, SegmentIds

GroupedQuery = Float[Array, "B T G R H"]
NewKey = Float[Array, "B T G H"]


@struct.dataclass
class Rotation:
    """What rotary position embedding turns queries and keys by: computed once per pass, used by every block.

    Attributes:
      cos, sin: [B, T, H/2], in float32: at position 10,000 bfloat16 would be off by whole turns.
    """

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]

    @classmethod
    def of(cls, positions: Positions, config: ModelConfig) -> "Rotation":
        """The pair (i, i + H/2) at a position turns by position * theta^(-2i/H) (RoFormer, arXiv 2104.09864)."""
        # One angle per pair and position.
        angles_BxTxh = positions[:, :, None].astype(jnp.float32) * _frequencies(config)[None, None, :]
        return cls(jnp.cos(angles_BxTxh), jnp.sin(angles_BxTxh))

    def apply(self, x: Float[Array, "B T *heads H"]) -> Float[Array, "B T *heads H"]:
        """Turns every query or key."""
        # Both halves of a pair at once: (a, b) -> (a cos - b sin, b cos + a sin).
        cos, sin = (jnp.expand_dims(part, range(2, x.ndim)) for part in (self.cos, self.sin))
        halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
        sign = jnp.array([[-1.0], [1.0]])
        turned = halves * cos + jnp.flip(halves, axis=-2) * (sin * jnp.expand_dims(sign, range(x.ndim - 1)))
        return turned.reshape(x.shape).astype(x.dtype)


def _frequencies(config: ModelConfig) -> Float[Array, " half"]:
    """Radians per position by which each pair turns.

    As of Llama 3.1, a pair that turns less than ``low`` times in the length of texts before turns slower by the factor,
    one that turns more than ``high`` times as it did, and those between by something between, in line with their turns.
    """
    half = config.head_size // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if not config.rope_llama3:
        return frequencies
    factor, low, high, length = config.rope_llama3
    turns = length * frequencies / (2 * jnp.pi)
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


@runtime_checkable
class View(Protocol):
    """What every layer of a pass is handed."""

    @property
    def rotation(self) -> Rotation: ...

    def attend(self, query: GroupedQuery, key: NewKey, value: NewKey) -> tuple[GroupedQuery, Any]:
        """Returns what the tokens see of each other, or of a cache, and the cache with them in it (None without one).

        Args:
          query: after RoPE; R = N/G query heads share a key/value head.
          key, value: of the same tokens, keys after RoPE.
        """
        ...


@struct.dataclass
class PackedRows:
    """Whole rows of documents, without a cache.

    Attributes:
      segment_ids, positions: [B, T]; of the tokens.
      rotation: of their positions.
      pattern: who sees whom in a row.
      kernel: a key of ``attention.KERNELS``.
    """

    segment_ids: SegmentIds
    positions: Positions
    rotation: Rotation
    pattern: Any  # a Pattern; shape checks at run time would not know the protocol
    kernel: str = struct.field(pytree_node=False)

    @classmethod
    def of(cls, segment_ids: SegmentIds, positions: Positions, config: ModelConfig) -> "PackedRows":
        """Rows that hold documents. Where the config's kernel cannot be used, they are attended to densely."""
        pattern: Pattern = Documents(segment_ids)
        kernel = kernel_for(config, *segment_ids.shape)
        if not knows_documents(kernel):
            pattern = Drawn(pattern.dense())  # once for all layers
        return cls(segment_ids, positions, Rotation.of(positions, config), pattern, kernel)

    @classmethod
    def seeing(
        cls, mask: AttentionMask, segment_ids: SegmentIds, positions: Positions, config: ModelConfig
    ) -> "PackedRows":
        """Rows whose tokens see what a mask says: densely, where the config's kernel knows documents alone."""
        kernel = kernel_for(config, *segment_ids.shape)
        return cls(segment_ids, positions, Rotation.of(positions, config), Drawn(mask), kernel)

    def attend(self, query: GroupedQuery, key: NewKey, value: NewKey) -> tuple[GroupedQuery, None]:
        query_BxTxNxH = query.reshape(*query.shape[:2], -1, query.shape[-1])
        return attend(self.kernel, query_BxTxNxH, key, value, self.pattern).reshape(query.shape), None


@struct.dataclass
class CachedRows:
    """A few consecutive tokens per row, which see the slots of a cache.

    Attributes:
      rotation: of the tokens' positions.
      pattern: which slots they see.
      start: [B]; the slot of each row's first token.
      cache: of the layer that is run; see ``of_layer``.
    """

    rotation: Rotation
    pattern: Any  # a Pattern; shape checks at run time would not know the protocol
    start: Int[Array, " B"]
    cache: KVCache | None = None

    @classmethod
    def of(cls, first: Int[Array, " B"], count: int, slots: int, config: ModelConfig, margin: int = 0) -> "CachedRows":
        """Tokens of ``count`` positions from ``first`` on; position p lies in slot p + margin."""
        positions = first[:, None] + jnp.arange(count)[None, :]
        pattern = Drawn(Slots(positions, slots, margin).dense())  # once for all layers
        return cls(Rotation.of(positions, config), pattern, first + margin)

    def of_layer(self, cache: KVCache) -> "CachedRows":
        """The view of one layer, whose cache this is."""
        return dataclasses.replace(self, cache=cache)

    def attend(self, query: GroupedQuery, key: NewKey, value: NewKey) -> tuple[GroupedQuery, KVCache]:
        assert self.cache is not None  # a layer is given its own
        cache = self.cache.write(self.start, key, value)
        return attend_to_slots(query, *cache.read(), self.pattern), cache
