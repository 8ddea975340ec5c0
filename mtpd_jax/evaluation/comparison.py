"""Comparing two continuations of the same prompt: the same, apart by rounding, or different."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mtpd_jax.decoding.decoder import Continuation, Decoder

# Below this distance between two logits, float32 rounding may decide which is larger. Our choice.
_TIE_MARGIN = 1e-4


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where two greedy continuations part, and whether rounding explains it.

    Attributes:
      index: the first token, counted from 0 in the continuation, that differs.
      margin: the difference of the two largest logits there, computed in float32.
      shortfall: how far the logits of the two tokens that were written lie under the largest, at most; at least the
        margin. None where one text ends before anything differs, which no rounding explains.
      rounding: how far the logits there, computed in the dtype of decoding, lie from those at most; 0 in float32.
      tie: whether the shortfall is under 1e-4 or under twice ``rounding``.
    """

    index: int
    margin: float
    shortfall: float | None
    rounding: float
    tie: bool


def first_divergence(
    decoder: Decoder, prompt: Sequence[int], plain: Continuation, other: Continuation
) -> Divergence | None:
    """Finds where a continuation leaves the plain one, or None if they are the same."""
    if plain.tokens == other.tokens:
        return None
    # Where they part, and what each wrote there.
    shorter, index = min(len(plain.tokens), len(other.tokens)), common(plain.tokens, other.tokens)
    written = [continuation.tokens[index] for continuation in (plain, other) if index < shorter]
    text = [*prompt, *plain.tokens[:index]]
    # The logits there, exactly and as decoding rounds them.
    exact, rounded = (decoder.logits_at(text, dtype) for dtype in ("float32", decoder.dtype))
    second, first = np.sort(exact)[-2:]
    margin, rounding = float(first - second), float(np.abs(exact - rounded).max())
    shortfall = float(first - min(exact[token] for token in written)) if written else None
    tie = shortfall is not None and shortfall < max(_TIE_MARGIN, 2 * rounding)
    return Divergence(index, margin, shortfall, rounding, tie)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def distinct_ngrams(sequences: Sequence[Sequence[int]], n: int = 4) -> float | None:
    """Share of n-grams that are the first of their kind in their own sequence; low where text repeats itself."""
    total = distinct = 0
    for tokens in sequences:
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        total, distinct = total + len(grams), distinct + len(set(grams))
    return distinct / total if total else None
