"""The closed forms on rows of logits, values and gradients, against autodiff in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpd_jax.losses.dense import dense_total
from mtpd_jax.losses.divergences import DIVERGENCES
from mtpd_jax.losses.terms import Distillation, chunk_loss
from mtpd_jax.sharding import WHOLE, LastAxis

J, P, V = 3, 6, 41
KINDS = list(DIVERGENCES)
CE_SCALE, KL_SCALE = np.array([1.0, 0.3, 0.2]), np.array([0.5, 0.4])
EVERYWHERE = np.ones((J, P), bool)


differentiated = jax.jit(jax.value_and_grad(dense_total), static_argnums=(5, 6))
in_closed_form = jax.jit(chunk_loss, static_argnums=(6, 7))


def problem(seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(J, P, V)) * scale).astype(np.float32)
    return logits, rng.integers(0, V, P), rng.random((J, P)) < 0.7


def closed_form(logits, targets, mask, distillation, vocabulary=WHOLE):
    logits = jnp.asarray(logits, jnp.float32)
    arguments = (jnp.asarray(targets), jnp.asarray(mask), jnp.asarray(CE_SCALE, jnp.float32))
    kl_scale = jnp.asarray(KL_SCALE, jnp.float32)
    sums, gradient = in_closed_form(logits, logits[:1], *arguments, kl_scale, distillation, vocabulary)
    return float(sums.ce @ CE_SCALE + sums.kl @ KL_SCALE), np.asarray(gradient), sums


def reference(logits, targets, mask, distillation, selection="sort"):
    with jax.enable_x64(True):
        arguments = [jnp.asarray(array) for array in (targets, mask, CE_SCALE, KL_SCALE)]
        value, gradient = differentiated(jnp.asarray(logits, jnp.float64), *arguments, distillation, selection)
        return float(value), np.asarray(gradient)


def check(logits, targets, mask, distillation, tolerance=3e-6, **options):
    value, gradient, _ = closed_form(logits, targets, mask, distillation, **options)
    expected, expected_gradient = reference(logits, targets, mask, distillation)
    assert value == pytest.approx(expected, rel=tolerance, abs=tolerance)
    np.testing.assert_allclose(gradient, expected_gradient, atol=tolerance * max(1, np.abs(expected_gradient).max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("top_n", "temperature"), [(1, 1.0), (7, 1.0), (7, 0.5), (7, 2.5), (V, 2.5), (1000, 1.0)])
def test_against_float64(kind, top_n, temperature):
    # Whether the teacher is detached changes its own gradient alone, over part of the vocabulary and over all of it.
    for detach in (True, False) if temperature == 2.5 else (True,):
        check(*problem(), Distillation(top_n, temperature, kind, detach))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_compiled_for_accelerators(kind):
    check(*problem(), Distillation(7, 1.0, kind, True), vocabulary=LastAxis(None, on_cpu=False))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from([1, 7, 1000]),
    st.integers(0, 1000),
    st.sampled_from([0.01, 1.0, 30.0, 1e4]),
    st.booleans(),
)
def test_any_scale_and_any_ties(kind, top_n, seed, scale, rounded):
    """Logits from nearly equal to +-1e4, where what one side expects is impossible for the other."""
    logits, targets, mask = problem(seed, scale)
    # Log ratios are as large as the logits, and float32 rounds them accordingly.
    tolerance = max(2e-5, 1e-6 * scale)
    check(np.round(logits) if rounded else logits, targets, mask, Distillation(top_n, 1.0, kind, True), tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_ties_are_kept(kind):
    """Three entries tie for the second place: the set of the two largest has four, and no three of them."""
    logits, targets, _ = problem()
    logits[0, :, :10] = [5, 9, 5, 5, *[-3] * 6]
    logits[0, :, 10:] = -4
    check(logits, targets, EVERYWHERE, Distillation(2, 1.0, kind, True))
    kept, dropped = (closed_form(logits, targets, EVERYWHERE, Distillation(n, 1.0, kind, True))[0] for n in (2, 1))
    assert kept == closed_form(logits, targets, EVERYWHERE, Distillation(4, 1.0, kind, True))[0] != dropped


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_n", [7, 1000])
def test_minus_infinity_is_as_if_the_token_did_not_exist(kind, top_n):
    """Tokens that neither side may say, as in a padded vocabulary."""
    logits, targets, mask = problem()
    padded = np.concatenate([logits, np.full((J, P, 9), -np.inf)], axis=-1)
    value, gradient, _ = closed_form(padded, targets, mask, Distillation(top_n, 1.0, kind, True))
    expected, expected_gradient = reference(logits, targets, mask, Distillation(top_n, 1.0, kind, True))
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient[..., :V], expected_gradient, atol=3e-6)
    assert np.all(gradient[..., V:] == 0)


def test_a_token_that_the_head_rules_out():
    """Its cross entropy and forward KL are boundless, reverse KL and the acceptance rate are not."""
    logits, targets, _ = problem()
    logits[1, :, 0] = -np.inf
    logits[0, :, 0] = 5.0
    for kind, bounded in (("forward", False), ("reverse", True), ("js", True), ("tv", True), ("lk", True)):
        sums = closed_form(logits, targets, EVERYWHERE, Distillation(V, 1.0, kind, True))[2]
        assert (sums.kl[0] < 100) == bounded and sums.kl[1] < 100, kind


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_nan_surfaces_where_supervised_and_nowhere_else(kind):
    logits, targets, mask = problem()
    mask[:, 0], mask[1, 1] = True, False
    distillation = kind and Distillation(7, 1.0, kind, True)
    clean, clean_gradient, _ = closed_form(logits, targets, mask, distillation)
    logits[1, 1, 4] = np.nan
    value, gradient, _ = closed_form(logits, targets, mask, distillation)
    assert value == pytest.approx(clean, rel=1e-6)
    np.testing.assert_allclose(gradient, clean_gradient, atol=1e-7)
    logits[1, 0, 4] = np.nan
    value, gradient, sums = closed_form(logits, targets, mask, distillation)
    assert np.isnan(value) and np.isnan(sums.ce[1]) and np.isnan(gradient[1, 0]).all()


def test_positive_infinity_surfaces():
    logits, targets, _ = problem()
    logits[0, 0, 4] = np.inf
    assert not np.isfinite(closed_form(logits, targets, EVERYWHERE, Distillation(7, 1.0, "forward", True))[0])


def test_divergences_against_their_definitions():
    """One row, by hand, so that closed forms and reference do not share a mistake."""
    logits = np.random.default_rng(1).normal(size=(2, 1, 12)) * 2
    chosen = np.argsort(-logits[0, 0])[:5]
    p, q = (np.exp(side[0, chosen]) / np.exp(side[0, chosen]).sum() for side in logits)
    mean, acceptance = (p + q) / 2, np.minimum(p, q).sum()
    forward, weight = np.sum(p * np.log(p / q)), np.exp(-3 * acceptance)
    expected = {
        "forward": forward,
        "reverse": np.sum(q * np.log(q / p)),
        "js": (np.sum(p * np.log(p / mean)) + np.sum(q * np.log(q / mean))) / 2,
        "tv": 1 - acceptance,
        "lk": -np.log(acceptance),
        "lk_hybrid": weight * forward + (1 - weight) * (1 - acceptance),
    }
    assert expected.keys() == DIVERGENCES.keys()
    for kind, value in expected.items():
        sums, _ = chunk_loss(
            jnp.asarray(logits, jnp.float32), jnp.asarray(logits[:1], jnp.float32), jnp.array([3]),
            jnp.ones((2, 1), bool), jnp.ones(2), jnp.ones(1), Distillation(5, 1.0, kind, True),
        )  # fmt: skip
        assert float(sums.kl[0]) == pytest.approx(value, rel=1e-5), kind


def test_cross_entropy_and_agreement_against_numpy():
    logits, targets, mask = problem()
    *_, sums = closed_form(logits, targets, mask, None)
    probabilities = np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum(-1, keepdims=True)
    ce = -np.log(probabilities[:, np.arange(P), targets])
    np.testing.assert_allclose(sums.ce, (ce * mask).sum(1), rtol=1e-5)
    best = logits.argmax(-1)
    np.testing.assert_array_equal(sums.agreement, ((best[1:] == best[:1]) & mask[1:]).sum(1))


def test_argmax_is_the_first_largest():
    logits = jnp.array([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0], [jnp.nan, jnp.nan, jnp.nan]])
    assert WHOLE.argmax(logits).tolist()[:2] == [1, 0]
    assert 0 <= int(WHOLE.argmax(logits)[2]) < 3
