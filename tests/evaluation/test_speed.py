"""The speed model against arithmetic done by hand."""

import pytest

from mtpd_jax.evaluation.speed import RoundCosts, best_heads, expected_tokens, unprofitable_batch

COSTS = RoundCosts(2, {1: 1.0, 2: 1.2, 5: 1.8}, {1: 0.1, 4: 0.4}, {0: 0.0, 4: 0.04})


def test_a_round_is_the_sum_of_its_parts():
    assert COSTS.seconds(0) == 1.0
    assert COSTS.seconds(1) == pytest.approx(1.2 + 0.1 + 0.01)
    assert COSTS.seconds(4) == pytest.approx(1.8 + 0.4 + 0.04)
    assert COSTS.seconds(2) == pytest.approx(1.4 + 0.2 + 0.02)  # between measured widths
    assert COSTS.seconds(5) == pytest.approx(2.0 + 0.5 + 0.05)  # beyond them


def test_tokens_per_second():
    cumulative = [0.8, 0.6, 0.4, 0.3]
    assert expected_tokens(0, cumulative) == 1 and expected_tokens(2, cumulative) == pytest.approx(2.4)
    assert COSTS.tokens_per_second(0, cumulative) == 2.0
    assert COSTS.tokens_per_second(2, cumulative) == pytest.approx(2 * 2.4 / 1.62)


def test_the_best_number_of_heads():
    assert best_heads(COSTS, [0.9, 0.8, 0.7, 0.6]) == 4
    assert best_heads(COSTS, [0.8, 0.1, 0.0, 0.0]) == 1
    assert best_heads(COSTS, [0.1, 0.0, 0.0, 0.0]) == 0


def test_the_batch_from_which_drafting_does_not_pay():
    dear = RoundCosts(16, {1: 1.0, 2: 2.0, 5: 5.0}, {1: 0.2, 4: 0.8}, {0: 0.0})
    dearer = RoundCosts(64, {1: 1.0, 2: 2.0, 5: 5.0}, {1: 0.2, 4: 0.8}, {0: 0.0})
    assert unprofitable_batch([COSTS, dear, dearer], [0.9, 0.8, 0.7, 0.6]) == 16
    assert unprofitable_batch([COSTS], [0.9]) is None
    assert unprofitable_batch([dear], [0.9]) == 16
