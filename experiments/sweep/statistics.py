"""Figures of several runs, and how sure we are of them: a paired bootstrap, seeds first and texts within them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mtpd_jax.evaluation.acceptance import Interval

_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Counts:
    """A figure as what it is counted from: a product of ratios of sums over texts.

    Attributes:
      numerators, denominators: [F, S, P]: factors, seeds, texts. The figure of a seed is the product over factors of
        the sum of numerators over the sum of denominators; the figure of all is the mean over seeds.
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
        """The figure of every seed, [S]."""
        return self._figures(self.numerators.sum(-1), self.denominators.sum(-1))

    def resampled(self, seeds: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """The figure in every resample, [R].

        Args:
          seeds: [R, S]; the seeds drawn.
          texts: [R, S, P]; the texts drawn for each of them.
        """
        rows = seeds[:, :, None]
        sums = [values[:, rows, texts].sum(-1) for values in (self.numerators, self.denominators)]
        figures = self._figures(*sums)
        kept = np.isfinite(figures)
        # A seed for which the figure is not defined (a head that was never tried) says nothing of it.
        with np.errstate(invalid="ignore"):
            return np.where(kept, figures, 0).sum(-1) / kept.sum(-1)

    @staticmethod
    def _figures(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.prod(numerators, axis=0) / np.prod(denominators, axis=0)


def mean_of(counts: Counts) -> Interval:
    """The mean over seeds, and its 95 % interval over seeds and texts."""
    return _interval(counts.of_seeds(), counts.resampled(*_draws(counts)))


def difference(left: Counts, right: Counts) -> tuple[Interval, list[float]]:
    """How much larger the left figure is, and the same per seed. Both are resampled with the same seeds and texts.

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
    return rng.integers(seeds, size=(_RESAMPLES, seeds)), rng.integers(texts, size=(_RESAMPLES, seeds, texts))


def _interval(of_seeds: np.ndarray, resampled: np.ndarray) -> Interval:
    of_seeds, resampled = of_seeds[np.isfinite(of_seeds)], resampled[np.isfinite(resampled)]
    if not of_seeds.size:
        return Interval(None, None, None)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(float(of_seeds.mean()), float(low), float(high))
