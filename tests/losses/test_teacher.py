"""Another model as teacher, its logits beside the heads' a chunk at a time; tokens chosen without keeping logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpd_jax.config import MeshConfig
from mtpd_jax.losses.dense import dense_divergence
from mtpd_jax.losses.divergences import DIVERGENCES
from mtpd_jax.losses.fused import Teacher, fused_loss
from mtpd_jax.losses.scores import likeliest_tokens
from mtpd_jax.losses.terms import Distillation
from mtpd_jax.sharding import make_mesh
from tests.builders import assert_trees_close
from tests.losses.test_fused import B, D, T, V, one_device

WIDER = 20  # of the teacher


def problem(heads, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(heads, B, T, D)), jnp.float32)
    unembedding = jnp.asarray(rng.normal(size=(V, D)) * 0.7, jnp.float32)
    teacher = Teacher(
        jnp.asarray(rng.normal(size=(B, T, WIDER)), jnp.float32),
        jnp.asarray(rng.normal(size=(V, WIDER)) * 0.7, jnp.float32),
    )
    targets, mask = jnp.asarray(rng.integers(0, V, (B, T))), jnp.asarray(rng.random((heads, B, T)) < 0.7)
    scales = jnp.linspace(0.01, 0.03, heads), jnp.linspace(0.02, 0.05, heads)
    return hidden, unembedding, teacher, targets, mask, *scales


def dense(hidden, unembedding, teacher, targets, mask, ce_scale, kl_scale, distillation):
    logits = jnp.einsum("jbtd,vd->jbtv", hidden, unembedding).reshape(len(hidden), -1, V)
    told = jnp.einsum("btd,vd->btv", teacher.hidden, teacher.unembedding).reshape(1, -1, V)
    ce = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets.reshape(1, -1, 1), axis=-1)[..., 0]
    values = ce * ce_scale[:, None] + dense_divergence(told, logits, distillation) * kl_scale[:, None]
    return jnp.sum(jnp.where(mask.reshape(len(hidden), -1), values, 0))


def fused(hidden, unembedding, teacher, targets, mask, ce_scale, kl_scale, distillation, mesh=None, **options):
    return fused_loss(
        hidden, unembedding, targets, mask, ce_scale, kl_scale, distillation=distillation, teacher=teacher,
        mesh=mesh or one_device(), **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "heads", "top_n"),
    [("forward", 1, 7), ("forward", 3, V), *(pytest.param(kind, 1, 7, marks=pytest.mark.slow) for kind in DIVERGENCES)],
)
def test_all_heads_learn_from_another_model(kind, heads, top_n):
    """Values and gradients, of the main head like the others; a teacher of another width, in chunks of uneven rows."""
    arguments, distillation = problem(heads), Distillation(top_n, 1.5, kind, True)

    def both(loss, **options):
        def total(hidden, unembedding):
            found = loss(hidden, unembedding, *arguments[2:], distillation, **options)
            return found[0] if isinstance(found, tuple) else found

        return jax.jit(jax.value_and_grad(total, (0, 1)))(*arguments[:2])

    found = both(fused, chunk_rows=7)
    assert_trees_close(found, both(dense), 1e-5)
    assert np.abs(np.asarray(found[1][0][0])).max() > 1e-4
    alone, sums = fused(*arguments, distillation, chunk_rows=7)
    assert float(alone) == pytest.approx(float(found[0]), rel=1e-5)
    assert sums.ce.shape == sums.kl.shape == sums.agreement.shape == (heads,)


def test_the_teacher_gets_no_gradient_and_agreement_is_with_it():
    hidden, unembedding, teacher, targets, mask, *scales = problem(1)
    distillation = Distillation(V, 1.0, "forward", True)
    by_teacher = jax.grad(lambda one: fused(hidden, unembedding, one, targets, mask, *scales, distillation)[0])(teacher)
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(by_teacher))
    _, sums = fused(hidden, unembedding, teacher, targets, mask, *scales, distillation, chunk_rows=7)
    own = np.einsum("btd,vd->btv", hidden[0], unembedding).argmax(-1)
    told = np.einsum("btd,vd->btv", teacher.hidden, teacher.unembedding).argmax(-1)
    assert sums.agreement[0] == (np.asarray(mask[0]) & (own == told)).sum()


def test_the_teachers_own_states_diverge_by_nothing():
    hidden, unembedding, _, targets, mask, *scales = problem(1)
    same = Teacher(hidden[0], unembedding)
    _, sums = fused(hidden, unembedding, same, targets, mask, *scales, Distillation(V, 1.0, "forward", True))
    assert float(sums.kl[0]) == pytest.approx(0, abs=1e-5) and sums.agreement[0] == mask.sum()


@pytest.mark.parametrize("trunk", ["detached", "frozen"])
def test_what_the_unembedding_learns_is_the_trunks_affair(trunk):
    arguments = problem(2)
    distillation = Distillation(V, 1.0, "forward", True)

    def gradients(trunk, mask):
        def total(hidden, unembedding):
            rest = arguments[2], arguments[3], mask, *arguments[5:]
            return fused(hidden, unembedding, *rest, distillation, trunk=trunk, chunk_rows=7)[0]

        return jax.grad(total, (0, 1))(*arguments[:2])

    by_hidden, by_matrix = gradients(trunk, arguments[4])
    of_main = arguments[4].at[1].set(False)
    expected = {"detached": gradients("trained", of_main)[1]}
    assert_trees_close(by_hidden, gradients("trained", arguments[4])[0], 1e-6)
    assert_trees_close(by_matrix, expected.get(trunk, jnp.zeros((V, D))), 1e-6)


@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in [(2, 1, 1), (1, 1, 4)])], ids=str
)
def test_every_mesh_equals_one_device(sizes):
    hidden, unembedding, *rest = problem(1)
    distillation = Distillation(7, 1.0, "forward", True)
    mesh = make_mesh(MeshConfig(*sizes, 1), jax.devices()[: int(np.prod(sizes))])

    def both(mesh, chunk_rows):
        def total(hidden, unembedding):
            return fused(hidden, unembedding, *rest, distillation, mesh=mesh, chunk_rows=chunk_rows)[0]

        return jax.jit(jax.value_and_grad(total, (0, 1)))(hidden, unembedding)

    assert_trees_close(both(mesh, 3), both(one_device(), 7), 3e-6)
    chosen = likeliest_tokens(hidden[0], unembedding, jnp.ones((B, T), bool), mesh)
    np.testing.assert_array_equal(chosen, np.einsum("btd,vd->btv", hidden[0], unembedding).argmax(-1))


def test_tokens_are_chosen_where_they_are_wanted(monkeypatch):
    """In small chunks, of which those that nobody wants are not computed: NaN there would show."""
    monkeypatch.setattr("mtpd_jax.losses.fused._CHUNK_LOGITS_ON_CPU", 8 * V)
    hidden, unembedding, _, _, mask, *_ = problem(1)
    wanted = mask[0].at[:, 3:7].set(False).at[1].set(False)
    poisoned = jnp.where(wanted[..., None], hidden[0], jnp.nan)
    found = likeliest_tokens(poisoned, unembedding, wanted, one_device())
    expected = np.einsum("btd,vd->btv", hidden[0], unembedding).argmax(-1)
    np.testing.assert_array_equal(found, np.where(wanted, expected, 0))
    assert np.asarray(wanted).sum() > 10

    def choose(hidden):
        return likeliest_tokens(hidden, unembedding, wanted, one_device())

    program = jax.jit(choose).lower(hidden[0]).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * B * T * V
