"""Heads with one cache draft: a chain on top of entries that were made from the backbone's states.

With n confirmed tokens, depth 1 is run over the window of the newest positions, the last of which is n-2, again from
kept states h^0. Its entry at position i is made of h^0_i and t_{i+1}, so that all of them are confirmed, and those that
the chain before left in their slots are overwritten. Depth k of the new chain is one more token, at position n-2+k-1.
A round confirms at most K+1 tokens: so many positions are in the window, whoever else drafts, and however short the
chain was. It is the recomputed cache of "Evolving LLMs from Next-Token Prediction to MTP" (Electronics 15(7):1533).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.decoding.drafters.drafter import Drafter, Drafts, Window, by_head, drafting, moved
from mtpd_jax.decoding.network import DecodingParameters, Network
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.rows import Rows, read
from mtpd_jax.decoding.sampling import choose, fold, probability_of
from mtpd_jax.model.cache import KVCache
from mtpd_jax.shapes import Array, Bool, Float, Hidden, Int

# What a depth made: its draft, logits, and the distribution that the draft was drawn from.
Made = tuple[Array, Array, Array | None]


@struct.dataclass
class ChainState:
    """What is kept from round to round.

    Attributes:
      cache: of all depths, holding depth 1 of positions up to n-2 with n confirmed tokens, and behind them what is left
        of a chain; slots are shifted by the window's width, for it may begin before a short prompt does.
      window: [B, W, D]; h^0 at positions n-1-W … n-2, zero before the beginning.
    """

    cache: KVCache
    window: Window


@struct.dataclass
class _Chain:
    """A chain on its way: the next depth and its state, and what was drafted so far, depth by depth."""

    depth: Int[Array, ""]
    state: Float[Array, "B 1 D"]
    cache: KVCache
    made: Made
    confidence: Float[Array, " B"]
    count: Int[Array, " B"]


class ChainHeads(Drafter):
    """One module that drafts token after token against one cache."""

    needs_heads = True
    adapts = True

    def __init__(self, network: Network, options: Options):
        super().__init__(network, options)
        self.window = options.num_drafts + 1

    def start(self, batch: int, slots: int) -> ChainState:
        cache = self.network.empty_head_caches(batch, slots + self.window, self.options.num_drafts)
        assert isinstance(cache, KVCache)  # which all depths share
        return ChainState(cache, jnp.zeros((batch, self.window, self.network.config.width), self.network.dtype))

    def read(
        self, parameters: DecodingParameters, state: ChainState, rows: Rows, first: Int[Array, " B"], hidden: Hidden
    ) -> ChainState:
        count = hidden.shape[1]
        ahead = read(rows.tokens, first + 1, count)
        _, _, cache = self.network.run_head(parameters, 0, hidden, ahead, first, state.cache, margin=self.window)
        return ChainState(cache, moved(state.window, hidden, jnp.clip(rows.length - first, 0, count)))

    def draft(
        self, parameters: DecodingParameters, rows: Rows, state: ChainState, keys: Array
    ) -> tuple[Drafts, ChainState]:
        """Drafts tokens for every row, making depth 1 of the newest positions anew on the way."""
        most, adaptive = self.options.num_drafts, self.options.adaptive
        working, confident = drafting(rows, self.options), self.options.min_confidence

        def run(depth: Array | int, below: Hidden, ahead: Array, first: Array, cache: KVCache) -> tuple[Any, ...]:
            below, normed, cache = self.network.run_head(parameters, 0, below, ahead, first, cache, self.window)
            logits = self.network.logits(parameters, normed[:, -1])
            # A key of its own for each depth.
            draft, distribution = choose(fold(keys, depth + 1), logits, self.options.sampling.of_drafts)
            return below[:, -1:], cache, (draft, logits, distribution)

        # Depth 1, over the window; its newest position begins the chain.
        ahead = read(rows.tokens, rows.length - self.window, self.window)
        newest, cache, first = run(0, state.window, ahead, rows.length - 1 - self.window, state.cache)
        made = jax.tree.map(lambda leaf: jnp.zeros((leaf.shape[0], most, *leaf.shape[1:]), leaf.dtype), first)
        one = jnp.ones_like(rows.length)
        start = _Chain(one[0], newest, cache, _put(made, first, 0), probability_of(*first), one)

        def goes_on(now: _Chain) -> Bool[Array, ""]:
            wanted = jnp.any(working & (now.confidence >= confident)) if adaptive else True
            return (now.depth < most) & wanted

        def step(now: _Chain) -> _Chain:
            draft = jax.lax.dynamic_index_in_dim(now.made[0], now.depth - 1, axis=1)
            below, cache, new = run(now.depth, now.state, draft, rows.length - 2 + now.depth, now.cache)
            # Rows that are not confident any more come along, and keep what they have.
            wanted = now.confidence >= confident if adaptive else jnp.ones_like(working)
            confidence = jnp.where(wanted, now.confidence * probability_of(*new), 0.0)
            made = _put(now.made, new, now.depth)
            return _Chain(now.depth + 1, below, cache, made, confidence, now.count + wanted)

        end = jax.lax.while_loop(goes_on, step, start)
        tokens, logits, distributions = end.made
        drafts = Drafts(tokens, end.count, by_head(tokens), distributions, logits)
        return drafts, dataclasses.replace(state, cache=end.cache)

    def confirm(self, state: ChainState, before: Rows, after: Rows, hidden: Hidden) -> ChainState:
        return ChainState(state.cache, moved(state.window, hidden, after.length - before.length))


def _put(made: Made, new: Made, depth: Array | int) -> Made:
    """What was made so far, [B, K, …], with what one depth made in its place."""
    return jax.tree.map(lambda whole, part: whole.at[:, depth].set(part), made, new)
