"""Self-speculative decoding: the heads draft K tokens, one pass of the backbone verifies them, nothing is lost.

One round, with n confirmed tokens t_0…t_{n-1}, of which the backbone has read all but the last:

    draft    at position n-2, head 1 reads h^0 and t_{n-1} and drafts t_n; head 2 reads h^1 and that draft; …
    verify   the backbone reads t_{n-1} and the K drafts in one pass, and says for each what it would have written
    accept   the longest run of drafts that it agrees with, and one token of its own after them

Nothing is rolled back. A pass writes its keys and values at its tokens' positions, and so overwrites those of
rejected drafts before anything can attend to them. The heads are run over the last K+1 positions each round, from kept
states h^0: with that, whatever was accepted, every entry of every head's cache comes from confirmed tokens, as in
training, except for the newest positions, whose look-ahead tokens are the drafts themselves.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.decoding.plain import (
    Rows,
    append,
    decoding_parameters,
    jit_at_precision,
    logits_of,
    prefill,
    read,
    write,
)
from mtpd_jax.decoding.sampling import Sampling, accept_drafts, choose, count_leading, fold, probabilities
from mtpd_jax.losses.vocabulary import WHOLE
from mtpd_jax.model.backbone import LanguageModel
from mtpd_jax.model.cache import KVCache, empty_cache, visible
from mtpd_jax.model.heads import Head, head_parameters
from mtpd_jax.model.layers import apply, compute_dtype
from mtpd_jax.shapes import Array, Float, Hidden, Int

# Numbers folded into a row's key, to keep its draws apart: drafts use 1…K.
_VERIFY = 0


@struct.dataclass
class SpeculativeState:
    """What goes from round to round.

    Attributes:
      rows: the texts.
      cache: the backbone's, holding positions up to n-2.
      head_caches: one per head; see ``window``.
      window: [B, K+1, D]; h^0 at positions n-2-K … n-2, zero before the beginning.
    """

    rows: Rows
    cache: KVCache
    head_caches: tuple[KVCache, ...]
    window: Hidden


@struct.dataclass
class Drafts:
    """K drafts per row.

    Attributes:
      tokens: [B, K].
      logits: [B, K, V]; each head's, in float32.
      probabilities: [B, K, V]; what the drafts were drawn from, or None if greedy.
    """

    tokens: Int[Array, "B K"]
    logits: Float[Array, "B K V"]
    probabilities: Float[Array, "B K V"] | None


class Cascade:
    """The first ``num_heads`` heads of a model, run against caches.

    Slots of a head's cache are shifted by a margin of K+1, because the window may begin before a short prompt does.
    """

    def __init__(self, model: LanguageModel, num_heads: int):
        self._model, self._num_heads = model, num_heads
        self._head = Head(model.config, model.heads_config.pass_normed)
        self._margin = num_heads + 1

    def run(
        self,
        parameters: Any,
        depth: int,
        state: Hidden,
        tokens: Int[Array, "B S"],
        first: Int[Array, " B"],
        cache: KVCache,
    ) -> tuple[Hidden, Hidden, KVCache]:
        """Runs head ``depth`` over consecutive positions, from ``first`` [B] on; returns state, normed state, cache."""
        count = state.shape[1]
        positions = first[:, None] + jnp.arange(count)[None, :]
        ahead = read(tokens, first + depth, count)
        embedded = apply(self._model, parameters, ahead, method=self._model.embed)
        weights = head_parameters(parameters["heads"], self._model.heads_config.kind, depth)
        mask = visible(positions, cache.keys.shape[1], self._margin)
        state, (normed, cache) = apply(
            self._head, weights, state, embedded, cache, positions, mask, first + self._margin
        )
        return state, normed, cache

    def prefill(self, parameters: Any, hidden: Hidden, rows: Rows) -> tuple[KVCache, ...]:
        """Fills the heads' caches from the prompts' h^0, [B, P, D]; what looks past a prompt is drafted over later."""
        batch, slots = rows.tokens.shape
        config = self._model.config
        state, first, caches = hidden, jnp.zeros(batch, jnp.int32), []
        for depth in range(1, self._num_heads + 1):
            stack = empty_cache(1, batch, slots + self._margin, config, compute_dtype(config))
            empty = jax.tree.map(lambda array: array[0], stack)
            state, _, cache = self.run(parameters, depth, state, rows.tokens, first, empty)
            caches.append(cache)
        return tuple(caches)

    def draft(
        self, parameters: Any, state: SpeculativeState, keys: Array, sampling: Sampling
    ) -> tuple[Drafts, tuple[KVCache, ...]]:
        """Drafts K tokens per row, refreshing the heads' caches over the window on the way."""
        rows, hidden, tokens = state.rows, state.window, state.rows.tokens
        first = rows.length - 2 - self._num_heads
        drafts, logits, distributions, caches = [], [], [], []
        for depth in range(1, self._num_heads + 1):
            hidden, normed, cache = self.run(parameters, depth, hidden, tokens, first, state.head_caches[depth - 1])
            logits.append(logits_of(normed[:, -1], parameters))
            draft, distribution = choose(fold(keys, depth), logits[-1], sampling)
            tokens = write(tokens, draft[:, None], rows.length + depth - 1)
            drafts.append(draft)
            distributions.append(distribution)
            caches.append(cache)
        drawn_from = None if sampling.greedy else jnp.stack(distributions, axis=1)
        return Drafts(jnp.stack(drafts, axis=1), jnp.stack(logits, axis=1), drawn_from), tuple(caches)


def start_speculation(
    model: LanguageModel, cascade: Cascade, parameters: Any, rows: Rows, cache: KVCache, hidden: Hidden
) -> SpeculativeState:
    """The state before the first round, from what ``prefill`` returned."""
    width = rows.tried.shape[1] + 1
    padded = jnp.pad(hidden, ((0, 0), (width, 0), (0, 0)))
    # The window ends at n-2; with `width` zeros in front, position p has index p + width.
    window = _slice_rows(padded, rows.length - 1, width)
    return SpeculativeState(rows, cache, cascade.prefill(parameters, hidden, rows), window)


def verify(
    model: LanguageModel, parameters: Any, state: SpeculativeState, drafts: Drafts, keys: Array, sampling: Sampling
) -> tuple[Int[Array, "B J"], Int[Array, " B"], KVCache, Hidden]:
    """One pass of the backbone over the last confirmed token and the drafts.

    Returns:
      The candidates (the drafts, with the main head's own token in the place after the last accepted one), how many
      drafts are accepted, the backbone's cache, and h^0 of the pass, [B, K+1, D].
    """
    rows, num_drafts = state.rows, drafts.tokens.shape[1]
    first = rows.length - 1
    inputs = jnp.concatenate([read(rows.tokens, first, 1), drafts.tokens], axis=1)
    positions = first[:, None] + jnp.arange(num_drafts + 1)[None, :]
    mask = visible(positions, rows.tokens.shape[1])
    hidden, cache = apply(model, parameters, inputs, positions, mask, state.cache, first, method=model.extend)
    logits = logits_of(hidden, parameters)
    if drafts.probabilities is None:
        choices = WHOLE.argmax(logits)
        accepted = count_leading(drafts.tokens == choices[:, :-1])
        own = jnp.take_along_axis(choices, accepted[:, None], axis=1)[:, 0]
    else:
        target = probabilities(logits, sampling)
        accepted, own = accept_drafts(fold(keys, _VERIFY), drafts.tokens, drafts.probabilities, target)
    places = jnp.arange(num_drafts + 1)[None, :]
    padded = jnp.pad(drafts.tokens, ((0, 0), (0, 1)))
    return jnp.where(places == accepted[:, None], own[:, None], padded), accepted, cache, hidden


def advance(
    state: SpeculativeState,
    candidates: Int[Array, "B J"],
    accepted: Int[Array, " B"],
    cache: KVCache,
    head_caches: tuple[KVCache, ...],
    hidden: Hidden,
    end_id: int,
) -> SpeculativeState:
    """Appends what was accepted, counts it, and moves the window of h^0 along."""
    rows, width = state.rows, candidates.shape[1]
    # Draft k was tried if those before it stand, none of them ended the text, and there was room for it.
    k = jnp.arange(width - 1)[None, :]
    ended = jnp.cumsum(candidates[:, :-1] == end_id, axis=1) - (candidates[:, :-1] == end_id) > 0
    room = (rows.limit - rows.length)[:, None]
    tried = (k <= accepted[:, None]) & (k < room) & ~ended & ~rows.finished[:, None]
    stands = tried & (k < accepted[:, None])
    counted = dataclasses.replace(
        rows, passes=rows.passes + ~rows.finished, tried=rows.tried + tried, accepted=rows.accepted + stands
    )
    moved = append(counted, candidates, accepted + 1, accepted, end_id)
    both = jnp.concatenate([state.window, hidden], axis=1)
    return SpeculativeState(moved, cache, head_caches, _slice_rows(both, moved.length - rows.length, width))


def make_speculative(
    model: LanguageModel, *, num_heads: int, max_new_tokens: int, end_id: int, sampling: Sampling
) -> Any:
    """Returns the jitted loop (parameters, prompts [B, P], lengths [B], keys [B]) -> ``Rows``.

    Greedy output equals plain decoding's up to rounding; sampled output has plain decoding's distribution.
    """
    cascade = Cascade(model, num_heads)

    def decode(parameters: Any, prompts: Array, lengths: Array, keys: Array) -> Rows:
        parameters = decoding_parameters(model, parameters)
        rows, cache, hidden = prefill(
            model, parameters, prompts, lengths, keys,
            num_heads=num_heads, max_new_tokens=max_new_tokens, end_id=end_id, sampling=sampling,
        )  # fmt: skip

        def unfinished(state: SpeculativeState) -> Array:
            return ~jnp.all(state.rows.finished)

        def one_round(state: SpeculativeState) -> SpeculativeState:
            round_keys = fold(keys, state.rows.length)
            drafts, head_caches = cascade.draft(parameters, state, round_keys, sampling)
            candidates, accepted, cache, hidden = verify(model, parameters, state, drafts, round_keys, sampling)
            return advance(state, candidates, accepted, cache, head_caches, hidden, end_id)

        state = start_speculation(model, cascade, parameters, rows, cache, hidden)
        return jax.lax.while_loop(unfinished, one_round, state).rows

    return jit_at_precision(model, decode)


def _slice_rows(values: Float[Array, "B S D"], start: Int[Array, " B"], count: int) -> Float[Array, "B T D"]:
    """Takes ``count`` positions of each row from its own place on."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, count))(values, start)
