"""Mask tokens after the text: a model that was trained to fill them in drafts for itself, with no heads and no passes.

Every pass reads the last confirmed token, the drafts, and K masks after those that were made. The masks say what may
come after all of that and one token more: if all drafts stand, and the model has added its own token, the next drafts
are there, and have cost nothing but their places in the pass. If one falls, the masks stood behind a text that is not
written, and the next pass has none to verify.

    pass      t  d1 d2  m  m  m      both drafts stand, and g is written after them: the masks' tokens follow g
    pass      g  d1 d2 d3  m  m  m   d2 falls: its place is the model's, and the masks stood behind d3
    pass      t  m  m  m             one token, and the next drafts

Our choice; arXiv 2602.06019 names verification by the model itself as future work.
"""

import jax.numpy as jnp
from flax import struct

from mtpd_jax.decoding.drafters.drafter import Drafter, Drafts, by_head
from mtpd_jax.decoding.network import DecodingParameters
from mtpd_jax.decoding.rows import Rows, slice_rows
from mtpd_jax.decoding.sampling import confidence, count_leading
from mtpd_jax.shapes import Array, Bool, Float, Hidden, Int
from mtpd_jax.sharding import WHOLE


@struct.dataclass
class MaskState:
    """What is kept from round to round.

    Attributes:
      slots: [B, K, D]; h^0 of the masks of the last pass.
      ready: [B]; whether they stood behind the text as it is now.
      count: [B]; drafts of the round that is played.
    """

    slots: Float[Array, "B K D"]
    ready: Bool[Array, " B"]
    count: Int[Array, " B"]


class Masks(Drafter, name="masks"):
    """The model's own guesses for the tokens after its next one."""

    needs_masks = True
    adapts = True

    def start(self, batch: int, slots: int) -> MaskState:
        states = jnp.zeros((batch, self.options.num_drafts, self.network.config.width), self.network.dtype)
        return MaskState(states, jnp.zeros(batch, bool), jnp.zeros(batch, jnp.int32))

    def draft(
        self, parameters: DecodingParameters, rows: Rows, state: MaskState, keys: Array
    ) -> tuple[Drafts, MaskState]:
        logits = self.network.logits(parameters, state.slots)
        tokens, sure = likeliest(logits, self.options.min_confidence)
        count = jnp.where(state.ready, count_leading(sure), 0)
        # Certain drafts, whatever the temperature: they are accepted with the probability that the model gives them.
        return Drafts(tokens, count, by_head(tokens), logits=logits), MaskState(state.slots, state.ready, count)

    def inputs(self, last: Int[Array, "B 1"], drafts: Drafts) -> Int[Array, "B W"]:
        most, mask = self.options.num_drafts, self.network.config.vocabulary_size
        text = jnp.pad(jnp.concatenate([last, drafts.tokens], axis=1), ((0, 0), (0, most)))
        return jnp.where(jnp.arange(2 * most + 1)[None, :] <= drafts.count[:, None], text, mask)

    def confirm(self, state: MaskState, before: Rows, after: Rows, hidden: Hidden) -> MaskState:
        slots = slice_rows(hidden, state.count + 1, self.options.num_drafts)
        return MaskState(slots, after.length - before.length == state.count + 1, state.count)


def likeliest(logits: Float[Array, "B K V"], min_confidence: float) -> tuple[Int[Array, "B K"], Bool[Array, "B K"]]:
    """The likeliest token of every slot, and whether its probability is at least that, at temperature 1."""
    return WHOLE.argmax(logits), confidence(logits) >= min_confidence
