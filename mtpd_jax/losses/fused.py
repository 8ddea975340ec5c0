"""The production form of the loss: hidden states in, total and gradients out, never more than a chunk of logits alive.

The gradients are formed in the forward pass, while a chunk's logits are there, so that the backward pass only scales
them: three products with the unembedding per head instead of the four of chunking with rematerialisation. This needs
every term's factor before the first chunk runs, which is why the caller counts the weights first.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mtpd_jax.losses.terms import Distillation, LossSums, chunk_loss, zero_sums
from mtpd_jax.losses.vocabulary import Vocabulary
from mtpd_jax.shapes import Array, Bool, Float, Int
from mtpd_jax.sharding import BATCH_AXES, VOCABULARY_AXIS


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the rows of a device are cut. Every choice is ours, by measurement (``experiments/bench/loss.py``).

    Attributes:
      chunk_rows: rows whose logits are alive at once. Each chunk reads the unembedding twice and its gradient once,
        so that a chunk has to be large enough for the products to outweigh this.
      group_rows: rows of a chunk whose softmaxes are formed together; on a CPU as many as its cache holds.
      vocabulary_block: entries of the unembedding whose gradient is added to at once, for the same reason.
    """

    chunk_rows: int
    group_rows: int
    vocabulary_block: int


def choose_tiling(rows: int, heads: int, vocabulary: int, width: int, chunk_rows: int | None = None) -> Tiling:
    """Chooses from the shapes: rows on a device, all heads (K+1), the device's part of V, and D.

    Args:
      rows, heads, vocabulary, width: see above.
      chunk_rows: overrides the choice of the chunk; None chooses.
    """
    on_cpu = jax.default_backend() == "cpu"
    if chunk_rows is None:
        # Rows of logits (P x J) per chunk: in proportion to D on a CPU, to the ratio of speed to bandwidth elsewhere.
        limit = max(width * 5 // 8, (1 << 20) // vocabulary) if on_cpu else max(2048, (1 << 26) // vocabulary)
        chunk_rows = max(8, limit // heads // 8 * 8)
        chunks = -(-rows // chunk_rows)
        chunk_rows = -(-rows // chunks)
    chunk_rows = min(chunk_rows, rows)
    if not on_cpu:
        return Tiling(chunk_rows, chunk_rows, vocabulary)
    group_rows = min(chunk_rows, max(1, (5 << 19) // (heads * vocabulary)))
    chunk_rows = -(-chunk_rows // group_rows) * group_rows
    return Tiling(chunk_rows, group_rows, min(vocabulary, max(1, (1 << 21) // width)))


def fused_loss(
    hidden: Float[Array, "J B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "J B T"],
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
      hidden: [K+1, B, T, D]; at [:, b, j], the states of all heads that predict ``targets[b, j]``, main head first.
      unembedding: [V, D] in float32; products run in the dtype of ``hidden``, sums in float32.
      targets: [B, T].
      mask: [K+1, B, T]; which heads are supervised where. Chunks in which nothing is supervised are not computed.
      ce_scale, kl_scale: [K+1] and [K]; coefficient / weight of each term, the weight counted over the whole step.
      distillation: how heads are compared with the main head; None for cross entropy alone.
      detach_trunk: the unembedding gets a gradient from the main head's cross entropy only.
      chunk_rows: rows (of B x T on a device) whose logits are alive at once; None: chosen from the shapes.
      mesh: with one, B is split over ``BATCH_AXES`` and V over ``VOCABULARY_AXIS``; every device works on its own
        rows and tokens, and the unembedding's gradient is summed over devices once.

    Returns:
      The total, and the sums behind it, which carry no gradient.
    """
    static = (distillation, detach_trunk, chunk_rows, mesh if mesh is not None and mesh.size > 1 else None)
    return _loss(static, hidden, unembedding, targets, mask, ce_scale, kl_scale)


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
    """Runs the chunks, on each device's own rows and tokens if there is a mesh.

    Left to the partitioner, the loop over chunks would run on every device over all rows, because the split axis of
    the rows becomes the axis of the loop; and the unembedding's gradient would be reduced once per chunk.
    """
    distillation, detach_trunk, chunk_rows, mesh = static
    hidden, unembedding, *rest = arrays
    # Cast before it is gathered, so that half the bytes travel.
    arrays = hidden, unembedding.astype(hidden.dtype), *rest
    if mesh is None:
        return _over_chunks(distillation, detach_trunk, chunk_rows, with_gradients, Vocabulary(), *arrays)
    vocabulary = Vocabulary(VOCABULARY_AXIS if mesh.shape[VOCABULARY_AXIS] > 1 else None)

    def run_and_reduce(*local: Array) -> Any:
        total, sums, gradients = _over_chunks(
            distillation, detach_trunk, chunk_rows, with_gradients, vocabulary, *local
        )
        if gradients is not None:
            gradients = gradients[0], jax.lax.psum(gradients[1], BATCH_AXES)
        return *jax.lax.psum((total, sums), BATCH_AXES), gradients

    states, tokens, whole = PartitionSpec(None, BATCH_AXES), PartitionSpec(VOCABULARY_AXIS), PartitionSpec()
    return jax.shard_map(
        run_and_reduce,
        mesh=mesh,
        in_specs=(states, tokens, PartitionSpec(BATCH_AXES), states, whole, whole),
        out_specs=(whole, whole, (states, tokens) if with_gradients else None),
        check_vma=False,
    )(*arrays)


def _over_chunks(
    distillation: Distillation | None,
    detach_trunk: bool,
    chunk_rows: int | None,
    with_gradients: bool,
    vocabulary: Vocabulary,
    hidden: Array,
    matrix: Array,
    targets: Array,
    mask: Array,
    ce_scale: Array,
    kl_scale: Array,
) -> tuple[Array, LossSums, tuple[Array, Array] | None]:
    heads, width, rows = hidden.shape[0], hidden.shape[-1], targets.size
    tiling = choose_tiling(rows, heads, matrix.shape[0], width, chunk_rows)
    size = tiling.chunk_rows
    chunks = -(-rows // size)
    padding = chunks * size - rows
    # Rows with nothing to supervise go to the end, where the loop does not come.
    hidden_JxRxD = hidden.reshape(heads, rows, width)
    targets_R, mask_JxR = targets.reshape(rows), mask.reshape(heads, rows)
    hidden_JxRxD = jnp.pad(hidden_JxRxD, ((0, 0), (0, padding), (0, 0)))
    targets_R, mask_JxR = jnp.pad(targets_R, (0, padding)), jnp.pad(mask_JxR, ((0, 0), (0, padding)))

    terms = functools.partial(
        chunk_loss, ce_scale=ce_scale, kl_scale=kl_scale, distillation=distillation, vocabulary=vocabulary
    )

    def one_chunk(index: Array, carry: Any) -> Any:
        sums, gradients = carry
        start = index * size

        def in_groups(values: Array) -> Array:
            """[J, rows, …] -> the chunk's rows as [groups, J, rows of a group, …]."""
            chunk = jax.lax.dynamic_slice_in_dim(values, start, size, 1)
            return jnp.moveaxis(chunk.reshape(chunk.shape[0], -1, tiling.group_rows, *chunk.shape[2:]), 1, 0)

        hidden_QxJxPxD = in_groups(hidden_JxRxD)
        # Flat rows: products over several axes at once are slower on TPU.
        hidden_RxD = hidden_QxJxPxD.reshape(-1, width)
        logits_RxV = jnp.einsum("rd,vd->rv", hidden_RxD, matrix, preferred_element_type=jnp.float32)
        logits = logits_RxV.reshape(*hidden_QxJxPxD.shape[:3], -1)
        found, gradient = _map(
            lambda logits, teacher, targets, mask: terms(logits, teacher, targets[0], mask),
            logits, logits[:, :1], in_groups(targets_R[None]), in_groups(mask_JxR),
        )  # fmt: skip
        sums = jax.tree.map(lambda total, part: total + jnp.sum(part, axis=0), sums, found)
        if not with_gradients:
            return sums, gradients
        gradient = gradient.astype(hidden.dtype)
        by_hidden, by_matrix = gradients
        states = jnp.einsum(
            "rv,vd->rd", gradient.reshape(logits_RxV.shape), matrix, preferred_element_type=jnp.float32
        )
        states = jax.lax.psum(states, vocabulary.axis) if vocabulary.axis else states
        states = jnp.moveaxis(states.astype(hidden.dtype).reshape(hidden_QxJxPxD.shape), 0, 1)
        by_hidden = jax.lax.dynamic_update_slice_in_dim(by_hidden, states.reshape(heads, size, width), start, 1)
        if detach_trunk:
            gradient, hidden_RxD = gradient[:, 0], hidden_QxJxPxD[:, 0].reshape(-1, width)
        gradient_RxV = gradient.reshape(-1, gradient.shape[-1])
        by_matrix = _add_product(by_matrix, gradient_RxV, hidden_RxD, tiling.vocabulary_block)
        return sums, (by_hidden, by_matrix)

    gradients = (jnp.zeros_like(hidden_JxRxD), jnp.zeros(matrix.shape, jnp.float32)) if with_gradients else None
    sums, gradients = jax.lax.fori_loop(0, chunks, one_chunk, (zero_sums(heads - 1), gradients))
    total = jnp.dot(sums.ce, ce_scale) + jnp.dot(sums.kl, kl_scale)
    if gradients is None:
        return total, sums, None
    return total, sums, (gradients[0][:, :rows].reshape(hidden.shape), gradients[1])


def _map(function: Any, *arrays: Array) -> Any:
    """``lax.map`` over the leading axis, without a loop where that is 1."""
    if arrays[0].shape[0] > 1:
        return jax.lax.map(lambda parts: function(*parts), arrays)
    return jax.tree.map(lambda value: value[None], function(*(array[0] for array in arrays)))


def _add_product(total: Array, gradient: Array, hidden: Array, block: int) -> Array:
    """total[v] + the sum over rows of gradient[row, v] hidden[row], in float32, a block of the vocabulary at a time."""

    def product(part: Array) -> Array:
        return jnp.einsum("rv,rd->vd", part, hidden, preferred_element_type=jnp.float32)

    vocabulary = total.shape[0]
    if block >= vocabulary:
        return total + product(gradient)

    def add(start: Array | int, size: int, total: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(gradient, start, size, 1)
        old = jax.lax.dynamic_slice_in_dim(total, start, size, 0)
        return jax.lax.dynamic_update_slice_in_dim(total, old + product(part), start, 0)

    whole = vocabulary // block
    total = jax.lax.fori_loop(0, whole, lambda index, total: add(index * block, block, total), total)
    return add(whole * block, vocabulary - whole * block, total) if vocabulary % block else total
