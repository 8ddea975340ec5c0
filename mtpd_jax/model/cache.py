"""The key/value cache of decoding: fixed slots, written row by row at each row's own place."""

import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.config import ModelConfig
from mtpd_jax.shapes import Array, AttentionMask, Float, Int, Positions


@struct.dataclass
class KVCache:
    """Keys (after RoPE) and values of one block, or of a stack of blocks along a leading axis.

    Position p of a row lies in slot ``p + margin``, where the margin (given to ``visible``) is 0 for the backbone and
    K+1 for the heads, whose windows may begin before a short prompt does. Nothing is ever cleared: a slot is
    overwritten before a query that may see it runs.
    """

    keys: Float[Array, "*stack B S G H"]
    values: Float[Array, "*stack B S G H"]

    def write(
        self, start: Int[Array, " B"], keys: Float[Array, "B T G H"], values: Float[Array, "B T G H"]
    ) -> "KVCache":
        """Returns the cache of one block with T new entries per row, from slot ``start`` of that row on."""

        def place(slots_SxGxH: Array, new_TxGxH: Array, slot: Array) -> Array:
            return jax.lax.dynamic_update_slice(slots_SxGxH, new_TxGxH.astype(slots_SxGxH.dtype), (slot, 0, 0))

        return KVCache(jax.vmap(place)(self.keys, keys, start), jax.vmap(place)(self.values, values, start))


def empty_cache(stack: int, batch: int, slots: int, config: ModelConfig, dtype: jnp.dtype) -> KVCache:
    """Returns a zeroed cache for ``stack`` blocks, ``batch`` rows and ``slots`` positions each."""
    zeros = jnp.zeros((stack, batch, slots, config.kv_heads, config.head_size), dtype)
    return KVCache(zeros, zeros)


def visible(positions: Positions, slots: int, margin: int = 0) -> AttentionMask:
    """Which slots a query may attend to: those of its own and of earlier positions of its row.

    With margin 1, slots 0…4 hold positions -1…3, and the query at position 2 sees ``. x x x .``
    """
    key_positions_S = jnp.arange(slots) - margin
    return (key_positions_S >= 0)[None, None, :] & (key_positions_S[None, None, :] <= positions[:, :, None])
