"""The heads draft: each reads the state of the one before and the token that it drafted.

A head's cache must hold what training would have put there: entries made from confirmed tokens. Head j at position i
looks ahead to t_{i+j}, so that its newest entries are made from drafts, and some of those will be rejected. Nothing is
taken back. Every head that drafts is run over a window of its newest positions, again from kept states h^0:

    fixed draft length      the last K+1 positions: a round confirms at most K+1 tokens, and an entry of head j is
                            made from drafts in the last j-1 positions only
    adaptive draft length   the last 3K+1: heads that a round does not reach fall behind, and all of them are run
                            before one of their entries that is wrong or missing can leave the window
    others draft, too       the last 2K: a round may confirm K tokens more of which none is what the heads drafted

Heads with one cache for all depths have a drafter of their own, ``drafters.chain``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.decoding.drafters.chain import ChainHeads
from mtpd_jax.decoding.drafters.drafter import Drafter, Drafts, Window, by_head, drafting, moved
from mtpd_jax.decoding.network import DecodingParameters, Network, over_layers
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.rows import Rows, read
from mtpd_jax.decoding.sampling import choose, fold, probability_of
from mtpd_jax.model.cache import Caches, KVCache
from mtpd_jax.shapes import Array, Bool, Float, Hidden, Int


@struct.dataclass
class HeadState:
    """What the heads keep from round to round.

    Attributes:
      caches: of every depth, holding positions up to n-2 with n confirmed tokens; slots are shifted by the window's
        width, for it may begin before a short prompt does.
      window: [B, W, D]; h^0 at positions n-1-W … n-2, zero before the beginning.
      behind: [B]; tokens confirmed since the last depth was run.
    """

    caches: Caches
    window: Window
    behind: Int[Array, " B"]


class Heads(Drafter, name="heads"):
    """The model's own heads, a cascade or a recurrent one.

    Args:
      network, options: see ``Drafter``.
      alone: whether nobody else's drafts are ever confirmed.
    """

    needs_heads = True
    adapts = True

    @classmethod
    def of(cls, network: Network, options: Options, alone: bool = True) -> Drafter:
        return ChainHeads(network, options) if network.shares_cache else cls(network, options, alone)

    def __init__(self, network: Network, options: Options, alone: bool = True):
        super().__init__(network, options)
        drafts = options.num_drafts
        self.window = 3 * drafts + 1 if options.adaptive else drafts + 1 if alone else 2 * drafts

    def start(self, batch: int, slots: int) -> HeadState:
        network, depths = self.network, self.options.num_drafts
        window = jnp.zeros((batch, self.window, network.config.width), network.dtype)
        behind = jnp.ones(batch, jnp.int32)  # the token that comes out of the prompt
        return HeadState(network.empty_head_caches(batch, slots + self.window, depths), window, behind)

    def read(
        self, parameters: DecodingParameters, state: HeadState, rows: Rows, first: Int[Array, " B"], hidden: Hidden
    ) -> HeadState:
        count = hidden.shape[1]

        def run_head(depth: Any, below: Hidden, cache: KVCache) -> tuple[Hidden, KVCache, None]:
            # The heads look ahead into the next chunk.
            ahead = read(rows.tokens, first + depth + 1, count)
            below, _, cache = self.network.run_head(parameters, depth, below, ahead, first, cache, margin=self.window)
            return below, cache, None

        _, caches, _ = over_layers(run_head, hidden, state.caches, self.options.num_drafts)
        return HeadState(caches, moved(state.window, hidden, jnp.clip(rows.length - first, 0, count)), state.behind)

    def draft(
        self, parameters: DecodingParameters, rows: Rows, state: HeadState, keys: Array
    ) -> tuple[Drafts, HeadState]:
        """Drafts tokens for every row, refreshing the heads' caches over the window on the way."""
        if self.options.adaptive:
            return self._draft_while_confident(parameters, rows, state, keys)
        ahead = read(rows.tokens, rows.length - self.window, self.window)
        depths = self.options.num_drafts
        # Depth after depth: each head over the whole window, its draft from the last position.
        _, caches, outputs = over_layers(
            self._one_depth(parameters, rows, keys), (state.window, ahead), state.caches, depths
        )
        # From depths first to rows first.
        tokens, logits, distributions = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), outputs)
        count = jnp.full(rows.length.shape, depths)
        drafts = Drafts(tokens, count, by_head(tokens), distributions, logits)
        return drafts, dataclasses.replace(state, caches=caches)

    def confirm(self, state: HeadState, before: Rows, after: Rows, hidden: Hidden) -> HeadState:
        confirmed = after.length - before.length
        return HeadState(state.caches, moved(state.window, hidden, confirmed), state.behind + confirmed)

    def _one_depth(self, parameters: DecodingParameters, rows: Rows, keys: Array) -> Callable[..., Any]:
        """Returns ``body(depth, (state, ahead), cache)`` for ``over_layers``: one head's pass and its draft."""
        first, network, window = rows.length - 1 - self.window, self.network, self.window

        def body(
            depth: Any, carry: tuple[Hidden, Array], cache: KVCache
        ) -> tuple[tuple[Hidden, Array], KVCache, tuple[Array, Array, Array | None]]:
            state, ahead = carry
            state, normed, cache = network.run_head(parameters, depth, state, ahead, first, cache, margin=window)
            logits = network.logits(parameters, normed[:, -1])
            # A key of its own for each depth.
            draft, distribution = choose(fold(keys, depth + 1), logits, self.options.sampling.of_drafts)
            # The next depth looks one token further.
            ahead = jnp.concatenate([ahead[:, 1:], draft[:, None]], axis=1)
            return (state, ahead), cache, (draft, logits, distribution)

        return body

    def _draft_while_confident(
        self, parameters: DecodingParameters, rows: Rows, heads: HeadState, keys: Array
    ) -> tuple[Drafts, HeadState]:
        """Runs depth after depth while any row is confident of its drafts.

        Deeper heads than the last one run fall behind. At a run, an entry of head j that is missing or made of rejected
        drafts lies at most ``behind + j - 1`` positions back; a round without the last head adds at most K tokens. So
        the window covers the next run if now ``behind + 2K - 1 <= W``, and else all depths run in this round.
        """
        options, batch, most = self.options, rows.length.shape[0], self.options.num_drafts
        assert isinstance(heads.caches, KVCache)  # a stack, for it is not known which heads run
        one_depth = self._one_depth(parameters, rows, keys)
        ahead = read(rows.tokens, rows.length - self.window, self.window)
        working = drafting(rows, options)
        due = jnp.any(working & (heads.behind > self.window - 2 * most + 1))

        def goes_on(now: _Round) -> Bool[Array, ""]:
            confident = jnp.any(working & (now.confidence >= options.min_confidence))
            return (now.depth < most) & ((now.depth == 0) | due | confident)

        def step(now: _Round) -> _Round:
            (state, ahead), caches, output = one_depth(now.depth, (now.state, now.ahead), now.caches.use(now.depth))
            # Rows that are not confident any more come along, and keep what they have.
            wanted = (now.depth == 0) | (now.confidence >= options.min_confidence)
            confidence = now.confidence * probability_of(*output)
            return _Round(
                depth=now.depth + 1,
                state=state,
                ahead=ahead,
                caches=caches.use(None),
                outputs=jax.tree.map(lambda made, new: made.at[:, now.depth].set(new), now.outputs, output),
                confidence=jnp.where(wanted, confidence, 0.0),
                count=now.count + wanted,
            )

        # Room for what every depth makes, whether it is run or not.
        first_depth = jnp.zeros((), jnp.int32)
        caches = heads.caches
        shapes = jax.eval_shape(lambda: one_depth(0, (heads.window, ahead), caches.use(first_depth))[2])
        outputs = jax.tree.map(lambda leaf: jnp.zeros((batch, most, *leaf.shape[1:]), leaf.dtype), shapes)
        start = _Round(
            depth=first_depth, state=heads.window, ahead=ahead, caches=caches, outputs=outputs,
            confidence=jnp.ones(batch), count=jnp.zeros(batch, jnp.int32),
        )  # fmt: skip
        end = jax.lax.while_loop(goes_on, step, start)
        behind = jnp.where(end.depth == most, 0, heads.behind)
        tokens, logits, distributions = end.outputs
        drafts = Drafts(tokens, end.count, by_head(tokens), distributions, logits)
        return drafts, HeadState(end.caches, heads.window, behind)


@struct.dataclass
class _Round:
    """An adaptive round on its way: the next depth, its inputs, and what was drafted so far, depth by depth."""

    depth: Int[Array, ""]
    state: Window
    ahead: Int[Array, "B W"]
    caches: KVCache
    outputs: tuple[Array, Array, Array | None]
    confidence: Float[Array, " B"]
    count: Int[Array, " B"]
