"""The heads draft: each reads the state of the one before and the token that it drafted.

A head's cache must hold what training would have put there: entries made from confirmed tokens. Head j at position i
looks ahead to t_{i+j}, so that its newest entries are made from drafts, and some of those will be rejected. Nothing is
taken back. Every head that drafts is run over a window of its newest positions, again from kept states h^0:

    fixed draft length      the last K+1 positions: a round confirms at most K+1 tokens, and an entry of head j is
                            made from drafts in the last j-1 positions only
    adaptive draft length   the last 3K+1: heads that a round does not reach fall behind, and all of them are run
                            before one of their entries that is wrong or missing can leave the window
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.decoding.network import DecodingParameters, Network, over_layers
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.rows import Rows, read
from mtpd_jax.decoding.sampling import choose, fold, probability_of
from mtpd_jax.shapes import AnyArray, Array, Bool, Float, Hidden, Int


@struct.dataclass
class HeadState:
    """What the heads keep from round to round.

    Attributes:
      caches: of every depth, holding positions up to n-2 with n confirmed tokens; slots are shifted by the window's
        width, for it may begin before a short prompt does.
      window: [B, W, D]; h^0 at positions n-1-W … n-2, zero before the beginning.
      behind: [B]; tokens confirmed since the last depth was run.
    """

    caches: Any
    window: Hidden
    behind: Int[Array, " B"]


@struct.dataclass
class Drafts:
    """Up to K drafts per row.

    Attributes:
      tokens: [B, K].
      count: [B]; how many of them stand to be verified.
      logits: [B, K, V]; each depth's, in float32.
      probabilities: [B, K, V]; what the drafts were drawn from, or None if they are the likeliest tokens.
    """

    tokens: Int[AnyArray, "B K"]
    count: Int[AnyArray, " B"]
    logits: Float[AnyArray, "B K V"]
    probabilities: Float[AnyArray, "B K V"] | None


def run_depth(network: Network, parameters: DecodingParameters, rows: Rows, keys: Array, options: Options) -> Any:
    """Returns ``body(depth, (state, ahead), cache)`` for ``over_layers``: one head over the window, and its draft."""
    first = rows.length - 1 - options.window

    def body(depth: Any, carry: tuple[Hidden, Array], cache: Any) -> tuple[tuple[Hidden, Array], Any, Any]:
        state, ahead = carry
        state, normed, cache = network.run_head(parameters, depth, state, ahead, first, cache, margin=options.window)
        logits = network.logits(parameters, normed[:, -1])
        draft, distribution = choose(fold(keys, depth + 1), logits, options.sampling.of_drafts)
        # The next depth looks one token further.
        ahead = jnp.concatenate([ahead[:, 1:], draft[:, None]], axis=1)
        return (state, ahead), cache, (draft, logits, distribution)

    return body


def draft(
    network: Network, parameters: DecodingParameters, rows: Rows, heads: HeadState, keys: Array, options: Options
) -> tuple[Drafts, HeadState]:
    """Drafts tokens for every row, refreshing the heads' caches over the window on the way."""
    if not options.num_heads:
        nothing = jnp.zeros((rows.length.shape[0], 0), jnp.int32)
        vocabulary = parameters.unembedding.shape[1]
        return Drafts(nothing, rows.length * 0, jnp.zeros((*nothing.shape, vocabulary)), None), heads
    if options.adaptive:
        return _draft_while_confident(network, parameters, rows, heads, keys, options)
    ahead = read(rows.tokens, rows.length - options.window, options.window)
    body = run_depth(network, parameters, rows, keys, options)
    _, caches, (tokens, logits, distributions) = over_layers(
        body, (heads.window, ahead), heads.caches, options.num_heads
    )
    by_row = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), (tokens, logits, distributions))
    count = jnp.full(rows.length.shape, options.num_heads)
    return Drafts(by_row[0], count, *by_row[1:]), dataclasses.replace(heads, caches=caches)


@struct.dataclass
class _Round:
    """An adaptive round on its way: the next depth, its inputs, and what was drafted so far, depth by depth."""

    depth: Int[Array, ""]
    state: Hidden
    ahead: Int[Array, "B T"]
    caches: Any
    outputs: Any
    confidence: Float[Array, " B"]
    count: Int[Array, " B"]


def _draft_while_confident(
    network: Network, parameters: DecodingParameters, rows: Rows, heads: HeadState, keys: Array, options: Options
) -> tuple[Drafts, HeadState]:
    """Runs depth after depth while any row is confident of its drafts.

    Deeper heads than the last one run fall behind. At a run, an entry of head j that is missing or made of rejected
    drafts lies at most ``behind + j - 1`` positions back; a round without the last head adds at most K tokens. So the
    window covers the next run if now ``behind + 2K - 1 <= W``, and else all depths run in this round.
    """
    batch, most = rows.length.shape[0], options.num_heads
    one_depth = run_depth(network, parameters, rows, keys, options)
    ahead = read(rows.tokens, rows.length - options.window, options.window)
    working = ~rows.finished
    due = jnp.any(working & (heads.behind > options.window - 2 * most + 1))

    def goes_on(now: _Round) -> Bool[Array, ""]:
        confident = jnp.any(working & (now.confidence >= options.min_confidence))
        return (now.depth < most) & ((now.depth == 0) | due | confident)

    def step(now: _Round) -> _Round:
        (state, ahead), caches, output = one_depth(now.depth, (now.state, now.ahead), now.caches.use(now.depth))
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

    shapes = jax.eval_shape(lambda: one_depth(0, (heads.window, ahead), heads.caches.use(jnp.zeros((), jnp.int32)))[2])
    outputs = jax.tree.map(lambda leaf: jnp.zeros((batch, most, *leaf.shape[1:]), leaf.dtype), shapes)
    start = _Round(
        depth=jnp.zeros((), jnp.int32), state=heads.window, ahead=ahead, caches=heads.caches, outputs=outputs,
        confidence=jnp.ones(batch), count=jnp.zeros(batch, jnp.int32),
    )  # fmt: skip
    end = jax.lax.while_loop(goes_on, step, start)
    behind = jnp.where(end.depth == most, 0, heads.behind)
    tokens, logits, distributions = end.outputs
    return Drafts(tokens, end.count, logits, distributions), HeadState(end.caches, heads.window, behind)
