"""Texts that a report shows: a prompt, and what was written after it, piece by piece by who proposed it."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mtpd_jax.data.tokenizer import Decode, Tokenizer
from mtpd_jax.decoding.decoder import Continuation
from mtpd_jax.decoding.strategies import is_lossless
from mtpd_jax.evaluation.decoding import PADDED_PLAIN, Ways
from mtpd_jax.evaluation.generation import cut_before
from mtpd_jax.evaluation.transcript import pieces

# How many a report shows. Our choice.
_SAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and what was written after it.

    Attributes:
      prompt: its text.
      way, strategy: of decoding.
      pieces: of the continuation: text, and who proposed it (see ``Continuation``).
      tokens, passes: what it took.
    """

    prompt: str
    way: str
    strategy: str
    pieces: tuple[tuple[str, int], ...]
    tokens: int
    passes: int

    @classmethod
    def of(
        cls,
        prompt: str,
        way: str,
        strategy: str,
        written: Continuation,
        decode: Decode,
        stop: Sequence[str] = (),
    ) -> "Sample":
        """From token ids, without the stop string among them."""
        left, found = len(cut_before(decode(written.tokens), stop)), []
        for text, proposer, _ in pieces(written.tokens, written.proposers, decode):
            found += [(text[:left], proposer)] if left else []
            left -= len(text[:left])
        return cls(prompt, way, strategy, tuple(found), len(written.tokens), written.passes)


def samples_of(
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    ways: Ways,
    decoded: Mapping[int | str, Sequence[Continuation]],
    stop: Sequence[str],
) -> tuple[Sample, ...]:
    """The first prompts, and what the longest drafts wrote after them: of those that lose nothing, if there are any,
    and that risk every guess."""

    def worth(name: int | str) -> tuple[bool, bool, bool, int]:
        way = ways[name]
        return way.num_drafts > 0, is_lossless(way), not way.min_confidence, way.num_drafts

    best = max((name for name in ways if name != PADDED_PLAIN), key=worth)
    return tuple(
        Sample.of(tokenizer.decode(prompt), str(best), ways[best].strategy, written, tokenizer.text_after(prompt), stop)
        for prompt, written in zip(prompts[:_SAMPLES], decoded[best], strict=False)
    )
