"""Selecting the N largest entries of each row by threshold: exact, without sorting and without gathers."""

import jax
import jax.numpy as jnp

from mtpd_jax.shapes import Array, Bool, Float

_SIGN = jnp.uint32(1 << 31)


def _ordered_key(values: Float[Array, "P V"]) -> Array:
    """Maps float32 to uint32 so that the order of the integers is the order of the floats."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)


def largest(values: Float[Array, "P V"], n: int) -> Bool[Array, "P V"]:
    """Marks the n largest entries of each row, and every entry that ties with the n-th.

    Finds the n-th largest value exactly, bit by bit from the top of its integer key: 32 counting passes, whatever n.
    (``lax.top_k`` with n in the thousands costs several times the matrix product that makes the logits.)

    Args:
      values: [P, V]; NaN counts as larger than infinity.
      n: 1…V.
    """
    key_PxV = _ordered_key(values)

    def settle_bit(step: Array, threshold_Px1: Array) -> Array:
        candidate_Px1 = threshold_Px1 | (_SIGN >> step.astype(jnp.uint32))
        enough_Px1 = jnp.sum(key_PxV >= candidate_Px1, axis=1, keepdims=True) >= n
        return jnp.where(enough_Px1, candidate_Px1, threshold_Px1)

    zero_Px1 = jnp.zeros_like(key_PxV, shape=(key_PxV.shape[0], 1))
    return key_PxV >= jax.lax.fori_loop(0, 32, settle_bit, zero_Px1)
