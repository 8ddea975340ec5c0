"""What acceptance means here, and how sure we are of it.

    conditional_k = accepted_k / tried_k      head k is tried in the rounds in which its draft was verified and drafts
                                              1…k-1 were accepted; drafts after an emitted end token or past the
                                              length limit are not tried
    cumulative_k  = conditional_1 · … · conditional_k; 0 from the first head on that was never accepted, or never tried
                    though head 1 was: none of its drafts ever stood
    tokens per pass                = (tokens - the one from prefill) / verification passes
    tokens per pass without bonus  = accepted drafts / verification passes

MTP-D's "acceptance rate" is the conditional one, its "cumulative acceptance rate" the cumulative (arXiv 2603.23911).
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import scipy.stats

from mtpd_jax.decoding.decoder import Continuation

Rate = TypeVar("Rate")


@dataclasses.dataclass(frozen=True)
class Interval:
    """A ratio over all prompts, and its 95 % bootstrap interval over prompts; None where it is not defined."""

    mean: float | None
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Acceptance(Generic[Rate]):
    """Rates per head, from head 1 on."""

    conditional: tuple[Rate, ...]
    cumulative: tuple[Rate, ...]


def product_of_ratios(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """The product over the first axis of ratios; NaN where the first factor counted nothing.

    It is 0 where a factor is, though nothing was left to be counted for the next one; and where nothing was counted
    for a later factor, which then never came about.

    Args:
      numerators, denominators: [F, …]; factors, and whatever else.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        # One division: a set of prompts over itself is 1, and not nearly 1.
        products = np.prod(numerators, axis=0) / np.prod(denominators, axis=0)
    counted = denominators > 0
    defined = counted[0].copy()
    counted[1:] = True
    return np.where(np.any((numerators == 0) & counted, axis=0) & defined, 0.0, products)


def ratio(numerators: Sequence[Sequence[float]], denominators: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """The product over j of sum(numerators[j]) / sum(denominators[j]), with its interval over prompts.

    Args:
      numerators, denominators: one list per factor, each with one number per prompt. Resampling draws prompts, so
        that factors stay paired.
      seed: of the resampling (1,000 resamples, percentile method).
    """
    factors = len(numerators)
    samples = [np.asarray(sample, float) for sample in (*numerators, *denominators)]

    def statistic(*resampled: np.ndarray, axis: int = -1) -> np.ndarray:
        sums = np.stack([np.sum(sample, axis=axis) for sample in resampled])
        return product_of_ratios(sums[:factors], sums[factors:])

    mean = _number(statistic(*samples))
    if len(samples[0]) < 2 or mean is None:
        return Interval(mean, None, None)
    with warnings.catch_warnings():
        # Resamples without a single denominator have no ratio; then the interval has no end, and is reported so.
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        bounds = scipy.stats.bootstrap(
            samples, statistic, paired=True, vectorized=True, method="percentile", n_resamples=1000,
            rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
    return Interval(mean, _number(bounds.low), _number(bounds.high))


def acceptance_of(continuations: Sequence[Continuation]) -> Acceptance[float | None]:
    """Rates as plain numbers; None for a head that was never tried, and for cumulative rates if head 1 was not."""
    intervals = acceptance_intervals(continuations, resample=False)
    return Acceptance(
        tuple(rate.mean for rate in intervals.conditional), tuple(rate.mean for rate in intervals.cumulative)
    )


def acceptance_intervals(continuations: Sequence[Continuation], resample: bool = True) -> Acceptance[Interval]:
    """Rates with their intervals over prompts."""
    tried = list(zip(*(one.tried for one in continuations), strict=True))
    accepted = list(zip(*(one.accepted for one in continuations), strict=True))
    if not resample:  # the sums over all prompts are one "prompt", which has no interval
        tried, accepted = [(sum(row),) for row in tried], [(sum(row),) for row in accepted]
    return Acceptance(
        tuple(ratio([accepted[k]], [tried[k]]) for k in range(len(tried))),
        tuple(ratio(accepted[: k + 1], tried[: k + 1]) for k in range(len(tried))),
    )


def tokens_per_pass(continuations: Sequence[Continuation]) -> Interval:
    """Tokens written per verification pass, the bonus token included; the one from prefill is not counted."""
    return ratio([[len(one.tokens) - 1 for one in continuations]], [[one.passes for one in continuations]])


def tokens_per_pass_without_bonus(continuations: Sequence[Continuation]) -> Interval:
    """Accepted drafts per verification pass."""
    return ratio([[sum(one.accepted) for one in continuations]], [[one.passes for one in continuations]])


def _number(value: float | np.ndarray) -> float | None:
    return float(value) if np.isfinite(value) else None
