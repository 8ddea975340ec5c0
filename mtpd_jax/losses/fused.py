"""The production form of the loss: hidden states in, total and gradients out, never more than a chunk of logits alive.

The gradients are formed in the forward pass, while a chunk's logits are there, so that the backward pass only scales
them: three products with the unembedding per head instead of the four of chunking with rematerialisation. This needs
every term's factor before the first chunk runs, which is why the caller counts the weights first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from mtpd_jax.losses.terms import Distillation, LossSums, chunk_terms, zero_sums
from mtpd_jax.shapes import Array, Bool, Float, Int
from mtpd_jax.sharding import BATCH_AXES

# Logits alive at once, per device, over all heads of a chunk: what stays in a CPU's cache, and what keeps an
# accelerator's matrix units busy at a cost of 256 MB. Our choice.
_LOGITS_ON_CPU = 1 << 20
_LOGITS_ON_ACCELERATOR = 1 << 26


def choose_chunk_rows(rows: int, heads: int, vocabulary: int) -> int:
    """Rows per chunk, from the number of rows on a device, of logit rows per row (K+1) and of V."""
    budget = _LOGITS_ON_CPU if jax.default_backend() == "cpu" else _LOGITS_ON_ACCELERATOR
    limit = max(8, budget // (heads * vocabulary) // 8 * 8)
    chunks = -(-rows // limit)
    return -(-rows // chunks)


def fused_loss(
    hidden: Float[Array, "B T J D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T J"],
    ce_scale: Float[Array, " J"],
    kl_scale: Float[Array, " K"],
    *,
    distillation: Distillation | None,
    detach_trunk: bool = False,
    chunk_rows: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], LossSums]:
    """The total loss of rows aligned by target, differentiable in ``hidden`` and ``unembedding``.

    Args:
      hidden: [B, T, K+1, D]; at [b, j], the states of all heads that predict ``targets[b, j]``, main head first.
      unembedding: [V, D] in float32; products run in the dtype of ``hidden``, sums in float32.
      targets: [B, T].
      mask: [B, T, K+1]; which heads are supervised where.
      ce_scale, kl_scale: [K+1] and [K]; coefficient / weight of each term, the weight counted over the whole step.
      distillation: how heads are compared with the main head; None for cross entropy alone.
      detach_trunk: the unembedding gets a gradient from the main head's cross entropy only.
      chunk_rows: rows (of B x T on a device) whose logits are alive at once; None: chosen from the shapes.
      mesh: with one, B is split over the axes ``BATCH_AXES``, every device works on its own rows, and the
        unembedding's gradient is summed over devices once.

    Returns:
      The total, and the sums behind it, which carry no gradient.
    """
    split = mesh is not None and int(np.prod([mesh.shape[axis] for axis in BATCH_AXES])) > 1
    return _loss((distillation, detach_trunk, chunk_rows, mesh if split else None),
                 hidden, unembedding, targets, mask, ce_scale, kl_scale)  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(static: Any, *arrays: Array) -> tuple[Array, LossSums]:
    total, sums, _ = _over_mesh(static, False, arrays)
    return total, sums


def _forward(static: Any, *arrays: Array) -> tuple[tuple[Array, LossSums], tuple[Array, Array]]:
    total, sums, gradients = _over_mesh(static, True, arrays)
    return (total, sums), gradients


def _backward(static: Any, gradients: tuple[Array, Array], cotangents: tuple[Array, LossSums]) -> tuple[Any, ...]:
    hidden_gradient, unembedding_gradient = gradients
    scale, _ = cotangents
    return (scale * hidden_gradient).astype(hidden_gradient.dtype), scale * unembedding_gradient, None, None, None, None


_loss.defvjp(_forward, _backward)


def _over_mesh(static: Any, with_gradients: bool, arrays: tuple[Array, ...]) -> Any:
    """Runs the chunks, on each device's own rows if there is a mesh.

    Left to the partitioner, the loop over chunks would run on every device over all rows, because the split axis of
    the rows becomes the axis of the loop; and the unembedding's gradient would be reduced once per chunk.
    """
    distillation, detach_trunk, chunk_rows, mesh = static
    run = functools.partial(_over_chunks, distillation, detach_trunk, chunk_rows, with_gradients)
    if mesh is None:
        return run(*arrays)

    def run_and_reduce(*local: Array) -> Any:
        total, sums, gradients = run(*local)
        if gradients is not None:
            gradients = gradients[0], jax.lax.psum(gradients[1], BATCH_AXES)
        return *jax.lax.psum((total, sums), BATCH_AXES), gradients

    rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    return jax.shard_map(
        run_and_reduce,
        mesh=mesh,
        in_specs=(rows, whole, rows, rows, whole, whole),
        out_specs=(whole, whole, (rows, whole) if with_gradients else None),
        # The tensor axis stays with the partitioner, which splits the vocabulary and reduces what crosses it.
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )(*arrays)


def _over_chunks(
    distillation: Distillation | None,
    detach_trunk: bool,
    chunk_rows: int | None,
    with_gradients: bool,
    hidden: Array,
    unembedding: Array,
    targets: Array,
    mask: Array,
    ce_scale: Array,
    kl_scale: Array,
) -> tuple[Array, LossSums, tuple[Array, Array] | None]:
    batch, length, heads, width = hidden.shape
    rows, vocabulary = batch * length, unembedding.shape[0]
    size = min(chunk_rows, rows) if chunk_rows else choose_chunk_rows(rows, heads, vocabulary)
    chunks = -(-rows // size)
    padding = chunks * size - rows

    def cut(values: Array) -> Array:
        """[B, T, …] -> [chunks, size, …]; the rows that fill up the last chunk are masked out."""
        flat = values.reshape(rows, *values.shape[2:])
        padded = jnp.pad(flat, ((0, padding),) + ((0, 0),) * (flat.ndim - 1))
        return padded.reshape(chunks, size, *flat.shape[1:])

    matrix_VxD = unembedding.astype(hidden.dtype)
    terms = functools.partial(chunk_terms, distillation=distillation)

    def one_chunk(carry: Any, chunk: tuple[Array, Array, Array]) -> tuple[Any, Array | None]:
        (total, sums), matrix_gradient = carry
        hidden_PxKxD, targets_P, mask_PxK = chunk
        flat_RxD = hidden_PxKxD.reshape(size * heads, width)
        logits_RxV = jnp.einsum("rd,vd->rv", flat_RxD, matrix_VxD, preferred_element_type=jnp.float32)
        arguments = (logits_RxV.reshape(size, heads, vocabulary), targets_P, mask_PxK, ce_scale, kl_scale)
        if not with_gradients:
            value = terms(*arguments)
            return (jax.tree.map(jnp.add, (total, sums), value), matrix_gradient), None
        value, logits_gradient = jax.value_and_grad(terms, has_aux=True)(*arguments)
        logits_gradient = logits_gradient.astype(hidden.dtype)
        hidden_gradient = jnp.einsum("pkv,vd->pkd", logits_gradient, matrix_VxD)
        counted = slice(0, 1) if detach_trunk else slice(None)
        matrix_gradient += jnp.einsum(
            "rv,rd->vd",
            logits_gradient[:, counted].reshape(-1, vocabulary),
            hidden_PxKxD[:, counted].reshape(-1, width),
            preferred_element_type=jnp.float32,
        )
        return (jax.tree.map(jnp.add, (total, sums), value), matrix_gradient), hidden_gradient

    zero = jnp.zeros((), jnp.float32)
    start = ((zero, zero_sums(heads - 1)), jnp.zeros(unembedding.shape, jnp.float32) if with_gradients else zero)
    ((total, sums), matrix_gradient), hidden_gradient = jax.lax.scan(
        one_chunk, start, (cut(hidden), cut(targets), cut(mask))
    )
    if hidden_gradient is None:
        return total, sums, None
    hidden_gradient = hidden_gradient.reshape(chunks * size, heads, width)[:rows].reshape(hidden.shape)
    return total, sums, (hidden_gradient, matrix_gradient)
