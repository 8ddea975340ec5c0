"""Figures of several runs or prompts, and how sure we are of them: a paired bootstrap, seeds first and then texts."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure and its 95 % bootstrap interval over what was counted; None where it is not defined."""

    mean: float | None
    low: float | None
    high: float | None


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


@dataclasses.dataclass(frozen=True)
class Counts:
    """A figure as what it is counted from: a product of ratios of sums over texts.

    Attributes:
      numerators, denominators: [F, S, P]: factors, seeds, texts. The figure of a seed is the product over factors of
        the sum of numerators over the sum of denominators (see ``product_of_ratios`` for zeros); the figure of all is
        the mean over seeds. A single run, or a set of prompts, is one seed.
    """

    numerators: np.ndarray
    denominators: np.ndarray

    @classmethod
    def ratio(cls, numerators: Sequence[Sequence[float]], denominators: Sequence[Sequence[float]]) -> "Counts":
        """A single ratio, from [S][P] lists."""
        return cls(np.asarray(numerators, float)[None], np.asarray(denominators, float)[None])

    @classmethod
    def of_prompts(cls, numerators: Sequence[Sequence[float]], denominators: Sequence[Sequence[float]]) -> "Counts":
        """A product of ratios of one run, from [F][P] lists: a factor per list, with a number per prompt."""
        return cls(np.asarray(numerators, float)[:, None], np.asarray(denominators, float)[:, None])

    def __mul__(self, other: "Counts") -> "Counts":
        return Counts(
            np.concatenate([self.numerators, other.numerators]), np.concatenate([self.denominators, other.denominators])
        )

    def inverse(self) -> "Counts":
        """One over the figure."""
        return Counts(self.denominators, self.numerators)

    def of_seeds(self) -> np.ndarray:
        """The figure of every seed, [S]; NaN where it is not defined."""
        return product_of_ratios(self.numerators.sum(-1), self.denominators.sum(-1))

    def resampled(self, seeds: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """The figures of the seeds drawn in every resample, [R, S].

        Args:
          seeds: [R, S]; the seeds drawn.
          texts: [R, P]; the texts drawn, the same for every seed, as all runs are measured on the same texts.
        """
        number = self.numerators.shape[-1]
        # How often each text was drawn, [R, P]: sums over what was drawn are one product.
        drawn = np.stack([np.bincount(row, minlength=number) for row in texts]).astype(float)
        sums = (np.moveaxis(values @ drawn.T, 1, 2) for values in (self.numerators, self.denominators))
        return product_of_ratios(*(np.take_along_axis(of_all, seeds[None], axis=2) for of_all in sums))


def mean_of(counts: Counts) -> Interval:
    """The mean over seeds, and its 95 % interval over seeds and texts; one text alone has none."""
    if counts.numerators[0].size == 1:
        return figure_of(counts)
    return _interval(counts.of_seeds(), counts.resampled(*_draws(counts)))


def figure_of(counts: Counts) -> Interval:
    """The mean over seeds, without an interval."""
    of_seeds = counts.of_seeds()
    of_seeds = of_seeds[np.isfinite(of_seeds)]
    return Interval(float(of_seeds.mean()) if of_seeds.size else None, None, None)


def difference(left: Counts, right: Counts) -> tuple[Interval, list[float]]:
    """How much larger the left figure is, and the same per seed. Both are resampled with the same seeds and texts.

    A seed in which one of the two is not defined counts in neither.

    Raises:
      ValueError: the two do not have the same seeds and texts.
    """
    if left.numerators.shape[1:] != right.numerators.shape[1:]:
        raise ValueError(f"not paired: {left.numerators.shape[1:]} and {right.numerators.shape[1:]} seeds and texts")
    draws = _draws(left)
    per_seed = left.of_seeds() - right.of_seeds()
    return _interval(per_seed, left.resampled(*draws) - right.resampled(*draws)), per_seed.tolist()


def derived(figure: Callable[[np.ndarray], float], counts: Sequence[Counts]) -> tuple[Interval, list[float]]:
    """A figure that is made of several, which are resampled with the same seeds and texts; and the same per seed.

    Args:
      figure: of the figures of one seed, [C]; NaN where it is not defined.
      counts: that it is made of, of the same seeds and texts.
    """
    draws = _draws(counts[0])
    of_seeds = np.apply_along_axis(figure, 0, np.stack([one.of_seeds() for one in counts]))
    resampled = np.apply_along_axis(figure, 0, np.stack([one.resampled(*draws) for one in counts]))
    return _interval(of_seeds, resampled), of_seeds.tolist()


def _draws(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    _, seeds, texts = counts.numerators.shape
    rng = np.random.default_rng(0)
    return rng.integers(seeds, size=(_RESAMPLES, seeds)), rng.integers(texts, size=(_RESAMPLES, texts))


def _interval(of_seeds: np.ndarray, resampled: np.ndarray) -> Interval:
    """From the figures of seeds, [S], and of resamples, [R, S]; those that are not defined say nothing."""
    of_seeds, resampled = of_seeds[np.isfinite(of_seeds)], resampled[np.isfinite(resampled).any(-1)]
    if not of_seeds.size or not resampled.size:
        return Interval(None, None, None)
    low, high = np.percentile(np.nanmean(np.where(np.isfinite(resampled), resampled, np.nan), axis=-1), [2.5, 97.5])
    return Interval(float(of_seeds.mean()), float(low), float(high))
