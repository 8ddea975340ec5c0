"""Patterns against masks drawn in a loop, and kernels against the dense form, gradients included."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench.tpu import LIBRARY, WITHOUT_SPARSECORE, topology_mesh
from mtpd_jax.config import MeshConfig
from mtpd_jax.data.pipeline import Batch
from mtpd_jax.model import attention
from mtpd_jax.model.attention import (
    Documents,
    Drawn,
    Slots,
    attend,
    attend_by_cudnn,
    attend_by_splash,
    attend_by_triton,
    attend_densely,
    kernel_for,
)
from mtpd_jax.model.backbone import build_model
from mtpd_jax.platform import Platform, platform_of
from mtpd_jax.sharding import batch_sharding, make_mesh, within
from mtpd_jax.training.feasibility import check_attention
from mtpd_jax.training.optimizer import make_optimizer
from mtpd_jax.training.state import abstract_state, state_shardings
from mtpd_jax.training.step import make_step
from tests.builders import assert_trees_close, gradients, method_on, random_parameters, tiny_config

GPU = Platform("gpu", "NVIDIA H100 80GB HBM3")
PALLAS = {"splash": attend_by_splash, "triton": attend_by_triton}
LENGTHS = [(50, 90, 70, 46), (256,), (1,) * 100 + (156,), (3, 250, 3)]


def segments(length=256):
    """Documents of many lengths, in two rows with padding at the end."""
    rows = np.stack([np.repeat(np.arange(1, len(sizes) + 1), sizes) for sizes in LENGTHS])[:, :length]
    rows[0, -20:] = rows[3, -3:] = 0
    return jnp.asarray(rows, jnp.int32)


def problem(kv_heads=2, size=16, length=256, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (4, kv_heads, kv_heads, 4)
    return [jax.random.normal(key, (4, length, n, size), dtype) for key, n in zip(keys, heads, strict=True)]


def value_and_gradients(kernel, arrays, segment_ids):
    *inputs, cotangent = arrays

    def total(*inputs):
        out = kernel(*inputs, Documents(segment_ids))
        real = (segment_ids != 0)[:, :, None, None]  # what padding sees is never looked at
        return jnp.sum(jnp.where(real, out * cotangent, 0)), jnp.where(real, out, 0)

    (_, out), by_inputs = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*inputs)
    return out, by_inputs


def test_documents_see_what_is_earlier_in_the_same():
    ids = np.asarray(segments())
    mask = np.asarray(Documents(jnp.asarray(ids)).dense())
    for row, query, key in [(0, 5, 5), (0, 60, 49), (0, 60, 50), (0, 50, 60), (2, 99, 98), (3, 252, 3), (3, 252, 2)]:
        assert mask[row, query, key] == (key <= query and ids[row, query] == ids[row, key])
    assert np.all(np.triu(mask[1], 1) == 0) and np.all(np.tril(mask[1]) == np.tril(np.ones_like(mask[1])))


def test_slots_hold_positions_from_the_margin_on():
    mask = np.asarray(Slots(jnp.array([[2, 3], [-1, 0]]), 6, margin=1).dense())
    drawn = [["".join("x" if seen else "." for seen in query) for query in row] for row in mask]
    assert drawn == [[".xxx..", ".xxxx."], ["......", ".x...."]]


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("name", PALLAS)
def test_kernels_equal_the_dense_form(name, kv_heads):
    """Values and gradients, for packed documents and keys that query heads share."""
    arrays, segment_ids = problem(kv_heads), segments()
    found = value_and_gradients(functools.partial(PALLAS[name], interpret=True), arrays, segment_ids)
    assert_trees_close(found, value_and_gradients(attend_densely, arrays, segment_ids), 2e-6)
    ignored = value_and_gradients(functools.partial(PALLAS[name], interpret=True), arrays, segment_ids * 0 + 1)
    with pytest.raises(AssertionError):  # as they would if documents did not matter
        assert_trees_close(ignored, found, 1e-2)


@pytest.mark.parametrize("name", PALLAS)
def test_every_device_attends_to_its_own_rows_and_heads(name, monkeypatch):
    mesh, arrays, segment_ids = make_mesh(MeshConfig(2, 2, 2, 1)), problem(), segments()
    kernel, shapes = functools.partial(PALLAS[name], interpret=True), []
    of_device = attention._on_each_device

    def spy(attend, *arguments):
        def seen(query, *rest):
            shapes.append(query.shape)
            return attend(query, *rest)

        return of_device(seen, *arguments)

    monkeypatch.setattr(attention, "_on_each_device", spy)
    found = within(mesh, lambda: value_and_gradients(kernel, arrays, segment_ids))()
    assert set(shapes) == {(1, 256, 2, 16)}  # of four rows and four query heads
    assert_trees_close(found, value_and_gradients(attend_densely, arrays, segment_ids), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "remat"), [((1, 1, 1, 1), False), ((2, 2, 2, 1), True)], ids=str)
def test_a_model_with_a_kernel_is_the_model(monkeypatch, shape, remat):
    """Backbone and heads, in a step's gradients."""
    config = tiny_config(model__remat=remat, training__sequence_length=128, objective__chunk_rows=64)
    mesh = make_mesh(MeshConfig(*shape))
    rng = np.random.default_rng(0)
    ids = np.stack([np.repeat([1, 2, 3, 0], sizes) for sizes in [(30, 60, 30, 8), (100, 10, 10, 8)] * 4])
    positions = np.tile(np.arange(128), (8, 1))
    batch = Batch(*(jnp.asarray(a, jnp.int32)[None] for a in (rng.integers(1, 300, ids.shape), ids, positions)))
    dense = method_on(config, mesh)
    parameters = random_parameters(dense.model)

    def of(method):
        return jax.jit(lambda p: gradients(method, p, batch))(parameters)

    expected = of(dense)
    monkeypatch.setattr(Platform, "resolve", lambda self, model: dataclasses.replace(model, attention="splash"))
    calls = []

    def interpreted(*arguments):
        calls.append(arguments[0].shape)
        return attend_by_splash(*arguments, interpret=True)

    monkeypatch.setitem(attention.KERNELS, "splash", interpreted)
    assert_trees_close(of(method_on(config, mesh)), expected, 1e-5)
    assert len(calls) >= 2 and set(calls) == {(8, 128, 4, 8)}


def test_a_kernel_is_used_where_it_can_be():
    def of(kernel, rows, length, **changes):
        model = tiny_config(model__head_size=64).model
        return kernel_for(dataclasses.replace(model, attention=kernel, **changes), rows, length)

    assert of("splash", 4, 384) == "splash" and of("splash", 4, 200) == "dense"
    assert of("triton", 4, 192) == "triton" and of("triton", 4, 200) == "dense"
    assert of("dense", 4, 7) == "dense"
    assert of("cudnn", 4, 64, dtype="bfloat16") == "cudnn"
    assert of("cudnn", 4, 64) == of("cudnn", 4, 63, dtype="bfloat16") == "dense"
    assert of("cudnn", 4, 64, dtype="bfloat16", head_size=36) == "dense"
    mesh = make_mesh(MeshConfig(2, 2, 2, 1))
    shared = within(mesh, lambda: [of("splash", rows, 128) for rows in (8, 6, 1)])()
    assert shared == ["splash", "dense", "dense"]


def on_gpu(config):
    method = method_on(config)
    method.platform = GPU
    method.model = build_model(config, GPU)
    return method


def test_a_kernel_that_cannot_be_used_is_refused_or_said():
    """Refused where somebody asked for it, before anything is trained; said where ``auto`` stands for it."""
    assert check_attention(method_on(tiny_config())) == ""
    with pytest.raises(ValueError, match=r"config.model.attention = 'splash': expected auto or dense on cpu"):
        check_attention(method_on(tiny_config(model__attention="splash")))
    assert check_attention(on_gpu(tiny_config(training__sequence_length=128))) == ""
    note = check_attention(on_gpu(tiny_config(training__sequence_length=100)))
    assert note == "attention is dense, for triton attention needs rows of a multiple of 64 tokens, not 100"
    asked = tiny_config(training__sequence_length=100, model__attention="triton")
    with pytest.raises(ValueError, match=r"'triton': expected a kernel that can do it: it needs rows of a multiple"):
        check_attention(on_gpu(asked))
    with pytest.raises(ValueError, match=r"'cudnn': .* bfloat16 and a head_size of a multiple of 8"):
        check_attention(on_gpu(tiny_config(model__attention="cudnn")))
    # A method with a mask of its own.
    drawn = {
        "heads__num_heads": 0, "objective__mode": "standalone", "objective__source": "-", "objective__k_max": 4,
        "model__mask_embedding": True, "training__sequence_length": 128,
    }  # fmt: skip
    assert "attention is dense, for triton attention needs rows that attend" in check_attention(
        on_gpu(tiny_config(**drawn))
    )
    with pytest.raises(ValueError, match=r"'triton': expected a kernel that can do it: it needs rows that attend"):
        check_attention(on_gpu(tiny_config(**drawn, model__attention="triton")))


def test_a_mask_that_is_given_is_attended_to_densely():
    """Whatever the kernel, which knows documents only: here a block mask in which tokens see later ones."""
    arrays = problem(length=128)[:3]
    mask = jnp.asarray(np.random.default_rng(0).random((4, 128, 128)) < 0.5) | jnp.eye(128, dtype=bool)[None]
    found = attend("splash", *arrays, Drawn(mask))
    query, key, value = (np.asarray(array, np.float64) for array in arrays)
    for row, head in ((0, 0), (3, 3)):
        scores = query[row, :, head] @ key[row, :, head // 2].T / 4
        weights = np.where(mask[row], np.exp(scores), 0)
        expected = weights / weights.sum(-1, keepdims=True) @ value[row, :, head // 2]
        np.testing.assert_allclose(found[row, :, head], expected, rtol=1e-4, atol=1e-5)


def test_what_a_device_computes_is_asked_of_the_device():
    """Not of the machine that compiles: this one has no accelerator."""
    model = tiny_config(model__dtype="auto").model
    here = platform_of(jax.devices()[0])
    assert (here.resolve(model).dtype, here.resolve(model).attention) == ("float32", "dense")
    assert (GPU.resolve(model).dtype, GPU.resolve(model).attention) == ("bfloat16", "triton")
    assert GPU.peak_flops == 989e12 and here.peak_flops is None
    # A run is read elsewhere than where it was trained.
    assert here.resolve(tiny_config(model__attention="splash").model).attention == "dense"
    assert GPU.resolve(tiny_config(model__attention="cudnn").model).attention == "cudnn"


def lowered_for_cuda(kernel, dtype):
    *arrays, _ = problem(dtype=dtype)
    # Newer versions of JAX want to know which GPU, and older ones do not look.
    device = jax.sharding.AbstractDevice(GPU.device_kind, None, GPU.kind)
    axis = jax.sharding.AxisType.Auto
    mesh = jax.sharding.AbstractMesh((1,), ("one",), axis_types=(axis,), abstract_device=device)
    gradient = jax.grad(lambda *inputs: jnp.sum(kernel(*inputs, Documents(segments())).astype(jnp.float32)), (0, 1, 2))
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(gradient).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_kernels_are_lowered_for_a_gpu(monkeypatch):
    """Which need not be there: one kernel forward, two backward; cuDNN is handed the documents as a bias."""
    text = lowered_for_cuda(attend_by_triton, jnp.bfloat16)
    assert text.count("__gpu$xla.gpu.triton") == 3 and "256x256x" not in text
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    text = lowered_for_cuda(attend_by_cudnn, jnp.bfloat16)
    assert "__cudnn$fmhaScaleBiasSoftmax" in text and "__cudnn$fmhaScaleBiasSoftmaxBackward" in text


@pytest.mark.slow
@pytest.mark.skipif(not LIBRARY.exists(), reason="libtpu is not installed: make .cache/libtpu")
@pytest.mark.parametrize("length", [256, 200])
def test_a_step_for_a_tpu_has_its_dtype_and_its_kernel(length):
    """Compiled here for four chips: bfloat16 and splash attention, and no mask of the whole row, with ``auto``; the
    same step with rows that the kernel cannot cut is dense."""
    config = tiny_config(
        model__dtype="auto", training__sequence_length=length, model__head_size=64, model__width=128,
        training__batch_size=8, model__layers=3,
    )  # fmt: skip
    method, optimizer = method_on(config, topology_mesh(fsdp=2, tensor=2)), make_optimizer(config)
    state, sharding = abstract_state(method, optimizer), batch_sharding(method.mesh)
    batch = Batch(*[jax.ShapeDtypeStruct((1, 8, length), jnp.int32, sharding=sharding) for _ in range(3)])
    lowered = make_step(method, optimizer, state_shardings(state)).lower(state, batch)
    text = lowered.as_text()
    assert method.model.config.dtype == "bfloat16" and f"tensor<8x{length}x128xbf16>" in text
    assert ("tpu_custom_call" in text) == (length == 256)
    assert (f"{length}x{length}xi1>" in text) == (length == 200)
    if length == 256:
        assert "tpu_custom_call" in lowered.compile(compiler_options=WITHOUT_SPARSECORE).as_text()
