"""The loss in the forms that are compared: ours, and what one would write instead."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtpd_jax.losses.dense import dense_loss
from mtpd_jax.losses.fused import fused_loss
from mtpd_jax.losses.terms import Distillation
from mtpd_jax.platform import platform_of
from mtpd_jax.sharding import WHOLE, LastAxis, data_mesh

FORMS = ("fused", "chunked_remat", "dense_threshold", "dense_top_k")
OBJECTIVES = ("mtp_d", "mtp", "ntp")
# Products with the unembedding per head and row: logits, and the gradients of states and matrix; remat repeats one.
PRODUCTS = {"fused": 3, "chunked_remat": 4, "dense_threshold": 3, "dense_top_k": 3}


def distillation_of(objective: str, top_n: int) -> Distillation | None:
    """MTP-D's defaults; None for the objectives without distillation."""
    return Distillation(top_n, 1.0, "forward", True) if objective == "mtp_d" else None


def inputs(heads: int, rows: int, width: int, vocabulary: int, dtype: Any) -> tuple[jax.Array, ...]:
    """States of K+1 heads that agree in part, and logits with a standard deviation of about 3, as of trained models."""
    keys = jax.random.split(jax.random.key(0), 4)
    unembedding = jax.random.normal(keys[0], (vocabulary, width), jnp.float32) * width**-0.5
    shared = jax.random.normal(keys[1], (1, 1, rows, width))
    own = jax.random.normal(keys[2], (heads + 1, 1, rows, width))
    hidden = (3 * (0.9 * shared + 0.44 * own)).astype(dtype)
    targets = jax.random.randint(keys[3], (1, rows), 0, vocabulary)
    mask = jnp.ones((heads + 1, 1, rows), bool)
    beta = 1.0 if heads == 1 else 0.5
    ce_scale = jnp.array([1.0, *(0.3 / heads for _ in range(heads))]) / rows
    return hidden, unembedding, targets, mask, ce_scale, jnp.full(heads, beta / rows)


def chunked_remat(
    *arguments: jax.Array, distillation: Distillation | None, chunk_rows: int | None, vocabulary: LastAxis = WHOLE
) -> jax.Array:
    """The dense loss in chunks of rows, each recomputed in the backward pass: what one would write second."""
    hidden, unembedding, targets, mask, ce_scale, kl_scale = arguments
    rows = hidden.shape[2]
    size = min(chunk_rows or rows, rows)
    padding = -rows % size

    def cut(values: jax.Array, axis: int) -> jax.Array:
        widths = [(0, padding if i == axis else 0) for i in range(values.ndim)]
        shape = (*values.shape[:axis], -1, size, *values.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(values, widths).reshape(shape), axis, 0)

    @jax.checkpoint
    def of_chunk(unembedding: jax.Array, chunk: tuple[jax.Array, ...]) -> jax.Array:
        hidden, targets, mask = chunk
        return dense_loss(
            hidden, unembedding, targets, mask, ce_scale, kl_scale, distillation=distillation, selection="threshold",
            vocabulary=vocabulary,
        )  # fmt: skip

    chunks = cut(hidden, 2), cut(targets, 1), cut(mask, 2)
    totals = jax.lax.scan(lambda total, chunk: (total + of_chunk(unembedding, chunk), None), jnp.zeros(()), chunks)
    return totals[0]


def compile_form(
    form: str,
    arguments: tuple[Any, ...],
    distillation: Distillation | None,
    chunk_rows: int | None = None,
    mesh: Mesh | None = None,
) -> jax.stages.Compiled:
    """The compiled value and gradients, by hidden states and unembedding.

    Args:
      form: one of ``FORMS``.
      arguments: as ``inputs`` makes them, or their shapes.
      distillation: None for plain MTP.
      chunk_rows: of the chunked forms; None chooses for ``fused``, and is all rows for ``chunked_remat``.
      mesh: of the ``fused`` form; None: one device.
    """
    mesh = mesh or data_mesh(jax.devices()[:1])
    vocabulary = LastAxis(None, platform_of(mesh).on_cpu)  # every form searches as suits the device

    def total(hidden: jax.Array, unembedding: jax.Array, *rest: jax.Array) -> jax.Array:
        arguments = hidden, unembedding, *rest
        if form == "fused":
            return fused_loss(*arguments, distillation=distillation, mesh=mesh, chunk_rows=chunk_rows)[0]
        if form == "chunked_remat":
            return chunked_remat(*arguments, distillation=distillation, chunk_rows=chunk_rows, vocabulary=vocabulary)
        selection = form.removeprefix("dense_")
        return dense_loss(*arguments, distillation=distillation, selection=selection, vocabulary=vocabulary)

    return jax.jit(jax.value_and_grad(total, (0, 1))).lower(*arguments).compile()


def compile_products(arguments: tuple[jax.Array, ...], rows: int) -> jax.stages.Compiled:
    """The three bare products of some rows of all heads: the floor of every form, without softmax and accumulation."""
    hidden, unembedding = arguments[0], arguments[1]
    flat = jax.ShapeDtypeStruct((hidden.shape[0] * rows, hidden.shape[-1]), hidden.dtype)
    logits = jax.ShapeDtypeStruct((flat.shape[0], unembedding.shape[0]), hidden.dtype)
    matrix = jax.ShapeDtypeStruct(unembedding.shape, hidden.dtype)

    def products(flat: jax.Array, matrix: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        return (
            product("rd,vd->rv", flat, matrix), product("rv,vd->rd", gradient, matrix),
            product("rv,rd->vd", gradient, flat),
        )  # fmt: skip

    return jax.jit(products).lower(flat, matrix, logits).compile()
