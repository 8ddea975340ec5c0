"""Figures of models that fill in masks, from the counts in their rows: speed, text, and text at equal speed."""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from experiments.sweep.arms import Arm
from experiments.sweep.rows import SpanCounts, SpanMeasures
from mtpd_jax.evaluation.quality import PLAIN
from mtpd_jax.evaluation.statistics import Counts, Interval, derived, mean_of

_GRID = 33  # places at which two frontiers are compared


def spans_of(arm: Arm) -> list[SpanMeasures]:
    """What was measured of masks, by seed."""
    found = [row.spans for row in arm.rows]
    assert all(one is not None for one in found)  # of students, it always is
    return [one for one in found if one is not None]


def names_of(arm: Arm, mode: str = "greedy") -> list[str]:
    """The ways that it was decoded in."""
    return list(spans_of(arm)[0].ways[mode])


def own_name(arm: Arm, way: str) -> str | None:
    """The name of a way among those of an arm, at its longest spans if ``way`` has no length; None: it is not there."""
    strategy, at, tau = way.partition(" at ")
    found = [name for name in names_of(arm) if name == way or re.fullmatch(rf"{strategy} \d+{at}{tau}", name)]
    return max(found, key=slots_of, default=None)


def slots_of(way: str) -> int:
    """k, of the name of a way; 1 of plain decoding."""
    return 1 if way == PLAIN else int(way.split()[1])


def ways_of(arm: Arm, way: str, mode: str = "greedy") -> list[SpanCounts]:
    """One way, by seed; without a length in its name, at the arm's own longest spans."""
    name = own_name(arm, way)
    assert name is not None  # or nobody asks
    return [one.ways[mode][name] for one in spans_of(arm)]


def tokens_per_pass(arm: Arm, way: str, mode: str = "greedy") -> Counts:
    """The effective k, pooled over texts; the token from prefill is not counted."""
    found = ways_of(arm, way, mode)
    return Counts.ratio([[count - 1 for count in one.tokens] for one in found], [one.passes for one in found])


def mean_of_means(arm: Arm, way: str) -> Counts:
    """The mean over texts of their tokens per pass, as arXiv 2602.06019 reports the effective k; without prefill."""
    found = ways_of(arm, way)
    means = [
        [(count - 1) / passes if passes else 1.0 for count, passes in zip(one.tokens, one.passes, strict=True)]
        for one in found
    ]
    return _mean_over_texts(means)


def places_per_token(arm: Arm, way: str) -> Counts:
    """Places that passes read, per token that was written."""
    found, width = ways_of(arm, way), 2 * slots_of(own_name(arm, way) or PLAIN) - 1
    return Counts.ratio(
        [[passes * width for passes in one.passes] for one in found],
        [[count - 1 for count in one.tokens] for one in found],
    )


def speed(arm: Arm, way: str, mode: str = "greedy") -> Counts:
    """Tokens per second over those of plain decoding of the same model."""
    fast, slow = ways_of(arm, way, mode), ways_of(arm, PLAIN, mode)
    return Counts.ratio([one.tokens for one in fast], [one.seconds for one in fast]) * Counts.ratio(
        [one.seconds for one in slow], [one.tokens for one in slow]
    )


def teacher_ce(arm: Arm, way: str, mode: str = "greedy") -> Counts:
    """Nats per token of what was written, by the teacher, over those of its own greedy text: a mean over texts."""
    own = [np.divide(one.teacher_nats, one.teacher_tokens) for one in spans_of(arm)]
    return _over(ways_of(arm, way, mode), own)


def cost_of_believing(arm: Arm, way: str) -> Counts:
    """Teacher CE of what a way writes, over that of what the same student writes one token at a time."""
    return _over(ways_of(arm, way), [np.divide(one.nats, one.tokens) for one in ways_of(arm, PLAIN)])


def _over(written: Sequence[SpanCounts], others: Sequence[np.ndarray]) -> Counts:
    """Nats per token of texts, less those of others, by seed: a mean over texts."""
    return _mean_over_texts(
        [(np.divide(one.nats, one.tokens) - other).tolist() for one, other in zip(written, others, strict=True)]
    )


def _mean_over_texts(by_text: Sequence[Sequence[float]]) -> Counts:
    return Counts.ratio(by_text, [[1.0] * len(texts) for texts in by_text])


def as_teacher(arm: Arm, way: str) -> Counts:
    """Share of the teacher's own greedy text before the first token that is another."""
    return Counts.ratio(
        [one.as_teacher for one in ways_of(arm, way)], [list(map(float, one.teacher_tokens)) for one in spans_of(arm)]
    )


def kept(arm: Arm, way: str) -> Counts:
    """Share of the text before the first token that plain decoding would not have written."""
    found, plain = ways_of(arm, way), ways_of(arm, PLAIN)
    return Counts.ratio([one.kept for one in found], [one.tokens for one in plain])


def same(arm: Arm, way: str) -> Counts:
    """Share of texts that are plain decoding's, whole."""
    pairs = zip(ways_of(arm, way), ways_of(arm, PLAIN), strict=True)
    return _mean_over_texts([
        [float(shared == count == own) for shared, count, own in zip(one.kept, one.tokens, plain.tokens, strict=True)]
        for one, plain in pairs
    ])  # fmt: skip


def distinct_4grams(arm: Arm, way: str, mode: str = "greedy") -> float:
    """Share of 4-grams of what was written that are the first of their kind in it; a mean over seeds."""
    shares = [one.distinct_4grams for one in ways_of(arm, way, mode)]
    return float(np.mean([share for share in shares if share is not None]))


def stood(arm: Arm, way: str, guesses: int) -> Counts:
    """Share of passes in which so many guesses stood, or more."""
    found = ways_of(arm, way)
    return Counts.ratio([one.accepted[guesses - 1] for one in found], [one.passes for one in found])


def fell(arm: Arm, way: str) -> Counts:
    """Share of passes in which a guess fell, where spans of one length are risked whole and verified; at most.

    Of the others all guesses stand, or there are none: in the first pass, and after every one in which a guess fell. A
    last span that the length limit cuts is counted as fallen.
    """
    found = ways_of(arm, way)
    broken = [
        [(passes - whole) // 2 for passes, whole in zip(one.passes, one.accepted[-1], strict=True)] for one in found
    ]
    return Counts.ratio(broken, [one.passes for one in found])


@dataclasses.dataclass(frozen=True)
class EqualSpeed:
    """How much worse an arm's text is than another's where both write as many tokens per pass.

    Attributes:
      reach: tokens per pass that both come to, over all seeds; every seed is compared from 1 to its own.
      ce: the difference in teacher CE, and ``seeds`` the same per seed.
      believing: that without what the two students' own texts, written one token at a time, differ by.
    """

    reach: float
    ce: Interval
    seeds: list[float]
    believing: Interval


def at_equal_speed(arm: Arm, base: Arm, strategy: str) -> EqualSpeed:
    """Compares the frontiers of two arms, which have the same seeds.

    Both begin with plain decoding and are straight between what was measured. A difference is the mean over the range
    that they share, which is the area between them over its breadth (our choice).
    """
    mine, theirs = _frontier(arm, strategy), _frontier(base, strategy)

    def difference(figures: np.ndarray, own_texts: bool = True) -> float:
        (speeds, text), (base_speeds, base_text) = (np.split(part, 2) for part in np.split(figures, [len(mine)]))
        places = np.linspace(1.0, min(speeds.max(), base_speeds.max()), _GRID)
        apart = np.mean(_text_at(places, speeds, text) - _text_at(places, base_speeds, base_text))
        return float(apart if own_texts else apart - (text[0] - base_text[0]))

    reach = min(max(mean_of(one).mean or 1.0 for one in part[: len(part) // 2]) for part in (mine, theirs))
    ce, seeds = derived(difference, mine + theirs)
    believing, _ = derived(functools.partial(difference, own_texts=False), mine + theirs)
    return EqualSpeed(reach, ce, seeds, believing)


def _frontier(arm: Arm, strategy: str) -> list[Counts]:
    """Tokens per pass of every way, plain decoding first, and then teacher CE of every way."""
    ways = [PLAIN, *(name for name in names_of(arm) if name.startswith(strategy))]
    return [tokens_per_pass(arm, way) for way in ways] + [teacher_ce(arm, way) for way in ways]


def _text_at(places: np.ndarray, speeds: np.ndarray, text: np.ndarray) -> np.ndarray:
    order = np.argsort(speeds, kind="stable")
    return np.interp(places, speeds[order], text[order])
