"""Rows that are read as text and as guesses: where the mask tokens of standalone MTP stand, and what they may see.

A row of S slots is M regions of B = S/M slots. With spans of k tokens, a region is B-k+1 tokens of the text and, after
the last of them, the anchor, k-1 masks, which take the places of the tokens that come next. The next region goes on
with the text where this one stopped: there, these tokens are read. For S = 12, M = 2, k = 3 (arXiv 2602.06019 §4.2):

    slot      0   1   2   3   4   5   6   7   8   9  10  11
    token    t0  t1  t2  t3   m   m  t4  t5  t6  t7   m   m
    position  0   1   2   3   4   5   4   5   6   7   8   9
    span              1   2   3               1   2   3        slot j of a span predicts the j-th token after its anchor

An offset o < B-k+1 moves everything o slots to the left. All of it is one formula in the slot, with k and o as arrays:
lengths that change from step to step are no new programs.

Text sees earlier text, never masks; a mask sees the text before it and the masks of its own span before it.
"""

import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.data.pipeline import Batch
from mtpd_jax.shapes import Array, AttentionMask, Bool, Int, Positions, SegmentIds, Tokens


@struct.dataclass
class Spans:
    """Rows with masks in them. R = k_max * M places of spans, those of equal j side by side, the smallest j first.

    Attributes:
      source: [B, S]; the token of the text that a slot reads, or whose place a mask takes.
      is_mask, is_anchor: [B, S]; masks, and the last tokens before them.
      segment_ids, positions: [B, S]; masks have their anchor's document, and its position and further ones.
      sees: [B, S, S].
      slots: [B, R]; where the slots of spans stand. Of those that there are not, anything.
      there: [B, R]; which there are: j is at most k, and the anchor is a token of a document that goes on.
    """

    source: Int[Array, "B S"]
    is_mask: Bool[Array, "B S"]
    is_anchor: Bool[Array, "B S"]
    segment_ids: SegmentIds
    positions: Positions
    sees: AttentionMask
    slots: Int[Array, "B R"]
    there: Bool[Array, "B R"]

    def tokens(self, rows: Tokens, mask_id: int) -> Tokens:
        """The rows as a model reads them whose masks have this id."""
        return jnp.where(self.is_mask, mask_id, jnp.take_along_axis(rows, self.source, axis=1))

    def written(self, tokens: Tokens, choices: Int[Array, "B R"], k_max: int) -> Tokens:
        """The rows with what the slots of spans chose in the masks: slot j's choice is read in the slot after it.

        Masks of spans that there are not stay what they are.
        """
        rows, regions = jnp.arange(len(tokens))[:, None], choices.shape[1] // k_max
        # All slots but the first of each span are masks. What there is not is written beyond the row, and dropped.
        places = jnp.where(self.there, self.slots, tokens.shape[1])[:, regions:]
        return tokens.at[rows, places].set(choices[:, :-regions], mode="drop")


def lay_out(
    rows: Batch, k: Int[Array, ""], offsets: Int[Array, " B"], *, regions: int, k_max: int, end_ids: tuple[int, ...]
) -> Spans:
    """Lays spans of k tokens out over packed rows.

    Args:
      rows: [B, T]; as many slots as tokens. What a large k leaves unread is not used.
      k: tokens of a span, at least 1 and at most ``k_max``.
      offsets: less than T/M - k + 1.
      regions: M, a divisor of T.
      k_max: what shapes are made for; less than T/M.
      end_ids: tokens after which nothing follows.
    """
    length = rows.tokens.shape[1]
    size, text = length // regions, length // regions - k + 1  # B, and tokens of text in a region
    slot_S, o_Bx1 = jnp.arange(length)[None, :], offsets[:, None]
    # Of every slot: its region, its place in it, and the token that it reads or whose place it takes.
    region_BxS, place_BxS = jnp.divmod(slot_S + o_Bx1, size)
    source_BxS = text * region_BxS + place_BxS - o_Bx1
    is_mask_BxS = place_BxS >= text
    # A mask counts on from its anchor, whatever document stands there.
    beyond_BxS = jnp.maximum(place_BxS - text + 1, 0)
    known_BxS = source_BxS - beyond_BxS
    segment_ids, positions = (
        jnp.take_along_axis(values, known_BxS, axis=1) for values in (rows.segment_ids, rows.positions)
    )
    # Where the slots of spans stand: j-major.
    j_J, region_M = 1 + jnp.arange(k_max), jnp.arange(regions)
    slots_BxJxM = size * region_M[None, None, :] + (text - 2 + j_J)[None, :, None] - offsets[:, None, None]
    anchors_BxM = text * region_M[None, :] + text - 1 - o_Bx1
    there_BxJxM = (j_J <= k)[None, :, None] & _goes_on(rows, anchors_BxM, end_ids)[:, None, :]
    in_line = (rows.tokens.shape[0], k_max * regions)
    return Spans(
        source_BxS, is_mask_BxS, place_BxS == text - 1, segment_ids, positions + beyond_BxS,
        _sees(is_mask_BxS, region_BxS, segment_ids),
        jnp.clip(slots_BxJxM, 0, length - 1).reshape(in_line), there_BxJxM.reshape(in_line),
    )  # fmt: skip


def _sees(is_mask: Bool[Array, "B S"], region: Int[Array, "B S"], segment_ids: SegmentIds) -> AttentionMask:
    causal_SxS = jnp.tril(jnp.ones((is_mask.shape[1],) * 2, bool))
    own_BxSxS = region[:, :, None] == region[:, None, :]
    same_BxSxS = segment_ids[:, :, None] == segment_ids[:, None, :]
    return causal_SxS[None] & same_BxSxS & (~is_mask[:, None, :] | own_BxSxS)


def _goes_on(rows: Batch, anchors: Int[Array, "B M"], end_ids: tuple[int, ...]) -> Bool[Array, "B M"]:
    """Whether something that may be learned can follow a token."""

    def at(values: Array, places: Array) -> Array:
        return jnp.take_along_axis(values, places, axis=1)

    tokens, here = at(rows.tokens, anchors), at(rows.segment_ids, anchors)
    found = here != 0
    for end_id in end_ids:
        found &= tokens != end_id
    if rows.supervised is None:
        return found
    # A document that is cut here goes on as it was.
    after = jnp.minimum(anchors + 1, rows.tokens.shape[1] - 1)
    follows = (at(rows.segment_ids, after) == here) & (after > anchors)
    return found & jnp.where(follows, at(rows.supervised, after), at(rows.supervised, anchors))


def following(rows: Batch, spans: Spans, regions: int, k_max: int) -> tuple[Int[Array, "B R"], Bool[Array, "B R"]]:
    """What the text has where the slots of spans predict, and whether that, and all of the span before it, goes on
    with the anchor's document."""
    anchors_BxM = jnp.take_along_axis(spans.source, spans.slots[:, :regions], axis=1)
    places_BxJxM = anchors_BxM[:, None, :] + 1 + jnp.arange(k_max)[None, :, None]
    places = places_BxJxM.reshape(places_BxJxM.shape[0], -1)
    inside, places = places < rows.tokens.shape[1], jnp.minimum(places, rows.tokens.shape[1] - 1)
    here = jnp.tile(jnp.take_along_axis(rows.segment_ids, anchors_BxM, axis=1), (1, k_max))
    same = inside & (jnp.take_along_axis(rows.segment_ids, places, axis=1) == here)
    if rows.supervised is not None:
        same &= jnp.take_along_axis(rows.supervised, places, axis=1)
    broken = jnp.cumsum(~same.reshape(places_BxJxM.shape), axis=1) > 0
    return jnp.take_along_axis(rows.tokens, places, axis=1), ~broken.reshape(same.shape)


def prefix(rows: Batch, spans: Spans) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """What follows every slot in the text, and whether it follows in the next slot, which is no mask's."""
    after = jnp.minimum(spans.source + 1, rows.tokens.shape[1] - 1)
    tokens, segments = (jnp.take_along_axis(values, after, axis=1) for values in (rows.tokens, rows.segment_ids))
    told = (after > spans.source) & (segments == spans.segment_ids) & (segments != 0)
    if rows.supervised is not None:
        told &= jnp.take_along_axis(rows.supervised, after, axis=1)
    return tokens, told & ~spans.is_mask & ~spans.is_anchor


def before_the_end(choices: Int[Array, "B R"], k_max: int, end_ids: tuple[int, ...]) -> Bool[Array, "B R"]:
    """Which slots come before anything ends the text that their span wrote: after that, nothing is decoded."""
    by_slot_BxJxM = choices.reshape(choices.shape[0], k_max, -1)
    ends = jnp.zeros(by_slot_BxJxM.shape, bool)
    for end_id in end_ids:
        ends |= by_slot_BxJxM == end_id
    return (jnp.cumsum(ends, axis=1) - ends == 0).reshape(choices.shape)


def draw(
    key: Array, row_keys: Array, *, size: int, k_min: int, k_max: Int[Array, ""] | int
) -> tuple[Int[Array, ""], Int[Array, " B"]]:
    """A length of spans for a step, and an offset for each row, all independent and each uniform.

    Args:
      key: of the step.
      row_keys: [B]; of its rows.
      size: slots of a region.
      k_min, k_max: the length's bounds, both included.
    """
    k = jax.random.randint(key, (), k_min, k_max + 1)
    offsets = jax.vmap(lambda row_key: jax.random.randint(row_key, (), 0, size - k + 1))(row_keys)
    return k, offsets
