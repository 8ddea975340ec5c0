"""Decoding a set of prompts with several numbers of heads, side by side, and what came of it."""

import dataclasses
from collections.abc import Callable, Sequence

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


@dataclasses.dataclass(frozen=True)
class DecodingScore:
    """A set of prompts decoded with one number of heads; rates, lengths and speeds with 95 % intervals over prompts.

    Attributes:
      tokens_per_pass, tokens_per_pass_without_bonus, acceptance: see ``evaluation.acceptance``.
      agreement: per head, teacher-forced on what plain decoding wrote; see ``evaluation.agreement``.
      tokens_per_second: wall clock, prefill included, compilation not.
      speedup_over_plain, speedup_over_one_head: tokens per second over those of 0 and of 1 head; the latter is None
        for a model without heads.
      identical: every prompt's tokens are plain decoding's; None under sampling.
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
    heads: Sequence[int],
    options: Options,
    *,
    batch_size: int,
    seed: int,
    on_batch: Callable[[int], None] = lambda prompts: None,
) -> dict[int, list[Continuation]]:
    """Decodes all prompts with each number of heads, batch by batch in turn, so that a slow minute hits all alike.

    Args:
      prompts: token ids.
      heads: numbers of heads; 0 is plain decoding.
      options: all but the number of heads.
      batch_size: prompts decoded together.
      on_batch: called with the number of prompts just decoded with one number of heads.
    """
    by_heads = {number: dataclasses.replace(options, num_heads=number) for number in heads}
    for chosen in by_heads.values():
        decoder.check(prompts, chosen)
    found: dict[int, list[Continuation]] = {number: [] for number in heads}
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        for number in heads:
            found[number] += decoder.run(batch, by_heads[number], seed=seed, first_row=start)
            on_batch(len(batch))
    return found


def score_decoding(
    decoder: Decoder, prompts: Sequence[np.ndarray], found: dict[int, list[Continuation]], greedy: bool
) -> dict[int, DecodingScore]:
    """Turns the continuations of ``decode_prompts`` into scores, plain decoding and one head being the baselines."""
    plain, one_head = found[0], found.get(1)
    agreement = agreement_of_heads(decoder, prompts, plain, max(found))

    def score(heads: int, continuations: list[Continuation]) -> DecodingScore:
        divergences = []
        if greedy:
            compared = zip(prompts, plain, continuations, strict=True)
            divergences = [first_divergence(decoder, prompt.tolist(), *pair) for prompt, *pair in compared]
        return DecodingScore(
            tokens_per_pass=tokens_per_pass(continuations),
            tokens_per_pass_without_bonus=tokens_per_pass_without_bonus(continuations),
            acceptance=acceptance_intervals(continuations),
            agreement=agreement[:heads],
            tokens_per_second=ratio([_tokens(continuations)], [_seconds(continuations)]),
            speedup_over_plain=_speedup(continuations, plain),
            speedup_over_one_head=None if one_head is None else _speedup(continuations, one_head),
            identical=not any(divergences) if greedy else None,
            divergences=tuple(divergence for divergence in divergences if divergence is not None),
            distinct_4grams=distinct_ngrams([continuation.tokens for continuation in continuations]),
            prompts=len(continuations),
        )

    return {number: score(number, continuations) for number, continuations in found.items()}


def _tokens(continuations: Sequence[Continuation]) -> list[float]:
    return [len(continuation.tokens) for continuation in continuations]


def _seconds(continuations: Sequence[Continuation]) -> list[float]:
    return [continuation.seconds for continuation in continuations]


def _speedup(continuations: Sequence[Continuation], baseline: Sequence[Continuation]) -> Interval:
    return ratio([_tokens(continuations), _seconds(baseline)], [_seconds(continuations), _tokens(baseline)])
