"""Prompt lookup: what followed the last words the last time they stood in the text is drafted again.

It needs no heads and costs nothing, and is the baseline for text that repeats what it was given: code, summaries,
corrections (Saxena, 2023, "Prompt Lookup Decoding"; which match is taken, and that one is continued periodically past
the end of the text, are our choice).
"""

from typing import Any

import jax.numpy as jnp

from mtpd_jax.decoding.drafters.drafter import COPIED, Drafter, Drafts
from mtpd_jax.decoding.network import DecodingParameters
from mtpd_jax.decoding.rows import Rows, read
from mtpd_jax.shapes import Array, Bool, Int

# Tokens at the end of the text that are looked for, at most and at least. Our choice.
LONGEST, SHORTEST = 3, 1


class PromptLookup(Drafter, name="lookup"):
    """Copies out of the row's own text, prompt and continuation."""

    def draft(self, parameters: DecodingParameters, rows: Rows, state: Any, keys: Array) -> tuple[Drafts, Any]:
        # Certain drafts: accepted with the probability that the main head gives them.
        tokens, found = look_up(rows.tokens, rows.length, self.options.num_drafts)
        count = jnp.where(found, self.options.num_drafts, 0)
        return Drafts(tokens, count, jnp.full(tokens.shape, COPIED)), state


def look_up(
    tokens: Int[Array, "B S"], length: Int[Array, " B"], count: int
) -> tuple[Int[Array, "B K"], Bool[Array, " B"]]:
    """What followed the newest place in each row where its last tokens stood before, and whether there was one.

    The longest match counts, of those the newest. Near the end of the text what followed is short, and goes round.

    Args:
      tokens: [B, S]; of which ``length`` are text.
      count: K, tokens to return.
    """
    places = jnp.arange(tokens.shape[1])[None, :]
    follows = jnp.zeros_like(length)  # the place after the match; nothing follows place 0
    for size in range(LONGEST, SHORTEST - 1, -1):
        # matches[p]: the last `size` tokens stand before place p, too, and p is text.
        matches = (places >= size) & (places < length[:, None])
        for back in range(1, size + 1):
            last = read(tokens, length - back, 1)
            matches &= jnp.roll(tokens, back, axis=1) == last
        newest = jnp.max(jnp.where(matches, places, 0), axis=1)
        follows = jnp.where(follows > 0, follows, newest)
    found = follows > 0
    period = jnp.maximum(length - follows, 1)[:, None]
    copied = follows[:, None] + jnp.arange(count)[None, :] % period
    return jnp.take_along_axis(tokens, copied, axis=1), found
