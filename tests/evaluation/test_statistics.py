"""Intervals over seeds and texts, against resampling written out, and against what is known of the population."""

import numpy as np
import pytest
import scipy.stats

from mtpd_jax.evaluation.statistics import Counts, derived, difference, mean_of

SEEDS, TEXTS = 3, 20


def counts(seed=0, rate=0.6, seeds=SEEDS, texts=TEXTS, factors=1):
    rng = np.random.default_rng(seed)
    tried = rng.integers(20, 60, (factors, seeds, texts))
    return Counts(rng.binomial(tried, rate).astype(float), tried.astype(float))


def test_the_figure_is_the_mean_over_seeds_of_ratios_of_sums():
    found = counts(factors=2)
    expected = [
        np.prod([found.numerators[f, s].sum() / found.denominators[f, s].sum() for f in range(2)])
        for s in range(SEEDS)
    ]  # fmt: skip
    np.testing.assert_allclose(found.of_seeds(), expected)
    assert mean_of(found).mean == pytest.approx(np.mean(expected))


def test_resampling_draws_seeds_and_texts():
    """Against loops over what was drawn."""
    found = counts(factors=2)
    rng = np.random.default_rng(1)
    seeds, texts = rng.integers(SEEDS, size=(5, SEEDS)), rng.integers(TEXTS, size=(5, TEXTS))
    for r, figures in enumerate(found.resampled(seeds, texts)):
        for seed, figure in zip(seeds[r], figures, strict=True):
            sums = [
                [sum(values[f, seed, text] for text in texts[r]) for f in range(2)]
                for values in (found.numerators, found.denominators)
            ]
            assert figure == pytest.approx(sums[0][0] * sums[0][1] / (sums[1][0] * sums[1][1]))


def test_with_one_seed_it_is_the_bootstrap_over_texts():
    found = counts(seeds=1, texts=60)
    pair = found.numerators[0, 0], found.denominators[0, 0]
    expected = scipy.stats.bootstrap(
        pair, lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, method="percentile", n_resamples=4000, rng=0
    ).confidence_interval
    interval = mean_of(found)
    width = expected.high - expected.low
    assert interval.low == pytest.approx(expected.low, abs=0.1 * width)
    assert interval.high == pytest.approx(expected.high, abs=0.1 * width)


def test_seeds_that_differ_widen_the_interval():
    alike = counts(seeds=4)
    shifted = Counts(alike.numerators.copy(), alike.denominators)
    shifted.numerators[:, :2] *= 0.5
    widths = [interval.high - interval.low for interval in map(mean_of, (alike, shifted))]
    assert widths[1] > 3 * widths[0]


def test_a_difference_is_paired():
    """What both arms share cancels: an arm and itself differ by nothing; unpaired, by their spread."""
    arm = counts()
    interval, seeds = difference(arm, arm)
    assert (interval.mean, interval.low, interval.high) == (0, 0, 0) and seeds == [0, 0, 0]
    better = Counts(arm.numerators + 0.05 * arm.denominators, arm.denominators)
    interval, seeds = difference(better, arm)
    assert seeds == pytest.approx([0.05] * SEEDS)
    assert interval.low == pytest.approx(0.05) and interval.high == pytest.approx(0.05)
    alone = mean_of(arm)
    assert alone.high - alone.low > 0.01
    with pytest.raises(ValueError, match="not paired"):
        difference(arm, counts(seeds=2))


def test_what_is_derived_of_several_figures_is_resampled_together():
    """A difference is one case; whatever else, in every resample, is of the figures of one seed."""
    arm, other = counts(), counts(seed=1)
    assert derived(lambda figures: figures[0] - figures[1], [arm, other]) == difference(arm, other)
    interval, seeds = derived(lambda figures: (figures[0] / figures[1]) ** 2, [arm, arm])
    assert (interval.mean, interval.low, interval.high) == (1, 1, 1) and seeds == [1] * SEEDS
    squares, of_seeds = derived(lambda figures: figures[0] ** 2, [arm])
    assert of_seeds == pytest.approx(arm.of_seeds() ** 2) and squares.low < squares.mean < squares.high


@pytest.mark.parametrize("seeds", [1, 4])
def test_intervals_cover_the_truth_as_often_as_they_say(seeds):
    """Every text has a rate of its own, around 0.6 and the same for all seeds. With texts drawn anew for every seed the
    intervals for four seeds would be half as wide, and cover in two of three cases."""
    hits, trials = 0, 200
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        tried = np.full((1, seeds, 40), 50.0)
        rates = np.clip(rng.normal(0.6, 0.2, (1, 1, 40)), 0, 1)
        interval = mean_of(Counts(rng.binomial(50, np.broadcast_to(rates, tried.shape)).astype(float), tried))
        hits += interval.low <= 0.6 <= interval.high
    assert 0.88 * trials < hits < trials


def test_what_is_not_defined_is_left_out():
    found = counts()
    found.numerators[:, 1], found.denominators[:, 1] = 0, 0  # a head that one seed never tried
    interval = mean_of(found)
    assert interval.mean == pytest.approx(np.mean(found.of_seeds()[[0, 2]]))
    assert interval.low < interval.mean < interval.high
    interval, seeds = difference(counts(), found)  # and so is the other side's figure of that seed
    assert interval.mean == pytest.approx(np.mean([seeds[0], seeds[2]])) and np.isnan(seeds[1])
    nothing = mean_of(Counts(np.zeros((1, 2, 3)), np.zeros((1, 2, 3))))
    assert (nothing.mean, nothing.low, nothing.high) == (None, None, None)


def test_a_product_with_a_zero_is_zero():
    """A head that was never accepted leaves the next one untried: the cumulative rate is zero all the same."""
    first = Counts.ratio([[0, 0], [3, 1]], [[5, 5], [4, 4]])
    second = Counts.ratio([[0, 0], [1, 1]], [[0, 0], [3, 1]])
    np.testing.assert_allclose((first * second).of_seeds(), [0, 0.25])
    assert np.isnan(second.of_seeds()[0])


def test_inverse_and_product():
    found = counts()
    assert mean_of(found * found.inverse()).mean == pytest.approx(1)
