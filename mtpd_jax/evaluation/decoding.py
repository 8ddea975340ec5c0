"""Decoding a set of prompts in several ways, side by side, and what came of it.

What came of it stands by prompt (``Decoded``); scores, and whatever else is reported, are folds of that.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mtpd_jax.decoding.decoder import Continuation, Decoder
from mtpd_jax.decoding.drafters.drafter import heads_that_draft
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.strategies import is_lossless
from mtpd_jax.evaluation.acceptance import (
    Acceptance,
    PlaceScore,
    acceptance_intervals,
    by_place,
    tokens_per_pass,
    tokens_per_pass_without_bonus,
)
from mtpd_jax.evaluation.agreement import count_agreement
from mtpd_jax.evaluation.comparison import Divergence, distinct_ngrams, first_divergence
from mtpd_jax.evaluation.statistics import Counts, Interval, mean_of

# The name of plain decoding at the width of passes that all ways share.
PADDED_PLAIN = "padded plain"
# Batches of prompts that one call decodes: rows that are finished take the next prompt of the same call. Our choice.
_BATCHES_PER_CALL = 4

# Ways to decode, by name: numbers of heads, 0 being the fastest plain decoding; what others draft, such as
# ``lookup 4``; and perhaps ``PADDED_PLAIN``.
Ways = Mapping[int | str, Options]


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What one way of decoding made of a set of prompts, by prompt.

    Attributes:
      options: the way.
      continuations: [P].
      divergences: [P]; where greedy text leaves that of plain decoding, None where it does not; empty under sampling.
      agreed, counted: [K, P]; teacher-forced, on what plain decoding wrote; see ``evaluation.agreement``.
    """

    options: Options
    continuations: tuple[Continuation, ...]
    divergences: tuple[Divergence | None, ...]
    agreed: np.ndarray
    counted: np.ndarray


@dataclasses.dataclass(frozen=True)
class DecodingScore:
    """A set of prompts decoded in one way; rates, lengths and speeds with 95 % intervals over prompts.

    Attributes:
      tokens_per_pass, tokens_per_pass_without_bonus, acceptance: see ``evaluation.acceptance``.
      agreement: per head that drafted, teacher-forced on what plain decoding wrote; see ``evaluation.agreement``.
      tokens_per_second: wall clock, prefill included, compilation not. The interval of it, and of speed-ups, is over
        calls of the decoder, whose prompts share one time.
      speedup_over_plain: tokens per second over the fastest plain decoding's, one token per pass.
      speedup_over_one_head: over those of 1 head; None for a model without heads.
      speedup_over_padded_plain: over plain decoding's at the width of all passes; None without ``bit_exact``.
      identical: every prompt's tokens are plain decoding's, at the same width of a pass where that is shared; None
        under sampling.
      divergences: of the prompts that are not identical: where, and whether rounding explains it.
      distinct_4grams: share of distinct 4-grams in the output; repetitive text is easy to draft.
      prompts, turns: how many, and how often each was decoded; of its times the median counts.
      lossless: whether the strategy promises plain decoding's text, or its distribution.
      by_place: by the place in the text; see ``evaluation.acceptance``.
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
    turns: int
    lossless: bool
    by_place: tuple[PlaceScore, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether greedy text that should be plain decoding's differs from it by more than rounding explains."""
        return self.lossless and any(not divergence.tie for divergence in self.divergences)


def decode_prompts(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    ways: Ways,
    *,
    batch_size: int,
    seed: int,
    turns: int = 1,
    transitions: np.ndarray | None = None,
    on_call: Callable[[int], None] = lambda prompts: None,
) -> dict[int | str, list[Continuation]]:
    """Decodes all prompts in several ways, call by call in turn, so that a slow minute hits all alike.

    Args:
      prompts: token ids.
      ways: see ``ways_of``.
      batch_size: prompts decoded together.
      seed: of sampling; prompt number n draws from the key (seed, n), whatever the batch.
      turns: times that all of it is decoded: the same texts, of whose times the medians are returned.
      transitions: of stop strings, see ``Decoder.run``.
      on_call: called with the number of prompts just decoded in one of the ways.
    """
    for options in ways.values():
        decoder.check(prompts, options, batch_size)
    # Turn by turn, call by call, and each call in every way.
    decoded: dict[int | str, list[list[Continuation]]] = {name: [[] for _ in range(turns)] for name in ways}
    for turn in range(turns):
        for start in range(0, len(prompts), prompts_per_call(batch_size)):
            call = prompts[start : start + prompts_per_call(batch_size)]
            for name, options in ways.items():
                decoded[name][turn] += decoder.run(
                    call, options, rows=batch_size, transitions=transitions, seed=seed, first_row=start
                )
                on_call(len(call))
    return {name: _usual(of_turns) for name, of_turns in decoded.items()}


def _usual(turns: Sequence[Sequence[Continuation]]) -> list[Continuation]:
    """What every turn wrote, with the median of its times."""
    return [
        dataclasses.replace(of_prompt[0], seconds=statistics.median(one.seconds for one in of_prompt))
        for of_prompt in zip(*turns, strict=True)
    ]


def prompts_per_call(batch_size: int) -> int:
    """How many prompts one call decodes, and one reading of the clock is of; prompts by themselves are read singly."""
    return 1 if batch_size == 1 else _BATCHES_PER_CALL * batch_size


def ways_of(options: Options, numbers: Sequence[int], drafters: Sequence[str] = ("heads",)) -> Ways:
    """Drafts of each of these lengths by each drafter, plain decoding, and padded to their width if they ask for that.

    Args:
      options: of all ways.
      numbers: lengths of drafts; 0 is plain decoding.
      drafters: names in ``DRAFTERS``; without heads among them, one head's drafts are left out, too.
    """
    ways: dict[int | str, Options] = {0: options.fastest_plain} if 0 in numbers else {}
    for drafter in drafters:
        for number in filter(None, numbers):
            drafting = dataclasses.replace(options.with_drafts(number), drafter=drafter)
            ways[number if drafter == "heads" else f"{drafter} {number}"] = drafting
    if options.pass_width is not None:
        ways[PADDED_PLAIN] = dataclasses.replace(options.fastest_plain, pass_width=options.pass_width)
    return ways


def compare_ways(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    ways: Ways,
    decoded: Mapping[int | str, Sequence[Continuation]],
) -> dict[int | str, Decoded]:
    """Puts beside what ``decode_prompts`` found, given the same arguments, what it has to be held to.

    Greedy text has to be padded plain decoding's if that is among the ways, else plain decoding's.
    """
    # What all ways are held to: plain decoding, and the heads' teacher-forced choices on its text.
    plain = decoded[0]
    most = max(map(heads_that_draft, ways.values()))
    until = next((way.draft_until for way in ways.values() if heads_that_draft(way)), None)
    agreed, counted = count_agreement(decoder, prompts, plain, most, until)

    def held(options: Options, continuations: Sequence[Continuation]) -> Decoded:
        divergences: tuple[Divergence | None, ...] = ()
        if options.sampling.greedy:
            compared = zip(prompts, decoded.get(PADDED_PLAIN, plain), continuations, strict=True)
            divergences = tuple(first_divergence(decoder, prompt.tolist(), *pair) for prompt, *pair in compared)
        own = heads_that_draft(options)
        return Decoded(options, tuple(continuations), divergences, agreed[:own], counted[:own])

    return {name: held(ways[name], continuations) for name, continuations in decoded.items()}


def score_ways(
    compared: Mapping[int | str, Decoded], batch_size: int, turns: int = 1
) -> dict[int | str, DecodingScore]:
    """Folds what stands by prompt into scores; baselines are plain decoding, and one head and padded if there are.

    ``batch_size`` and ``turns`` are what ``decode_prompts`` was given.
    """
    return {name: _score(found, compared, batch_size, turns) for name, found in compared.items()}


def _score(found: Decoded, compared: Mapping[int | str, Decoded], batch_size: int, turns: int) -> DecodingScore:
    # Time is of calls, and everything else of prompts.
    continuations, greedy = found.continuations, found.options.sampling.greedy
    rates = zip(found.agreed, found.counted, strict=True)
    speed = _tokens_and_seconds(found, batch_size)

    def speedup(name: int | str) -> Interval | None:
        if name not in compared:
            return None
        tokens, seconds = _tokens_and_seconds(compared[name], batch_size)
        return mean_of(Counts.of_prompts([speed[0], seconds], [speed[1], tokens]))

    over_plain = speedup(0)
    assert over_plain is not None  # it is always among the ways
    return DecodingScore(
        tokens_per_pass=tokens_per_pass(continuations),
        tokens_per_pass_without_bonus=tokens_per_pass_without_bonus(continuations),
        acceptance=acceptance_intervals(continuations),
        agreement=tuple(mean_of(Counts.of_prompts([agreed], [counted])) for agreed, counted in rates),
        tokens_per_second=mean_of(Counts.of_prompts([speed[0]], [speed[1]])),
        speedup_over_plain=over_plain,
        speedup_over_one_head=speedup(1),
        speedup_over_padded_plain=speedup(PADDED_PLAIN),
        identical=not any(found.divergences) if greedy else None,
        divergences=tuple(divergence for divergence in found.divergences if divergence is not None),
        distinct_4grams=distinct_ngrams([continuation.tokens for continuation in continuations]),
        prompts=len(continuations),
        turns=turns,
        lossless=is_lossless(found.options),
        by_place=by_place(continuations) if found.options.num_drafts else (),
    )


def _tokens_and_seconds(found: Decoded, batch_size: int) -> tuple[list[float], list[float]]:
    """Tokens and seconds of each call: what was measured once is one sample, and not one per prompt."""
    step = prompts_per_call(batch_size)
    calls = [found.continuations[start : start + step] for start in range(0, len(found.continuations), step)]
    tokens = [float(sum(len(one.tokens) for one in call)) for call in calls]
    return tokens, [sum(one.seconds for one in call) for call in calls]
