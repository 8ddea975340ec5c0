"""The production form as a whole: chunks, masks, dtypes, meshes, and what it compiles to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.bench.tpu import largest_collective
from mtpd_jax.config import MeshConfig
from mtpd_jax.losses import fused
from mtpd_jax.losses.dense import dense_loss
from mtpd_jax.losses.divergences import DIVERGENCES
from mtpd_jax.losses.fused import choose_tiling, fused_loss
from mtpd_jax.losses.terms import Distillation
from mtpd_jax.sharding import data_mesh, make_mesh
from tests.builders import assert_trees_close

B, T, K, D, V = 4, 10, 2, 12, 48
FORWARD = Distillation(7, 1.0, "forward", True)


def problem(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(K + 1, B, T, D)), dtype)
    unembedding = jnp.asarray(rng.normal(size=(V, D)) * 0.7, jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)))
    mask = jnp.asarray(rng.random((K + 1, B, T)) < 0.7)
    return hidden, unembedding, targets, mask, jnp.array([1.0, 0.1, 0.2]) / 30, jnp.array([0.5, 0.7]) / 30


def one_device():
    return data_mesh(jax.devices()[:1])


def value_and_gradients(arguments, distillation=FORWARD, loss=fused_loss, **options):
    hidden, unembedding, *rest = arguments
    if loss is fused_loss:
        options.setdefault("mesh", one_device())

    def total(hidden, unembedding):
        result = loss(hidden, unembedding, *rest, distillation=distillation, **options)
        return result[0] if isinstance(result, tuple) else result

    return jax.jit(jax.value_and_grad(total, (0, 1)))(hidden, unembedding)


def reference(arguments, distillation=FORWARD):
    with jax.enable_x64(True):
        wide = [a.astype(jnp.float64) if a.dtype != bool and a.ndim != 2 else a for a in map(jnp.asarray, arguments)]
        wide[1] = jnp.asarray(arguments[1], jnp.float64)
        return jax.tree.map(np.asarray, value_and_gradients(wide, distillation, dense_loss))


@pytest.mark.parametrize("kind", [*DIVERGENCES, None])
@pytest.mark.parametrize("top_n", [7, V])
def test_equals_float64(kind, top_n):
    """Values and gradients, with chunks that do not divide the rows."""
    distillation = kind and Distillation(top_n, 1.5, kind, False)
    arguments = problem()
    found = value_and_gradients(arguments, distillation, chunk_rows=7)
    assert_trees_close(found, reference(arguments, distillation), 3e-6)
    # Without gradients it is another program.
    alone, _ = fused_loss(*arguments, distillation=distillation, mesh=one_device(), chunk_rows=7)
    assert_trees_close(alone, found[0], 1e-6)


@pytest.mark.parametrize("block", [20, 24, 48, 100])
def test_the_unembeddings_gradient_in_blocks(monkeypatch, block):
    """Blocks that divide the vocabulary and blocks that do not, and one that holds more than all of it."""
    monkeypatch.setattr(fused, "_BLOCK_ELEMENTS", block * D)
    arguments = problem()
    assert_trees_close(value_and_gradients(arguments, chunk_rows=8), reference(arguments), 3e-6)


@pytest.mark.parametrize(("heads", "rows", "vocabulary", "chunk"), [(1, 1, 3, None), (2, 5, 131, 1), (5, 33, 64, 32)])
def test_shapes(heads, rows, vocabulary, chunk):
    rng = np.random.default_rng(0)
    arguments = (
        jnp.asarray(rng.normal(size=(heads, 1, rows, 8)), jnp.float32),
        jnp.asarray(rng.normal(size=(vocabulary, 8)), jnp.float32),
        jnp.asarray(rng.integers(0, vocabulary, (1, rows))),
        jnp.ones((heads, 1, rows), bool),
        jnp.full(heads, 0.1),
        jnp.full(heads - 1, 0.3),
    )
    found = value_and_gradients(arguments, chunk_rows=chunk)
    assert_trees_close(found, reference(arguments), 3e-6)


@pytest.mark.parametrize(
    "masked",
    [np.s_[1], np.s_[:, 1], np.s_[:, :3], np.s_[:, :, 2:6], np.s_[:]],
    ids=["a head", "a sequence", "most", "parts", "everything"],
)
def test_masks(masked):
    """What is masked does not count, in chunks that are skipped and in those that are not; NaN there stays there."""
    hidden, unembedding, targets, mask, *scales = problem()
    mask = np.ones_like(mask)
    mask[masked] = False
    mask = jnp.asarray(mask)
    expected = reference((hidden, unembedding, targets, mask, *scales))
    assert_trees_close(value_and_gradients((hidden, unembedding, targets, mask, *scales), chunk_rows=5), expected, 3e-6)
    poisoned = jnp.where(mask[..., None], hidden, jnp.nan)
    value, gradients = value_and_gradients((poisoned, unembedding, targets, mask, *scales), chunk_rows=5)
    assert_trees_close((value, gradients[0]), (expected[0], expected[1][0]), 3e-6)


def test_chunks_with_nothing_to_supervise_are_not_computed():
    """Their NaN would reach the unembedding's gradient, as zero times NaN."""
    hidden, unembedding, targets, mask, *scales = problem()
    mask = jnp.ones_like(mask).at[:, 1:3].set(False)
    poisoned = hidden.at[:, 1:3].set(jnp.nan)
    _, gradients = value_and_gradients((poisoned, unembedding, targets, mask, *scales), chunk_rows=T)
    expected = reference((hidden, unembedding, targets, mask, *scales))
    assert_trees_close(gradients[1], expected[1][1], 3e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_bfloat16_inputs(kind):
    hidden, unembedding, *rest = problem(jnp.bfloat16)
    rounded = unembedding.astype(jnp.bfloat16).astype(jnp.float32)
    distillation = Distillation(7, 1.0, kind, True)
    value, gradients = value_and_gradients((hidden, rounded, *rest), distillation, chunk_rows=7)
    expected, wanted = reference((hidden.astype(jnp.float32), rounded, *rest), distillation)
    assert gradients[0].dtype == jnp.bfloat16 and gradients[1].dtype == jnp.float32
    assert float(value) == pytest.approx(float(expected), rel=1e-5)  # products of bfloat16 numbers are exact in float32
    assert_trees_close(gradients, wanted, 6e-3)  # the logits' gradient is rounded to bfloat16


MESHES = [(2, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 2)]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["forward", "lk", None])
def test_every_mesh_equals_one_device(sizes, kind):
    distillation = kind and Distillation(7, 1.0, kind, False)
    arguments = problem()
    mesh = make_mesh(MeshConfig(*sizes, 1), jax.devices()[: int(np.prod(sizes))])
    found = value_and_gradients(placed(arguments, mesh), distillation, chunk_rows=3, mesh=mesh)
    assert_trees_close(found, value_and_gradients(arguments, distillation, chunk_rows=7), 3e-6)


def placed(arguments, mesh):
    """As the model shards them: rows over data and fsdp, the unembedding's tokens over tensor, its width over fsdp."""
    rows, states = PartitionSpec(("data", "fsdp")), PartitionSpec(None, ("data", "fsdp"))
    specs = (states, PartitionSpec("tensor", "fsdp"), rows, states, PartitionSpec(), PartitionSpec())
    return [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arguments, specs, strict=True)]


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_every_device_does_its_own_share(axis):
    """Of the products; and with the vocabulary split, nothing larger than the hidden states' gradient travels."""
    rows, heads, width, vocabulary, devices = 256, 3, 64, 512, 4
    mesh = make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1, "expert": 1, axis: devices}), jax.devices()[:4])
    arguments = placed(example(rows, heads, width, vocabulary, sequences=8), mesh)
    compiled = compile_gradients(arguments, FORWARD, 16, mesh)
    product = 2 * heads * width * vocabulary * rows
    # A chunk's products, as the compiler counts the loop's body: 16 rows whether all or a quarter of a row's tokens.
    chunks = rows // 16 / (devices if axis == "fsdp" else 1)
    per_device = compiled.cost_analysis()["flops"] * chunks
    assert 3 * product / devices < per_device < 4 * product / devices
    if axis == "tensor":
        assert 0 < largest_collective(compiled.as_text()) <= rows * heads * width


def example(rows, heads, width, vocabulary, sequences=1, dtype=jnp.float32):
    return (
        jnp.zeros((heads, sequences, rows // sequences, width), dtype),
        jnp.zeros((vocabulary, width)),
        jnp.zeros((sequences, rows // sequences), jnp.int32),
        jnp.ones((heads, sequences, rows // sequences), bool),
        jnp.ones(heads),
        jnp.ones(heads - 1),
    )


def compile_gradients(arguments, distillation, chunk, mesh=None):
    mesh = mesh or one_device()

    def loss(hidden, unembedding, *rest):
        return fused_loss(hidden, unembedding, *rest, distillation=distillation, chunk_rows=chunk, mesh=mesh)[0]

    return jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()


def temp_bytes(rows=512, heads=3, vocabulary=2048, chunk=32):
    compiled = compile_gradients(example(rows, heads, 16, vocabulary), FORWARD, chunk)
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_neither_heads_nor_vocabulary_nor_rows():
    """But for the hidden states and their gradients, and the unembedding's; chunks have equal numbers of logits."""
    hidden_states = 512 * 3 * 16 * 4
    base = temp_bytes()
    assert temp_bytes(rows=2048) - base <= 2 * 3 * hidden_states  # states and gradients, three times as many more
    assert temp_bytes(heads=12, chunk=8) - base <= 2 * 3 * hidden_states
    unembedding = 2048 * 16 * 4
    assert temp_bytes(vocabulary=8192, chunk=8) - base <= 2 * 3 * unembedding
    chunk_logits = 32 * 3 * 2048 * 4
    assert base <= 4 * chunk_logits + 2 * hidden_states + 2 * unembedding


def test_plain_mtp_compiles_no_divergence():
    def loops(distillation):
        return compile_gradients(example(64, 3, 16, 512), distillation, 32).as_text().count(" while(")

    assert loops(None) == loops(Distillation(512, 1.0, "forward", True)) < loops(FORWARD)


def test_teacher_gets_no_gradient_from_the_divergence():
    hidden, unembedding, targets, mask, ce_scale, kl_scale = problem()

    def gradient(detach):
        arguments = hidden, unembedding, targets, mask, ce_scale * 0, kl_scale
        return value_and_gradients(arguments, Distillation(7, 1.0, "forward", detach))[1][0]

    assert np.all(np.asarray(gradient(True)[0]) == 0)
    assert np.all(np.asarray(gradient(True)[1:][mask[1:]]).any(-1))
    assert np.any(np.asarray(gradient(False)[0]) != 0)


def test_detached_trunk_leaves_the_unembedding_to_the_main_head():
    hidden, unembedding, targets, mask, ce_scale, kl_scale = problem()

    def gradient(ce_scale, kl_scale, trunk):
        arguments = hidden, unembedding, targets, mask, ce_scale, kl_scale
        return value_and_gradients(arguments, trunk=trunk, chunk_rows=7)[1][1]

    alone = gradient(ce_scale * jnp.array([1.0, 0, 0]), kl_scale * 0, "trained")
    np.testing.assert_allclose(gradient(ce_scale, kl_scale, "detached"), alone, atol=1e-7)
    assert np.abs(np.asarray(gradient(ce_scale, kl_scale, "trained") - alone)).max() > 1e-4


@pytest.mark.parametrize("shape", [None, (2, 2, 2, 1)], ids=str)
def test_a_frozen_trunk_has_no_gradient_and_the_heads_have_theirs(shape):
    arguments = problem()
    mesh = make_mesh(MeshConfig(*shape)) if shape else one_device()
    value, (by_hidden, by_matrix) = value_and_gradients(arguments, trunk="frozen", chunk_rows=7, mesh=mesh)
    expected, (wanted, _) = value_and_gradients(arguments, chunk_rows=7)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert_trees_close(by_hidden[1:], wanted[1:], 1e-6)
    assert np.any(np.asarray(wanted[0]) != 0)
    assert not np.any(np.asarray(by_hidden[0])) and not np.any(np.asarray(by_matrix))


def test_sums_are_reported_without_gradient():
    hidden, unembedding, *rest = problem()

    def reported(hidden):
        sums = fused_loss(hidden, unembedding, *rest, distillation=FORWARD, mesh=one_device())[1]
        return jnp.sum(sums.ce) + jnp.sum(sums.kl) + jnp.sum(sums.agreement)

    assert np.all(np.asarray(jax.grad(reported)(hidden)) == 0)


def test_total_is_the_scaled_sum():
    *arrays, ce_scale, kl_scale = problem()
    total, sums = fused_loss(*arrays, ce_scale, kl_scale, distillation=FORWARD, mesh=one_device(), chunk_rows=7)
    assert float(total) == pytest.approx(float(sums.ce @ ce_scale + sums.kl @ kl_scale), rel=1e-6)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_tilings_cover_the_rows(on_cpu):
    for rows in (1, 7, 64, 8192):
        for heads in (1, 5, 17):
            for vocabulary in (257, 4096, 122_880):
                tiling = choose_tiling(rows, heads, vocabulary, 256, None, on_cpu)
                assert tiling.chunk_rows % tiling.group_rows == 0 and 1 <= tiling.vocabulary_block <= vocabulary
                chunks = -(-rows // tiling.chunk_rows)
                assert chunks * tiling.chunk_rows < rows + tiling.chunk_rows  # padding is less than a chunk
