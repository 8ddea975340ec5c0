"""Decoding a set of prompts with several numbers of heads, side by side, and what came of it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mtpd_jax.decoding.decoder import Continuation, Decoder
from mtpd_jax.decoding.options import Options
from mtpd_jax.evaluation.acceptance import (
    Acceptance,
    Interval,
    acceptance_intervals,
    ratio,
    tokens_per_pass,
    tokens_per_pass_without_bonus,
)
from mtpd_jax.evaluation.agreement import agreement_of_heads
from mtpd_jax.evaluation.comparison import Divergence, distinct_ngrams, first_divergence

# The name of plain decoding at the width of passes that all ways share.
PADDED_PLAIN = "padded plain"

# Ways to decode: numbers of heads, 0 being the fastest plain decoding, and perhaps ``PADDED_PLAIN``.
Ways = Mapping[int | str, Options]


@dataclasses.dataclass(frozen=True)
class DecodingScore:
    """A set of prompts decoded with one number of heads; rates, lengths and speeds with 95 % intervals over prompts.

    Attributes:
      tokens_per_pass, tokens_per_pass_without_bonus, acceptance: see ``evaluation.acceptance``.
      agreement: per head, teacher-forced on what plain decoding wrote; see ``evaluation.agreement``.
      tokens_per_second: wall clock, prefill included, compilation not. The interval of it, and of speed-ups, is over
        batches, whose prompts share one time.
      speedup_over_plain: tokens per second over the fastest plain decoding's, one token per pass.
      speedup_over_one_head: over those of 1 head; None for a model without heads.
      speedup_over_padded_plain: over plain decoding's at the width of all passes; None without ``bit_exact``.
      identical: every prompt's tokens are plain decoding's, at the same width of a pass where that is shared; None
        under sampling.
      divergences: of the prompts that are not identical: where, and whether rounding explains it.
      distinct_4grams: share of distinct 4-grams in the output; repetitive text is easy to draft.
      prompts: how many.
    """

    tokens_per_pass: Interval
    tokens_per_pass_without_bonus: Interval
    acceptance: Acceptance[Interval]
    agreement: tuple[Interval, ...]
    tokens_per_second: Interval
    speedup_over_plain: Interval
    speedup_over_one_head: Interval | None
    speedup_over_padded_plain: Interval | None
    identical: bool | None
    divergences: tuple[Divergence, ...]
    distinct_4grams: float | None
    prompts: int

    @property
    def failed(self) -> bool:
        """Whether greedy text differs from plain decoding's by more than rounding explains."""
        return any(not divergence.tie for divergence in self.divergences)


def decode_prompts(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    ways: Ways,
    *,
    batch_size: int,
    seed: int,
    on_batch: Callable[[int], None] = lambda prompts: None,
) -> dict[int | str, list[Continuation]]:
    """Decodes all prompts in several ways, batch by batch in turn, so that a slow minute hits all alike.

    Args:
      prompts: token ids.
      ways: see ``ways_of``.
      batch_size: prompts decoded together.
      seed: of sampling; prompt number n draws from the key (seed, n), whatever the batch.
      on_batch: called with the number of prompts just decoded in one of the ways.
    """
    for options in ways.values():
        decoder.check(prompts, options, batch_size)
    decoded: dict[int | str, list[Continuation]] = {name: [] for name in ways}
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        for name, options in ways.items():
            decoded[name] += decoder.run(batch, options, seed=seed, first_row=start)
            on_batch(len(batch))
    return decoded


def ways_of(options: Options, numbers: Sequence[int]) -> Ways:
    """The same options with each number of heads, and plain decoding padded to their width if they ask for one."""
    padded = {} if options.pass_width is None else {PADDED_PLAIN: options.with_heads(0)}
    return {**{n: options.with_heads(n) if n else options.fastest_plain for n in numbers}, **padded}


def score_decoding(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    ways: Ways,
    decoded: Mapping[int | str, Sequence[Continuation]],
    batch_size: int,
) -> dict[int | str, DecodingScore]:
    """Turns what ``decode_prompts`` found, given the same arguments, into scores.

    Baselines are plain decoding, one head if it is among the ways, and padded plain decoding if that is: then texts
    have to be its text, else plain decoding's.
    """
    plain, one_head, padded = decoded[0], decoded.get(1), decoded.get(PADDED_PLAIN)
    agreement = agreement_of_heads(decoder, prompts, plain, max(options.num_heads for options in ways.values()))

    def score(options: Options, continuations: Sequence[Continuation]) -> DecodingScore:
        divergences, greedy = [], options.sampling.greedy
        if greedy:
            compared = zip(prompts, padded or plain, continuations, strict=True)
            divergences = [first_divergence(decoder, prompt.tolist(), *pair) for prompt, *pair in compared]
        return DecodingScore(
            tokens_per_pass=tokens_per_pass(continuations),
            tokens_per_pass_without_bonus=tokens_per_pass_without_bonus(continuations),
            acceptance=acceptance_intervals(continuations),
            agreement=agreement[: options.num_heads],
            tokens_per_second=ratio([_tokens(continuations, batch_size)], [_seconds(continuations, batch_size)]),
            speedup_over_plain=_speedup(continuations, plain, batch_size),
            speedup_over_one_head=_speedup(continuations, one_head, batch_size) if one_head else None,
            speedup_over_padded_plain=_speedup(continuations, padded, batch_size) if padded else None,
            identical=not any(divergences) if greedy else None,
            divergences=tuple(divergence for divergence in divergences if divergence is not None),
            distinct_4grams=distinct_ngrams([continuation.tokens for continuation in continuations]),
            prompts=len(continuations),
        )

    return {name: score(ways[name], continuations) for name, continuations in decoded.items()}


def _tokens(continuations: Sequence[Continuation], batch_size: int) -> list[float]:
    return _per_batch([len(continuation.tokens) for continuation in continuations], batch_size)


def _seconds(continuations: Sequence[Continuation], batch_size: int) -> list[float]:
    return _per_batch([continuation.seconds for continuation in continuations], batch_size)


def _per_batch(values: Sequence[float], batch_size: int) -> list[float]:
    """The sum of each batch: what was measured once is one sample, and not one per prompt."""
    return [sum(values[start : start + batch_size]) for start in range(0, len(values), batch_size)]


def _speedup(continuations: Sequence[Continuation], base: Sequence[Continuation], batch_size: int) -> Interval:
    return ratio(
        [_tokens(continuations, batch_size), _seconds(base, batch_size)],
        [_seconds(continuations, batch_size), _tokens(base, batch_size)],
    )
