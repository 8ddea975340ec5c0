"""The loss against NumPy, the production form against the dense one, and what must carry no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpd_jax.losses.dense import dense_loss
from mtpd_jax.losses.fused import fused_loss
from mtpd_jax.losses.select import largest
from mtpd_jax.losses.terms import Distillation, argmax, chunk_terms, cross_entropy, divergence
from tests.builders import assert_trees_close

B, T, K, D, V = 2, 19, 2, 12, 41
ALL = [
    Distillation(n, temperature, kl, detach)
    for n in (1, 7, V)
    for temperature in (1.0, 2.5)
    for kl in ("forward", "reverse", "js")
    for detach in (True, False)
]


def problem(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, T, K + 1, D)), dtype)
    unembedding = jnp.asarray(rng.normal(size=(V, D)) * 0.7, jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)))
    mask = jnp.asarray(rng.random((B, T, K + 1)) < 0.7)
    return hidden, unembedding, targets, mask, jnp.array([1.0, 0.1, 0.2]) / 30, jnp.array([0.5, 0.7]) / 30


def numpy_divergence(teacher, head, n, temperature, kl):
    """One row in float64, over the n largest teacher logits (no ties)."""
    chosen = np.argsort(-teacher)[:n]
    p, q = (np.exp(x[chosen] / temperature - np.max(x[chosen] / temperature)) for x in (teacher, head))
    p, q = p / p.sum(), q / q.sum()
    mean = (p + q) / 2
    total = {
        "forward": np.sum(p * np.log(p / q)),
        "reverse": np.sum(q * np.log(q / p)),
        "js": 0.5 * np.sum(p * np.log(p / mean)) + 0.5 * np.sum(q * np.log(q / mean)),
    }[kl]
    return temperature**2 * total


@pytest.mark.parametrize("kl", ["forward", "reverse", "js"])
@pytest.mark.parametrize(("n", "temperature"), [(1, 1.0), (7, 1.0), (7, 3.0), (V, 0.5), (1000, 1.0)])
def test_divergence_against_numpy(kl, n, temperature):
    rng = np.random.default_rng(1)
    teacher, heads = rng.normal(size=(5, V)) * 3, rng.normal(size=(5, K, V)) * 3
    found = divergence(
        jnp.asarray(teacher, jnp.float32), jnp.asarray(heads, jnp.float32), Distillation(n, temperature, kl, True)
    )
    expected = [[numpy_divergence(teacher[p], heads[p, k], n, temperature, kl) for k in range(K)] for p in range(5)]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_cross_entropy_against_numpy():
    rng = np.random.default_rng(2)
    logits, targets = rng.normal(size=(5, 3, V)) * 4, rng.integers(0, V, 5)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(probabilities[np.arange(5), :, targets])
    np.testing.assert_allclose(
        cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(targets)), expected, rtol=1e-5
    )


@pytest.mark.parametrize("distillation", [None, *ALL], ids=str)
def test_fused_equals_dense(distillation):
    """Values and gradients, with chunks that do not divide the rows."""
    hidden, unembedding, *rest = problem()

    def fused(hidden, unembedding):
        return fused_loss(hidden, unembedding, *rest, distillation=distillation, chunk_rows=7)[0]

    def dense(hidden, unembedding):
        return dense_loss(hidden, unembedding, *rest, distillation=distillation)

    found = jax.jit(jax.value_and_grad(fused, (0, 1)))(hidden, unembedding)
    assert_trees_close(found, jax.jit(jax.value_and_grad(dense, (0, 1)))(hidden, unembedding), 3e-6)
    assert_trees_close(fused(hidden, unembedding), found[0], 1e-6)  # without gradients: another program


@pytest.mark.parametrize("kl", ["forward", "reverse", "js"])
def test_bfloat16_inputs(kl):
    hidden, unembedding, *rest = problem(jnp.bfloat16)
    rounded = unembedding.astype(jnp.bfloat16).astype(jnp.float32)
    distillation = Distillation(7, 1.0, kl, True)
    fused = jax.value_and_grad(lambda *a: fused_loss(*a, *rest, distillation=distillation, chunk_rows=7)[0], (0, 1))
    dense = jax.value_and_grad(lambda *a: dense_loss(*a, *rest, distillation=distillation), (0, 1))
    (value, gradients), (expected, reference) = fused(hidden, rounded), dense(hidden.astype(jnp.float32), rounded)
    assert gradients[0].dtype == jnp.bfloat16 and gradients[1].dtype == jnp.float32
    assert value == pytest.approx(float(expected), rel=1e-4)  # products of bfloat16 numbers are exact in float32
    assert_trees_close(gradients, reference, 6e-3)  # the logits' gradient is rounded to bfloat16


def test_teacher_gets_no_gradient_from_the_divergence():
    hidden, unembedding, targets, mask, _, kl_scale = problem()

    def gradient(detach):
        distillation = Distillation(7, 1.0, "forward", detach)
        return jax.grad(
            lambda h: fused_loss(h, unembedding, targets, mask, jnp.zeros(K + 1), kl_scale, distillation=distillation)[
                0
            ]
        )(hidden)

    assert np.all(np.asarray(gradient(True)[:, :, 0]) == 0)
    assert np.all(np.asarray(gradient(True)[:, :, 1:][mask[:, :, 1:]]).any(-1))
    assert np.any(np.asarray(gradient(False)[:, :, 0]) != 0)


def test_detached_trunk_leaves_the_unembedding_to_the_main_head():
    hidden, unembedding, targets, mask, ce_scale, kl_scale = problem()
    options = {"distillation": Distillation(7, 1.0, "forward", True), "chunk_rows": 7}

    def gradient(ce_scale, kl_scale, detach_trunk):
        def loss(w):
            return fused_loss(hidden, w, targets, mask, ce_scale, kl_scale, detach_trunk=detach_trunk, **options)[0]

        return jax.grad(loss)(unembedding)

    alone = gradient(ce_scale * jnp.array([1.0, 0, 0]), kl_scale * 0, False)
    np.testing.assert_allclose(gradient(ce_scale, kl_scale, True), alone, atol=1e-7)
    assert np.abs(np.asarray(gradient(ce_scale, kl_scale, False) - alone)).max() > 1e-4


def test_sums_are_reported_without_gradient():
    hidden, unembedding, *rest = problem()

    def reported(hidden):
        sums = fused_loss(hidden, unembedding, *rest, distillation=Distillation(7, 1.0, "forward", True))[1]
        return jnp.sum(sums.ce) + jnp.sum(sums.kl) + jnp.sum(sums.agreement)

    assert np.all(np.asarray(jax.grad(reported)(hidden)) == 0)


def test_nothing_supervised_gives_zero_and_no_nan():
    hidden, unembedding, targets, mask, *scales = problem()
    scales = [scale * 0 for scale in scales]  # what the objective hands over when the weights are zero
    loss = jax.value_and_grad(
        lambda h: fused_loss(h, unembedding, targets, mask & False, *scales, distillation=ALL[0])[0]
    )
    value, gradient = loss(hidden)
    assert value == 0 and np.all(np.asarray(gradient) == 0)


def test_agreement_counts_equal_argmaxes():
    hidden, unembedding, targets, mask, *scales = problem()
    logits = np.einsum("btkd,vd->btkv", hidden, unembedding)
    best = logits.argmax(-1)
    _, sums = fused_loss(hidden, unembedding, targets, mask, *scales, distillation=None, chunk_rows=7)
    for k in range(1, K + 1):
        assert sums.agreement[k - 1] == np.sum((best[..., k] == best[..., 0]) & np.asarray(mask[..., k]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.integers(-5, 5).map(float) | st.floats(-(2.0**90), 2.0**90, width=32, allow_subnormal=False),
        min_size=2,
        max_size=30,
    ),
    st.data(),
)
def test_selection_against_sorting(values, data):
    """The n largest and all ties with the n-th, negative numbers, zeros and many ties included."""
    n = data.draw(st.integers(1, len(values)))
    row = np.asarray(values, np.float32) + np.float32(0)  # minus zero is ordered below zero; sorting holds them equal
    row = np.where(np.abs(row) < 1e-30, 0, row)  # denormals are flushed by XLA on CPU
    threshold = np.sort(row)[::-1][n - 1]
    np.testing.assert_array_equal(largest(jnp.asarray(row)[None], n)[0], row >= threshold)


def test_selection_keeps_ties_and_renormalises_over_them():
    teacher = jnp.array([[3.0, 1.0, 1.0, 0.0]])
    heads = jnp.array([[[0.0, 2.0, -1.0, 9.0]]])
    tied = divergence(teacher, heads, Distillation(2, 1.0, "forward", True))
    three = numpy_divergence(np.array([3.0, 1.0, 1.0]), np.array([0.0, 2.0, -1.0]), 3, 1.0, "forward")
    assert float(tied[0, 0]) == pytest.approx(three, rel=1e-5)


def test_large_logits_stay_finite():
    teacher, heads = jnp.array([[1e4, -1e4, 0.0, 5.0]]), jnp.array([[[-1e4, 1e4, 0.0, 5.0]]])
    for kl in ("forward", "reverse", "js"):
        value, gradient = jax.value_and_grad(
            lambda h, kl=kl: divergence(teacher, h, Distillation(3, 1.0, kl, True)).sum()
        )(heads)
        assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_argmax_is_the_first_largest():
    logits = jnp.array([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0], [jnp.nan, jnp.nan, jnp.nan]])
    assert argmax(logits).tolist()[:2] == [1, 0]
    assert 0 <= int(argmax(logits)[2]) < 3


def compiled(distillation, rows=512, vocabulary=512, heads=3, chunk=32):
    """The compiled loss with gradients; a single chunk would hide what a chunk costs."""
    hidden = jnp.zeros((1, rows, heads, 16))
    arguments = (hidden, jnp.zeros((vocabulary, 16)), jnp.zeros((1, rows), int), jnp.ones((1, rows, heads), bool))

    def loss(hidden, unembedding):
        scales = jnp.ones(heads), jnp.ones(heads - 1)
        return fused_loss(hidden, unembedding, *arguments[2:], *scales, distillation=distillation, chunk_rows=chunk)[0]

    return jax.jit(jax.grad(loss, (0, 1))).lower(*arguments[:2]).compile()


def test_never_more_than_chunks_of_logits():
    """A few buffers of a chunk's logits, and nothing that grows with the rows but hidden states and their gradients."""
    chunk_logits, hidden_states = 32 * 3 * 512 * 4, 512 * 3 * 16 * 4
    for rows in (512, 2048):
        found = compiled(Distillation(50, 1.0, "forward", True), rows=rows).memory_analysis().temp_size_in_bytes
        assert found < 8 * chunk_logits + 3 * hidden_states * rows / 512


def test_plain_mtp_compiles_no_divergence():
    plain, distilled = (compiled(d).cost_analysis()["flops"] for d in (None, Distillation(512, 1.0, "forward", True)))
    assert plain < distilled
    # One loop over chunks is left without selection, two with it.
    loops = [compiled(d).as_text().count(" while(") for d in (None, Distillation(50, 1.0, "forward", True))]
    assert loops[0] < loops[1]


def test_chunk_terms_total_is_the_scaled_sum():
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.normal(size=(6, K + 1, V)), jnp.float32)
    mask, targets = jnp.asarray(rng.random((6, K + 1)) < 0.6), jnp.asarray(rng.integers(0, V, 6))
    ce_scale, kl_scale = jnp.array([1.0, 0.3, 0.2]), jnp.array([0.5, 0.4])
    total, sums = chunk_terms(logits, targets, mask, ce_scale, kl_scale, Distillation(9, 1.0, "forward", True))
    assert float(total) == pytest.approx(float(sums.ce @ ce_scale + sums.kl @ kl_scale), rel=1e-6)
