"""The texts being written, one per row of the batch."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.decoding.stops import Stops
from mtpd_jax.shapes import AnyArray, Array, Bool, Float, Int

# The first place of a text ends here; each further one is as long as all before it. Our choice.
FIRST_PLACE = 64


def places(slots: int) -> list[int]:
    """The places of texts up to so many tokens, that rounds are counted by: where each begins. 0, 64, 128, 256, …"""
    found = [0]
    while (begin := max(FIRST_PLACE, 2 * found[-1])) < slots:
        found.append(begin)
    return found


@struct.dataclass
class Rows:
    """The texts being written, one per row, and the count of what it took.

    Attributes:
      tokens: [B, S]; prompt and continuation; beyond ``length`` anything may stand.
      length: [B]; confirmed tokens, prompt included.
      limit: [B]; the length at which a row is cut off.
      finished: [B]; an end token was written, or the limit reached.
      proposer: [B, S]; 0 for a token that the main head chose, else who drafted it (see ``Drafts``).
      passes: [B, P]; verification passes (of a row that was not finished yet), without prefill, by the place in the
        text where they began (see ``places``).
      tried: [B, P, K]; rounds in which draft k was verified and all drafts before it were accepted, likewise.
      accepted: [B, P, K]; rounds in which draft k was accepted, too.
      matched: [B]; how much of a stop string the text ends with, a state of ``Stops``; 0 without any.
    """

    tokens: Int[AnyArray, "B S"]
    length: Int[AnyArray, " B"]
    limit: Int[AnyArray, " B"]
    finished: Bool[AnyArray, " B"]
    proposer: Int[AnyArray, "B S"]
    passes: Int[AnyArray, "B P"]
    tried: Int[AnyArray, "B P K"]
    accepted: Int[AnyArray, "B P K"]
    matched: Int[AnyArray, " B"]

    @classmethod
    def start(
        cls, prompts: Int[Array, "B T"], lengths: Int[Array, " B"], num_drafts: int, max_new_tokens: int, slots: int
    ) -> "Rows":
        """Rows that hold their prompts, [B, T], filled up on the right, and nothing else."""
        batch, by_place = prompts.shape[0], len(places(slots))
        counts = jnp.zeros((batch, by_place, num_drafts), jnp.int32)
        return cls(
            tokens=jnp.pad(prompts, ((0, 0), (0, slots - prompts.shape[1]))),
            length=lengths,
            limit=lengths + max_new_tokens,
            finished=jnp.zeros(batch, bool),
            proposer=jnp.zeros((batch, slots), jnp.int32),
            passes=jnp.zeros((batch, by_place), jnp.int32),
            tried=counts,
            accepted=counts,
            matched=jnp.zeros(batch, jnp.int32),
        )

    @property
    def place(self) -> Int[Array, "B P"]:
        """1 for the place where each row's next token stands, 0 for the others."""
        first = jnp.asarray(places(self.tokens.shape[1]))
        index = jnp.sum(self.length[:, None] >= first[None], axis=1) - 1
        return (index[:, None] == jnp.arange(first.shape[0])[None]).astype(jnp.int32)

    def append(
        self, candidates: Int[Array, "B T"], count: Int[Array, " B"], proposers: Int[Array, "B T"], stops: Stops
    ) -> "Rows":
        """Appends tokens to every row that is not finished, up to its limit and through the first that ends it.

        Args:
          candidates: [B, T].
          count: [B]; how many of them are confirmed, at least one.
          proposers: [B, T]; of the candidates, see ``proposer``.
          stops: what ends a text.
        """
        index = jnp.arange(candidates.shape[1])[None, :]
        # No further than the limit, nor than what ends the text; a finished row stays as it is.
        count = jnp.minimum(count, self.limit - self.length)
        ends, states = stops.find(candidates, self.matched)
        is_end = ends & (index < count[:, None])
        first_end = jnp.min(jnp.where(is_end, index, candidates.shape[1]), axis=1)
        count = jnp.where(self.finished, 0, jnp.minimum(count, first_end + 1))
        # Where the match of a stop string stands after what was taken.
        length = self.length + count
        matched = self.matched
        if states is not None:
            after = jnp.take_along_axis(states, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
            matched = jnp.where(count > 0, after, matched)
        return dataclasses.replace(
            self,
            tokens=write(self.tokens, candidates, self.length),
            proposer=write(self.proposer, proposers, self.length),
            length=length,
            finished=self.finished | jnp.any(is_end, axis=1) | (length >= self.limit),
            matched=matched,
        )


def write(buffer: Int[Array, "B S"], values: Int[Array, "B T"], start: Int[Array, " B"]) -> Int[Array, "B S"]:
    """Writes T values into each row, from that row's own place on."""
    # A gather and a choice instead of a scatter, which CPUs do one by one.
    places = jnp.arange(buffer.shape[1])[None, :] - start[:, None]
    inside = (places >= 0) & (places < values.shape[1])
    return jnp.where(inside, jnp.take_along_axis(values, jnp.clip(places, 0, values.shape[1] - 1), axis=1), buffer)


def read(buffer: Int[Array, "B S"], start: Int[Array, " B"], count: int) -> Int[Array, "B T"]:
    """Reads ``count`` values of each row from its own place on; places outside the buffer read its ends."""
    places = start[:, None] + jnp.arange(count)[None, :]
    return jnp.take_along_axis(buffer, jnp.clip(places, 0, buffer.shape[1] - 1), axis=1)


def slice_rows(values: Float[Array, "B S D"], start: Int[Array, " B"], count: int) -> Float[Array, "B T D"]:
    """Takes ``count`` positions of each row from its own place on."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, count))(values, start)
