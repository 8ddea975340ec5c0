"""The key/value caches of decoding: fixed slots, written row by row at each row's own place."""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.config import ModelConfig
from mtpd_jax.shapes import Array, Float, Int
from mtpd_jax.sharding import constrain

# Up to this many rows are written one by one; XLA turns a write at many places into a loop on CPUs. By measurement.
_ROWS_WRITTEN_ONE_BY_ONE = 8


@struct.dataclass
class KVCache:
    """Keys (after RoPE) and values of one block, or of a stack of blocks of which one is in use.

    Position p of a row lies in slot ``p + margin``, where the margin (see ``attention.Slots``) is 0 for the backbone;
    the heads have one, for their windows may begin before a short prompt does. Nothing is ever cleared: a slot is
    overwritten before a query that may see it runs.

    Attributes:
      keys: [G·B, H, S], or with a leading axis for the blocks of a stack. With one axis for heads and rows, and in the
        layout of the product with the queries, XLA multiplies the slots where they lie; else it copies them first.
        Heads come first, for devices may share them.
      values: [G·B, S, H], likewise.
      block: which block of a stack is in use; None for a single block.
    """

    keys: Float[Array, "*stack GB H S"]
    values: Float[Array, "*stack GB S H"]
    block: Int[Array, ""] | None = None

    def use(self, block: Int[Array, ""] | None) -> "KVCache":
        """The same cache with another block of the stack in use."""
        return dataclasses.replace(self, block=block)

    def write(
        self, start: Int[Array, " B"], keys: Float[Array, "B T G H"], values: Float[Array, "B T G H"]
    ) -> "KVCache":
        """Returns the cache with T new entries per row in the block in use, from slot ``start`` of that row on."""
        return dataclasses.replace(
            self,
            keys=_write(self.keys, self.block, start, keys.transpose(2, 0, 3, 1), axis=-1),
            values=_write(self.values, self.block, start, values.transpose(2, 0, 1, 3), axis=-2),
        )

    def put_row(self, row: Int[Array, ""], alone: "KVCache") -> "KVCache":
        """Returns the cache with that of a batch of one row in the place of one of its rows."""
        groups = alone.keys.shape[-3]

        def put(slots: Array, of_row: Array) -> Array:
            stack, of_head = slots.shape[:-3], slots.shape[-2:]
            # Groups and rows lie side by side: apart, and together again.
            by_row = slots.reshape(*stack, groups, -1, *of_head)
            of_row = of_row.reshape(*stack, groups, 1, *of_head)
            return jax.lax.dynamic_update_slice_in_dim(by_row, of_row, row, len(stack) + 1).reshape(slots.shape)

        return dataclasses.replace(self, keys=put(self.keys, alone.keys), values=put(self.values, alone.values))

    def read(self) -> tuple[Float[Array, "GB H S"], Float[Array, "GB S H"]]:
        """Keys and values of the block in use."""
        if self.block is None:
            return self.keys, self.values
        return tuple(
            jax.lax.dynamic_index_in_dim(slots, self.block, keepdims=False) for slots in (self.keys, self.values)
        )


def _write(slots: Array, block: Array | None, start: Int[Array, " B"], new: Array, axis: int) -> Array:
    """Writes new entries, [G, B, T, H] or [G, B, H, T], along the axis of the slots."""
    new, (groups, batch) = new.astype(slots.dtype), new.shape[:2]
    if batch <= _ROWS_WRITTEN_ONE_BY_ONE:
        by_row = slots.reshape(*slots.shape[:-3], groups, batch, *slots.shape[-2:])
        for row in range(batch):
            corner = (0, row, start[row], 0) if axis == -2 else (0, row, 0, start[row])
            piece = new[:, row : row + 1]
            piece, corner = (piece, corner) if block is None else (piece[None], (block, *corner))
            by_row = jax.lax.dynamic_update_slice(by_row, piece, corner)
        return by_row.reshape(slots.shape)

    def write_row(slots: Array, new: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(slots, new, start, axis)

    # Many rows: one scatter, over a block that is taken out of its stack and put back.
    whole = slots if block is None else jax.lax.dynamic_index_in_dim(slots, block, keepdims=False)
    whole = jax.vmap(write_row)(whole, new.reshape(-1, *new.shape[2:]), jnp.tile(start, groups))
    return whole if block is None else jax.lax.dynamic_update_index_in_dim(slots, whole, block, 0)


def empty_cache(batch: int, slots: int, config: ModelConfig, dtype: jnp.dtype, stack: int | None = None) -> KVCache:
    """Returns a zeroed cache for ``batch`` rows of ``slots`` positions: of one block, or of a stack of blocks."""
    rows = config.kv_heads * batch
    leading = (rows,) if stack is None else (stack, rows)
    axes = (*("layers",) * (stack is not None), "kv_heads", None, None)
    keys = jnp.zeros((*leading, config.head_size, slots), dtype)
    values = jnp.zeros((*leading, slots, config.head_size), dtype)
    return KVCache(constrain(keys, *axes), constrain(values, *axes))


def slots_of(cache: KVCache) -> int:
    """Slots per row."""
    return cache.values.shape[-2]


# Of all layers: stacked, or one each.
Caches: TypeAlias = KVCache | tuple[KVCache, ...]
