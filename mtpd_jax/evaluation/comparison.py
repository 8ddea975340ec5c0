"""Comparing two continuations of the same prompt: the same, apart by rounding, or different."""

import dataclasses
from collections.abc import Sequence

from mtpd_jax.decoding.decoder import Continuation, Decoder

# Below this margin between the two largest logits, float32 rounding may decide which is larger. Our choice.
TIE_MARGIN = 1e-4


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where two greedy continuations part.

    Attributes:
      index: the first token, counted from 0 in the continuation, that differs.
      margin: the difference of the two largest logits there.
      tie: whether that is under 1e-4, so that rounding explains it.
    """

    index: int
    margin: float
    tie: bool


def first_divergence(
    decoder: Decoder, prompt: Sequence[int], plain: Continuation, other: Continuation
) -> Divergence | None:
    """Finds where a continuation leaves the plain one, or None if they are the same."""
    if plain.tokens == other.tokens:
        return None
    shorter = min(len(plain.tokens), len(other.tokens))
    index = next((i for i in range(shorter) if plain.tokens[i] != other.tokens[i]), shorter)
    margin = decoder.margin([*prompt, *plain.tokens], len(prompt) + index)
    return Divergence(index, margin, margin < TIE_MARGIN)


def distinct_ngrams(sequences: Sequence[Sequence[int]], n: int = 4) -> float | None:
    """Share of n-grams that are the first of their kind in their own sequence; low where text repeats itself."""
    total = distinct = 0
    for tokens in sequences:
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        total, distinct = total + len(grams), distinct + len(set(grams))
    return distinct / total if total else None
