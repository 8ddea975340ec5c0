"""Heads with one cache: a chain of drafts on top of entries that were made from the backbone's states.

With ``heads.cache = shared`` there is one module, and one cache. Position i begins a chain: depth 1 reads h^0_i and
t_{i+1}, as a token of its own; depth k reads what depth k-1 of the same chain returned, and t_{i+k}, at RoPE position
i+k-1. It sees depth 1 of the positions up to i, and its own chain:

                    depth 1 of position        chain 2, depth
                    0  1  2  3                 2  3
    chain 2, 1      x  x  x  .                 .  .
    chain 2, 2      x  x  x  .                 x  .
    chain 2, 3      x  x  x  .                 x  x

That is what decoding does, which writes a chain's deeper entries into the slots behind its own and overwrites them with
depth 1 once their tokens are confirmed ("Evolving LLMs from Next-Token Prediction to MTP", Electronics 15(7):1533,
2026: the recomputed cache; EAGLE-3 trains with the same mask, arXiv 2503.01840).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.config import ModelConfig
from mtpd_jax.model.head import HeadOutput
from mtpd_jax.model.views import GroupedQuery, NewKey, PackedRows, Rotation
from mtpd_jax.shapes import Array, AttentionMask, Float, Hidden, Int, SegmentIds

# Keys and values of one depth, after RoPE, by the position that begins the chain.
Entries = tuple[NewKey, NewKey]
AllKeys = Float[Array, "B S G H"]
# Scores of a row that are alive at once, over all its attention heads: 64 MiB of them. Our choice.
_SCORES = 1 << 24


@struct.dataclass
class Chains:
    """What one depth of all chains of whole rows sees. A ``View``.

    Attributes:
      rows: the rows, as depth 1 sees them.
      rotation: of the depth's positions.
      entries: of the depths before it.
    """

    rows: PackedRows
    rotation: Rotation
    entries: tuple[Entries, ...]

    def attend(self, query: GroupedQuery, key: NewKey, value: NewKey) -> tuple[GroupedQuery, tuple[Entries, ...]]:
        """Returns what this depth sees, and the entries with its own behind them."""
        entries = (*self.entries, (key, value))
        if len(entries) == 1:
            return self.rows.attend(query, key, value)[0], entries
        return attend_to_chain(query, entries[0], entries[1:], self.rows.segment_ids), entries


def run_chain(
    head: Callable[[Hidden, Hidden, Chains], tuple[Hidden, HeadOutput]],
    config: ModelConfig,
    state: Hidden,
    embedded: Float[Array, "K B T D"],
    rows: PackedRows,
) -> tuple[Hidden, HeadOutput]:
    """Runs one head at every depth of every chain.

    The depths are written out: in a scan each would keep the entries of all of them for the backward pass.

    Args:
      head: the module.
      config: of the model.
      state: [B, T, D]; h^0.
      embedded: [K, B, T, D]; at depth k of the chain at i, Emb(t_{i+k}).
      rows: that the chains are of.

    Returns:
      The state for a depth K+1, and what the depths returned, stacked, but for their entries.
    """
    outputs: list[HeadOutput] = []
    entries: tuple[Entries, ...] = ()
    for depth in range(embedded.shape[0]):
        rotation = Rotation.of(rows.positions + depth, config)
        state, output = head(state, embedded[depth], Chains(rows, rotation, entries))
        entries = output.block.cache
        outputs.append(dataclasses.replace(output, block=dataclasses.replace(output.block, cache=None)))
    return state, jax.tree.map(lambda *depths: jnp.stack(depths), *outputs)


def attend_to_chain(
    query: GroupedQuery, first: Entries, later: tuple[Entries, ...], segment_ids: SegmentIds
) -> GroupedQuery:
    """Attention of a depth to depth 1 of its own and earlier positions, and to the later depths of its own chain.

    A few queries at a time, whose scores are made again in the backward pass, so that no T x T scores are ever kept.

    Args:
      query: [B, T, G, R, H]; of the chains at all positions.
      first: of depth 1.
      later: of the depths after it up to the query's own.
      segment_ids: [B, T]; chains see the depth 1 of their own document.
    """
    length, per_query = query.shape[1], query.shape[2] * query.shape[3] * query.shape[1]
    blocks = -(-length // max(1, _SCORES // per_query))
    size = -(-length // blocks)
    # The last block is filled up with queries that see their own chain alone.
    filled = [(0, 0), (0, size * blocks - length)]

    def fill(values: Array) -> Array:
        return jnp.pad(values, filled + [(0, 0)] * (values.ndim - 2))

    queries, segments, chains = fill(query), fill(segment_ids), jax.tree.map(fill, later)

    @jax.checkpoint
    def of_some(start: Int[Array, ""]) -> GroupedQuery:
        def cut(values: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(values, start, size, 1)

        places = start + jnp.arange(size)
        causal_TxS = places[:, None] >= jnp.arange(length)[None, :]
        seen_BxTxS = causal_TxS[None] & (cut(segments)[:, :, None] == segment_ids[:, None, :])
        return _attend(cut(queries), first, jax.tree.map(cut, chains), seen_BxTxS)

    if blocks == 1:
        return of_some(jnp.zeros((), jnp.int32))
    parts = jax.lax.map(of_some, jnp.arange(0, size * blocks, size))  # [blocks, B, size, G, R, H]
    whole = jnp.moveaxis(parts, 0, 1).reshape(query.shape[0], size * blocks, *query.shape[2:])
    return whole[:, :length]


def _attend(
    query: GroupedQuery, first: tuple[AllKeys, AllKeys], own: tuple[Entries, ...], seen: AttentionMask
) -> GroupedQuery:
    """One softmax over [S] entries of depth 1 and the few of the chain."""
    (keys, values), length = first, first[0].shape[1]
    query = query * query.shape[-1] ** -0.5
    # Scores of depth 1, and behind them one for each depth of the chain.
    scores = jnp.einsum("btgrh,bsgh->bgrts", query, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None, None], scores, -math.inf)
    of_chain = [jnp.einsum("btgrh,btgh->bgrt", query, key, preferred_element_type=jnp.float32) for key, _ in own]
    weights = jax.nn.softmax(jnp.concatenate([scores, jnp.stack(of_chain, axis=-1)], axis=-1), axis=-1)
    weights = weights.astype(values.dtype)
    # The mixture of both.
    mixed = jnp.einsum("bgrts,bsgh->btgrh", weights[..., :length], values, preferred_element_type=jnp.float32)
    for depth, (_, value) in enumerate(own):
        of_depth = jnp.moveaxis(weights[..., length + depth], 3, 1)  # [B, T, G, R]
        mixed += of_depth[..., None].astype(jnp.float32) * value[:, :, :, None].astype(jnp.float32)
    return mixed.astype(values.dtype)
