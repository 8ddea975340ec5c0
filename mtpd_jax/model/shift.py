"""The one function that moves values along a packed sequence, and so the one that knows where documents end."""

import jax.numpy as jnp

from mtpd_jax.shapes import Array, Bool, SegmentIds


def shift(values: Array, segment_ids: SegmentIds, by: int) -> tuple[Array, Bool[Array, "B T"]]:
    """Looks ``by`` positions ahead (behind, if negative) inside the same document.

    Args:
      values: [B, T, …].
      segment_ids: [B, T]; the document that each token belongs to, 0 for padding.
      by: how far; position i receives the value at position i + by.

    Returns:
      The moved values, zero where position i + by lies outside the row or in another document than i, and the
      mask [B, T] of the positions where it does not. Padding is never valid.
    """
    length = segment_ids.shape[1]
    # Where each value comes from, and whether that is inside the row and the same document.
    source_T = jnp.arange(length) + by
    inside_T = (source_T >= 0) & (source_T < length)
    same_BxT = (jnp.roll(segment_ids, -by, axis=1) == segment_ids) & (segment_ids != 0)
    valid_BxT = inside_T[None, :] & same_BxT
    moved = jnp.roll(values, -by, axis=1)
    return jnp.where(valid_BxT.reshape(valid_BxT.shape + (1,) * (values.ndim - 2)), moved, 0), valid_BxT
