"""Self-speculative decoding: K tokens are drafted, one pass of the backbone verifies them, nothing is lost.

One round, with n confirmed tokens t_0…t_{n-1}, of which the backbone has read all but the last:

    draft    whoever drafts (``decoding.drafters``) proposes t_n, t_{n+1}, …; of the heads, head 1 reads at position n-2
             h^0 and t_{n-1}, head 2 reads h^1 and the draft of head 1, …
    verify   the backbone reads t_{n-1} and the K drafts in one pass, and says for each what it would have written
    accept   the longest run of drafts that it agrees with, and one token of its own after them

Nothing is rolled back. A pass writes its keys and values at its tokens' positions, and so overwrites those of
rejected drafts before anything can attend to them; for the heads' caches see ``drafters.heads``. With K = 0 this is
plain decoding, one token per pass.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.decoding.drafters.drafter import DRAFTERS, Drafts, drafter_of, drafting
from mtpd_jax.decoding.network import DecodingParameters, Network
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.rows import Rows, read
from mtpd_jax.decoding.sampling import accept_drafts, count_leading, fold, probabilities
from mtpd_jax.decoding.stops import Stops
from mtpd_jax.decoding.strategies.strategy import Strategy
from mtpd_jax.model.cache import Caches
from mtpd_jax.shapes import Array, Hidden, Int
from mtpd_jax.sharding import WHOLE

# Numbers folded into a row's key, to keep its draws apart: drafts use 1…K.
_VERIFY = 0


@struct.dataclass
class SpeculativeState:
    """What goes from round to round.

    Attributes:
      cache: the backbone's, holding positions up to n-2.
      drafter: what the drafter keeps.
    """

    cache: Caches
    drafter: Any


class Speculative(Strategy, name="speculative"):
    """Draft, verify, accept. Greedy text is plain decoding's up to rounding; sampled text has its distribution."""

    lossless = True

    def __init__(self, network: Network, options: Options):
        super().__init__(network, options)
        self.drafter = drafter_of(network, options)
        drafts_ever = options.num_drafts and DRAFTERS[options.drafter].needs_heads
        self._until = options.draft_until if drafts_ever else None

    def start(self, batch: int, slots: int) -> SpeculativeState:
        return SpeculativeState(self.network.empty_cache(batch, slots), self.drafter.start(batch, slots))

    def read(
        self, parameters: DecodingParameters, rows: Rows, state: SpeculativeState, first: Int[Array, " B"], count: int
    ) -> tuple[Hidden, SpeculativeState]:
        hidden, cache = self.network.extend(parameters, read(rows.tokens, first, count), first, state.cache)
        drafter = self.drafter.read(parameters, state.drafter, rows, first, hidden)
        return hidden, SpeculativeState(cache, drafter)

    def round(
        self, parameters: DecodingParameters, rows: Rows, state: SpeculativeState, keys: Array, stops: Stops
    ) -> tuple[Rows, SpeculativeState]:
        def speculate() -> tuple[Rows, SpeculativeState]:
            return self.play(parameters, rows, state, keys, stops)[2:]

        # Texts that may come to where nobody drafts: a pass over one token, once all that are written are there.
        if self._until is None or self._until >= rows.tokens.shape[1]:
            return speculate()
        return jax.lax.cond(
            jnp.any(drafting(rows, self.options)),
            speculate,
            lambda: self._plain_round(parameters, rows, state, keys, stops),
        )

    def _plain_round(
        self, parameters: DecodingParameters, rows: Rows, state: SpeculativeState, keys: Array, stops: Stops
    ) -> tuple[Rows, SpeculativeState]:
        """A round without drafts. What drafts is not kept up: these rows never draft again."""
        plain = dataclasses.replace(self.options, num_drafts=0)
        nothing = jnp.zeros((rows.length.shape[0], 0), jnp.int32)
        drafts = Drafts(nothing, rows.length * 0, nothing)
        candidates, accepted, cache, _ = Speculative(self.network, plain).verify(
            parameters, rows, state.cache, drafts, keys
        )
        return accept(rows, drafts, candidates, accepted, stops), dataclasses.replace(state, cache=cache)

    def play(
        self, parameters: DecodingParameters, rows: Rows, state: SpeculativeState, keys: Array, stops: Stops
    ) -> tuple[Drafts, Int[Array, " B"], Rows, SpeculativeState]:
        """A round, and what went on in it: the drafts, how many of them were accepted, and what ``round`` returns."""
        # Profiles show a round by these names.
        with jax.named_scope("draft"):
            drafts, drafter = self.drafter.draft(parameters, rows, state.drafter, keys)
            if self._until is not None:
                drafts = dataclasses.replace(drafts, count=jnp.where(drafting(rows, self.options), drafts.count, 0))
        with jax.named_scope("verify"):
            candidates, accepted, cache, hidden = self.verify(parameters, rows, state.cache, drafts, keys)
        with jax.named_scope("accept"):
            after = accept(rows, drafts, candidates, accepted, stops)
        return drafts, accepted, after, SpeculativeState(cache, self.drafter.confirm(drafter, rows, after, hidden))

    def verify(
        self, parameters: DecodingParameters, rows: Rows, cache: Caches, drafts: Drafts, keys: Array
    ) -> tuple[Int[Array, "B J"], Int[Array, " B"], Caches, Hidden]:
        """One pass of the backbone over the last confirmed token and the drafts.

        Returns:
          The candidates (the drafts, with the main head's own token in the place after the last accepted one), how many
          drafts are accepted, the backbone's cache, and h^0 of the pass, [B, K+1, D], or of all that it read.
        """
        options, num_drafts, first = self.options, self.options.num_drafts, rows.length - 1
        # One pass over the last confirmed token and the drafts, padded if passes share a width.
        inputs = self.drafter.inputs(read(rows.tokens, first, 1), drafts)
        padded = jnp.pad(inputs, ((0, 0), (0, options.width - inputs.shape[1])))
        hidden, cache = self.network.extend(parameters, padded, first, cache)
        # Logits of what verifies; where one width is asked for, of all that was read, for these are kernels, too.
        verifying = hidden[:, : num_drafts + 1] if options.pass_width is None else hidden
        logits = self.network.logits(parameters, verifying)[:, : num_drafts + 1]
        # How many drafts stand, and the main head's own token after them.
        if options.sampling.greedy:
            choices = WHOLE.argmax(logits)
            made = jnp.arange(num_drafts)[None, :] < drafts.count[:, None]
            accepted = count_leading((drafts.tokens == choices[:, :-1]) & made)
            own = jnp.take_along_axis(choices, accepted[:, None], axis=1)[:, 0]
        else:
            target, keys = probabilities(logits, options.sampling), fold(keys, _VERIFY)
            accepted, own = accept_drafts(keys, drafts.tokens, drafts.count, drafts.probabilities, target)
        # The drafts, with its own token in the place of the first that fell.
        places = jnp.arange(num_drafts + 1)[None, :]
        candidates = jnp.where(places == accepted[:, None], own[:, None], jnp.pad(drafts.tokens, ((0, 0), (0, 1))))
        return candidates, accepted, cache, hidden[:, : inputs.shape[1]]


def accept(rows: Rows, drafts: Drafts, candidates: Int[Array, "B J"], accepted: Int[Array, " B"], stops: Stops) -> Rows:
    """Appends what was accepted, and counts it."""
    # Draft k was tried if those before it stand, none of them ended the text, and there was room for it.
    k = jnp.arange(candidates.shape[1] - 1)[None, :]
    ends, _ = stops.find(candidates[:, :-1], rows.matched)
    ended_before = jnp.cumsum(ends, axis=1) - ends > 0
    room = jnp.minimum(drafts.count, rows.limit - rows.length)[:, None]
    tried = (k <= accepted[:, None]) & (k < room) & ~ended_before & ~rows.finished[:, None]
    # A round of fewer drafts than the rows count has none of the others.
    missing, place = rows.tried.shape[-1] - tried.shape[1], rows.place
    tried_BxK = jnp.pad(tried, ((0, 0), (0, missing)))
    accepted_BxK = jnp.pad(tried & (k < accepted[:, None]), ((0, 0), (0, missing)))
    counted = dataclasses.replace(
        rows,
        passes=rows.passes + place * ~rows.finished[:, None],
        tried=rows.tried + place[:, :, None] * tried_BxK[:, None],
        accepted=rows.accepted + place[:, :, None] * accepted_BxK[:, None],
    )
    # The main head's own token is nobody's draft.
    proposers = jnp.pad(jnp.where(k < accepted[:, None], drafts.proposers, 0), ((0, 0), (0, 1)))
    return counted.append(candidates, accepted + 1, proposers, stops)
