"""Heads and prompt lookup together: each drafts, and the one whose drafts would have stood longer of late is verified.

What each would have brought is known afterwards, whoever's draft was verified: it is held to the text that was
confirmed. So the choice depends on text alone, and sampled text stays distributed as plain decoding's. Our choice.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.decoding.drafters.drafter import COPIED, Drafter, Drafts
from mtpd_jax.decoding.drafters.heads import Heads
from mtpd_jax.decoding.drafters.lookup import look_up
from mtpd_jax.decoding.network import DecodingParameters, Network
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.rows import Rows, read
from mtpd_jax.decoding.sampling import count_leading
from mtpd_jax.shapes import Array, Float, Hidden, Int

# The share of the newest round in a record. Our choice.
_NEWEST = 0.25


@struct.dataclass
class BothState:
    """What is kept from round to round.

    Attributes:
      heads: the heads' own.
      drafts: [B, 2, K]; what the heads and the lookup drafted last.
      record: [B, 2]; drafts per round that would have stood, of the heads and of the lookup, the newest counting most.
    """

    heads: Any
    drafts: Int[Array, "B 2 K"]
    record: Float[Array, "B 2"]


class Both(Drafter, name="both"):
    """The better of two drafts, row by row."""

    needs_heads = True

    def __init__(self, network: Network, options: Options):
        super().__init__(network, options)
        self._heads = Heads.of(network, options, alone=False)

    def start(self, batch: int, slots: int) -> BothState:
        drafts = jnp.zeros((batch, 2, self.options.num_drafts), jnp.int32)
        return BothState(self._heads.start(batch, slots), drafts, jnp.zeros((batch, 2)))

    def read(
        self, parameters: DecodingParameters, state: BothState, rows: Rows, first: Int[Array, " B"], hidden: Hidden
    ) -> BothState:
        return dataclasses.replace(state, heads=self._heads.read(parameters, state.heads, rows, first, hidden))

    def draft(
        self, parameters: DecodingParameters, rows: Rows, state: BothState, keys: Array
    ) -> tuple[Drafts, BothState]:
        # Both draft, whoever is verified.
        of_heads, heads = self._heads.draft(parameters, rows, state.heads, keys)
        copied, found = look_up(rows.tokens, rows.length, self.options.num_drafts)
        copies_B = found & (state.record[:, 1] >= state.record[:, 0])
        copies_Bx1 = copies_B[:, None]
        # What is copied is certain; what heads drew is not.
        probabilities = of_heads.probabilities
        if probabilities is not None:
            certain = jax.nn.one_hot(copied, probabilities.shape[-1])
            probabilities = jnp.where(copies_B[:, None, None], certain, probabilities)
        drafts = Drafts(
            tokens=jnp.where(copies_Bx1, copied, of_heads.tokens),
            count=of_heads.count,
            proposers=jnp.where(copies_Bx1, COPIED, of_heads.proposers),
            probabilities=probabilities,
            logits=of_heads.logits,
        )
        # A lookup that found nothing would not have stood.
        kept = jnp.stack([of_heads.tokens, jnp.where(found[:, None], copied, -1)], axis=1)
        return drafts, BothState(heads, kept, state.record)

    def confirm(self, state: BothState, before: Rows, after: Rows, hidden: Hidden) -> BothState:
        heads = self._heads.confirm(state.heads, before, after, hidden)
        count = self.options.num_drafts
        # How far each draft agrees with what was written.
        confirmed = (after.length - before.length)[:, None]
        written = jnp.where(jnp.arange(count)[None] < confirmed, read(after.tokens, before.length, count), -2)
        stood = jnp.stack([count_leading(state.drafts[:, side] == written) for side in range(2)], axis=1)
        record = state.record + _NEWEST * (stood - state.record)
        return BothState(heads, state.drafts, record)
