"""Figures of several runs, and how sure we are of them: a paired bootstrap, seeds first and then texts."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mtpd_jax.evaluation.acceptance import Interval, product_of_ratios

_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Counts:
    """A figure as what it is counted from: a product of ratios of sums over texts.

    Attributes:
      numerators, denominators: [F, S, P]: factors, seeds, texts. The figure of a seed is the product over factors of
        the sum of numerators over the sum of denominators (see ``product_of_ratios`` for zeros); the figure of all is
        the mean over seeds.
    """

    numerators: np.ndarray
    denominators: np.ndarray

    @classmethod
    def ratio(cls, numerators: Sequence[Sequence[float]], denominators: Sequence[Sequence[float]]) -> "Counts":
        """A single ratio, from [S][P] lists."""
        return cls(np.asarray(numerators, float)[None], np.asarray(denominators, float)[None])

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
        rows, columns = seeds[:, :, None], texts[:, None, :]
        return product_of_ratios(*(values[:, rows, columns].sum(-1) for values in (self.numerators, self.denominators)))


def mean_of(counts: Counts) -> Interval:
    """The mean over seeds, and its 95 % interval over seeds and texts."""
    return _interval(counts.of_seeds(), counts.resampled(*_draws(counts)))


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


def _draws(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    _, seeds, texts = counts.numerators.shape
    rng = np.random.default_rng(0)
    return rng.integers(seeds, size=(_RESAMPLES, seeds)), rng.integers(texts, size=(_RESAMPLES, texts))


def _interval(of_seeds: np.ndarray, resampled: np.ndarray) -> Interval:
    """From the figures of seeds, [S], and of resamples, [R, S]; those that are not defined say nothing."""
    of_seeds, resampled = of_seeds[np.isfinite(of_seeds)], resampled[np.isfinite(resampled).any(-1)]
    if not of_seeds.size:
        return Interval(None, None, None)
    low, high = np.percentile(np.nanmean(np.where(np.isfinite(resampled), resampled, np.nan), axis=-1), [2.5, 97.5])
    return Interval(float(of_seeds.mean()), float(low), float(high))
