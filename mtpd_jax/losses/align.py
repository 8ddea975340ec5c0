"""Alignment by target: all heads' states side by side at the token that they predict."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import struct

from mtpd_jax.model.backbone import HiddenStates
from mtpd_jax.model.shift import shift
from mtpd_jax.shapes import Array, Bool, Float, Int, SegmentIds, Tokens


@struct.dataclass
class AlignedRows:
    """All heads' states side by side at the token that they predict.

    Attributes:
      hidden: [J, B, T, D]; the main head's states, then at [j, b, t], for the head k of row j, its state at position
        t-k, which predicts token t+1.
      targets: [B, T]; token t+1.
      mask: [J, B, T]; whether both t-k and t+1 lie in the document of t, and t+1 is supervised.
    """

    hidden: Float[Array, "J B T D"]
    targets: Int[Array, "B T"]
    mask: Bool[Array, "J B T"]


def supervision_mask(
    segment_ids: SegmentIds, heads: Sequence[int], supervised: Bool[Array, "B T"] | None = None
) -> Bool[Array, "J B T"]:
    """Which of the main head and these heads have both a source position and a target, per aligned row.

    Args:
      segment_ids: [B, T].
      heads: their numbers.
      supervised: [B, T]; the tokens that may be targets; None: all.
    """
    is_target_BxT, has_target_BxT = shift(segment_ids if supervised is None else supervised, segment_ids, 1)
    has_target_BxT &= is_target_BxT != 0
    sources = [shift(segment_ids, segment_ids, -k)[1] for k in (0, *heads)]
    return jnp.stack(sources) & has_target_BxT[None]


def align(
    hidden: HiddenStates,
    tokens: Tokens,
    segment_ids: SegmentIds,
    heads: Sequence[int],
    supervised: Bool[Array, "B T"] | None = None,
) -> AlignedRows:
    """Shifts head k's states by k, so that every row has one target and one teacher for all heads.

    Args:
      hidden: of the main head, and of ``heads`` in this order.
      tokens, segment_ids: [B, T]; what the states were made from.
      heads: the numbers of the heads, from 1.
      supervised: see ``supervision_mask``.
    """
    rows = [hidden.main] + [shift(states, segment_ids, -k)[0] for k, states in zip(heads, hidden.heads, strict=True)]
    mask = supervision_mask(segment_ids, heads, supervised)
    return AlignedRows(jnp.stack(rows), shift(tokens, segment_ids, 1)[0], mask)
