"""The production form of the loss: hidden states in, total and gradients out, never more than a chunk of logits alive.

The gradients are formed in the forward pass, while a chunk's logits are there, so that the backward pass only scales
them: three products with the unembedding per head instead of the four of chunking with rematerialisation. This needs
every term's factor before the first chunk runs, which is why the caller counts the weights first.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from mtpd_jax.losses.terms import Distillation, LossSums, chunk_loss, zero_sums
from mtpd_jax.platform import platform_of
from mtpd_jax.shapes import Array, Bool, Float, Int
from mtpd_jax.sharding import RULES, LastAxis, sum_over

# What the unembedding, and with it the main head's states, get a gradient from: all terms; the main head's cross
# entropy only; nothing, and then no gradient of theirs is formed.
Trunk = Literal["trained", "detached", "frozen"]

# A chunk of a small vocabulary: so many logits; of a large one on an accelerator so many rows of them (P x J), for the
# products to outweigh the reading of the unembedding, and on a CPU in proportion to D.
_CHUNK_LOGITS_ON_CPU = 1 << 20
_CHUNK_LOGITS_ON_ACCELERATOR = 1 << 26
_CHUNK_ROWS_OF_LOGITS = 2048
# On a CPU: logits of a group of rows, and elements of a block of the unembedding's gradient, that its caches hold.
_GROUP_LOGITS = 1 << 20
_BLOCK_ELEMENTS = 1 << 21


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


def choose_tiling(rows: int, heads: int, vocabulary: int, width: int, chunk_rows: int | None, on_cpu: bool) -> Tiling:
    """Chooses from the shapes: rows on a device, all heads (K+1), the device's part of V, and D.

    Args:
      rows, heads, vocabulary, width: see above.
      chunk_rows: overrides the choice of the chunk; None chooses.
      on_cpu: a CPU or an accelerator.
    """
    if chunk_rows is None and on_cpu:
        limit = max(8, max(width * 5 // 8, _CHUNK_LOGITS_ON_CPU // vocabulary) // heads // 8 * 8)
        chunk_rows = -(-rows // -(-rows // limit))  # chunks of equal size
    elif chunk_rows is None:
        # A power of two, which divides most batches, and with which TPU programs compile in seconds.
        limit = max(_CHUNK_ROWS_OF_LOGITS, _CHUNK_LOGITS_ON_ACCELERATOR // vocabulary) // heads
        chunk_rows = 1 << max(3, limit.bit_length() - 1)
    chunk_rows = min(chunk_rows, rows)
    if not on_cpu:
        return Tiling(chunk_rows, chunk_rows, vocabulary)
    group_rows = min(chunk_rows, max(1, _GROUP_LOGITS // (heads * vocabulary)))
    chunk_rows = -(-chunk_rows // group_rows) * group_rows
    return Tiling(chunk_rows, group_rows, min(vocabulary, max(1, _BLOCK_ELEMENTS // width)))


@struct.dataclass
class Teacher:
    """Another model with the same vocabulary, in whose distribution heads are taught. It gets no gradient.

    Attributes:
      hidden: [B, T, D']; its states, of whatever width, that predict the same targets.
      unembedding: [V, D'].
    """

    # Not annotated as arrays: specifications of where they lie make such a structure, too.
    hidden: Any
    unembedding: Any


def fused_loss(
    hidden: Float[Array, "J B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "J B T"],
    ce_scale: Float[Array, " J"],
    kl_scale: Float[Array, " K"],
    *,
    distillation: Distillation | None,
    mesh: Mesh,
    trunk: Trunk = "trained",
    chunk_rows: int | None = None,
    teacher: Teacher | None = None,
) -> tuple[Float[Array, ""], LossSums]:
    """The total loss of rows aligned by target, differentiable in ``hidden`` and ``unembedding``.

    Args:
      hidden: [K+1, B, T, D]; at [:, b, j], the states of all heads that predict ``targets[b, j]``, main head first.
      unembedding: [V, D] in float32; products run in the dtype of ``hidden``, sums in float32.
      targets: [B, T].
      mask: [K+1, B, T]; which heads are supervised where. Chunks in which nothing is supervised are not computed.
      ce_scale, kl_scale: [K+1] and [K]; coefficient / weight of each term, the weight counted over the whole step.
        With another model as teacher [J] and [J].
      distillation: how heads are compared with the main head; None for cross entropy alone.
      mesh: that the program is for. Every device works on its own part of B and V, and the unembedding's gradient is
        summed over devices once.
      trunk: what the unembedding gets a gradient from; frozen, the main head's states get none either.
      chunk_rows: rows (of B x T on a device) whose logits are alive at once; None: chosen from the shapes.
      teacher: another model, with which all heads are compared, the main head like the others; None: the main head is
        the teacher. Its logits, too, exist a chunk at a time.

    Returns:
      The total, and the sums behind it, which carry no gradient.
    """
    problem = _Problem(distillation, trunk, chunk_rows, mesh, platform_of(mesh).on_cpu)
    with jax.named_scope("loss"):  # for profiles
        return _loss(problem, hidden, unembedding, targets, mask, ce_scale, kl_scale, teacher)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What is known before any array is; see ``fused_loss``."""

    distillation: Distillation | None
    trunk: Trunk
    chunk_rows: int | None
    mesh: Mesh
    on_cpu: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(problem: _Problem, *arrays: Any) -> tuple[Array, LossSums]:
    total, sums, _ = _over_mesh(problem, False, arrays)
    return total, sums


def _forward(problem: _Problem, *arrays: Any) -> tuple[tuple[Array, LossSums], tuple[Array, Array | None]]:
    total, sums, gradients = _over_mesh(problem, True, arrays)
    return (total, sums), gradients


def _backward(
    problem: _Problem, gradients: tuple[Array, Array | None], cotangents: tuple[Array, LossSums]
) -> tuple[Any, ...]:
    hidden_gradient, unembedding_gradient = gradients
    scale, _ = cotangents
    by_hidden = (scale * hidden_gradient).astype(hidden_gradient.dtype)
    # A frozen unembedding has none; elsewhere it is there.
    by_unembedding = None if problem.trunk == "frozen" else scale * unembedding_gradient  # pyright: ignore[reportOperatorIssue]
    return by_hidden, by_unembedding, None, None, None, None, None


_loss.defvjp(_forward, _backward)


def _over_mesh(problem: _Problem, with_gradients: bool, arrays: tuple[Any, ...]) -> Any:
    """Runs the chunks, on each device's own rows and tokens if there is a mesh.

    Left to the partitioner, the loop over chunks would run on every device over all rows, because the split axis of
    the rows becomes the axis of the loop; and the unembedding's gradient would be reduced once per chunk.
    """
    hidden, unembedding, *rest, teacher = arrays
    # Cast before they are gathered, so that half the bytes travel.
    if teacher is not None:
        teacher = Teacher(teacher.hidden, teacher.unembedding.astype(teacher.hidden.dtype))
    arrays = hidden, unembedding.astype(hidden.dtype), *rest, teacher
    mesh = problem.mesh
    vocabulary = LastAxis.of("vocabulary", mesh, problem.on_cpu)
    if mesh.size == 1:
        return _over_chunks(problem, vocabulary, with_gradients, *arrays)

    # Each device its own rows and tokens; then one sum of what is shared.
    def run_and_reduce(*local: Any) -> Any:
        total, sums, gradients = _over_chunks(problem, vocabulary, with_gradients, *local)
        if gradients is not None:
            by_hidden, by_matrix = gradients
            gradients = by_hidden, None if by_matrix is None else sum_over(by_matrix, "batch")
        return *sum_over((total, sums), "batch"), gradients

    states, tokens, whole = RULES.spec(None, "batch"), RULES.spec("vocabulary"), RULES.spec()
    rows = RULES.spec("batch")
    return jax.shard_map(
        run_and_reduce,
        mesh=mesh,
        in_specs=(states, tokens, rows, states, whole, whole, None if teacher is None else Teacher(rows, tokens)),
        out_specs=(whole, whole, (states, tokens) if with_gradients else None),
        check_vma=False,
    )(*arrays)


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """The rows of one device, padded to whole chunks, and what is done with each of them.

    Attributes:
      problem, vocabulary: see ``fused_loss``.
      tiling: how the rows are cut.
      with_gradients: whether gradients are formed, too.
      hidden, matrix, targets, mask, ce_scale, kl_scale: [J, M, D], [V, D], [M], [J, M], [J], [K].
      teacher: another model's hidden and matrix, [1, M, D'] and [V, D']. It is row 0 then of whatever has rows of
        logits, supervised nowhere, in ``mask``, ``ce_scale`` and ``kl_scale``, too, and ``hidden`` begins at row 1.
    """

    problem: _Problem
    vocabulary: LastAxis
    tiling: Tiling
    with_gradients: bool
    hidden: Array
    matrix: Array
    targets: Array
    mask: Array
    ce_scale: Array
    kl_scale: Array
    teacher: tuple[Array, Array] | None

    @property
    def frozen(self) -> bool:
        """Whether the unembedding gets no gradient, and neither does a main head that is the teacher."""
        return self.problem.trunk == "frozen"

    @property
    def untrained(self) -> int:
        """Rows of logits, the first ones, that get no gradient."""
        return int(self.frozen or self.teacher is not None)

    @property
    def trained(self) -> Array:
        """The states that get a gradient."""
        return self.hidden[int(self.frozen and self.teacher is None) :]

    def start(self) -> Any:
        """Sums over no rows, and gradients of nothing: what goes from chunk to chunk."""
        sums = zero_sums(self.mask.shape[0] - 1)
        if not self.with_gradients:
            return sums, None, None, None
        trained = self.trained
        groups, group_rows = self.tiling.chunk_rows // self.tiling.group_rows, self.tiling.group_rows
        # The chunk's gradient by the logits is carried along only to be written over: a CPU would clear a new one.
        chunk = jnp.zeros((groups, trained.shape[0], group_rows, self.matrix.shape[0]), self.hidden.dtype)
        by_matrix = None if self.frozen else jnp.zeros(self.matrix.shape, jnp.float32)
        return sums, jnp.zeros_like(trained), by_matrix, chunk

    def one_chunk(self, start: Array, carry: Any) -> Any:
        """Adds the chunk of rows from ``start`` on."""
        # Logits of all heads, in groups of rows that a cache holds.
        sums, by_hidden, by_matrix, gradient = carry
        hidden_QxJxPxD = self._in_groups(self.hidden, start)
        logits = _products(hidden_QxJxPxD, self.matrix)
        if self.teacher is not None:
            states, matrix = self.teacher
            logits = jnp.concatenate([_products(self._in_groups(states, start), matrix), logits], axis=1)
        # Group by group: the sums, and the gradient by the logits while they are there.
        targets, mask = self._in_groups(self.targets[None], start)[:, 0], self._in_groups(self.mask, start)
        rows_of_groups = logits, logits[:, :1], targets, mask

        def one_group(group: Array | int, carry: Any) -> Any:
            return self._one_group(rows_of_groups, group, *carry)

        sums, gradient = jax.lax.fori_loop(0, hidden_QxJxPxD.shape[0], one_group, (sums, gradient))
        if self.with_gradients:
            by_hidden = jax.lax.dynamic_update_slice_in_dim(by_hidden, self._by_hidden(gradient), start, 1)
        # The unembedding's gradient: of all heads, or of the main head alone.
        if self.with_gradients and not self.frozen:
            counted = slice(0, 1) if self.problem.trunk == "detached" else slice(None)
            block = self.tiling.vocabulary_block
            by_matrix = _add_product(by_matrix, gradient[:, counted], hidden_QxJxPxD[:, counted], block)
        return sums, by_hidden, by_matrix, gradient

    def _in_groups(self, values: Array, start: Array) -> Array:
        """[J, M, …] -> a chunk's rows as [groups, J, rows of a group, …]."""
        chunk = jax.lax.dynamic_slice_in_dim(values, start, self.tiling.chunk_rows, 1)
        return jnp.moveaxis(chunk.reshape(chunk.shape[0], -1, self.tiling.group_rows, *chunk.shape[2:]), 1, 0)

    def _one_group(
        self, rows_of_groups: tuple[Array, ...], group: Array | int, sums: LossSums, gradient: Array | None
    ) -> tuple[LossSums, Array | None]:
        """Adds the sums of a group of a chunk's rows, and writes its gradient by the logits."""
        logits, teacher, targets, mask = (
            jax.lax.dynamic_index_in_dim(values, group, keepdims=False) for values in rows_of_groups
        )
        added, part = chunk_loss(
            logits, teacher, targets, mask, self.ce_scale, self.kl_scale, self.problem.distillation, self.vocabulary
        )
        if gradient is not None:
            part = part[self.untrained :].astype(self.hidden.dtype)
            gradient = jax.lax.dynamic_update_index_in_dim(gradient, part, group, 0)
        return jax.tree.map(jnp.add, sums, added), gradient

    def _by_hidden(self, gradient: Array) -> Array:
        """A chunk's gradient by the hidden states, [J, M, D], from that by the logits."""
        gradient_MxV, width = gradient.reshape(-1, gradient.shape[-1]), self.matrix.shape[1]
        states = jnp.einsum("mv,vd->md", gradient_MxV, self.matrix, preferred_element_type=jnp.float32)
        states = self.vocabulary.sum_parts(states)
        states = states.astype(self.hidden.dtype).reshape(*gradient.shape[:-1], width)
        return jnp.moveaxis(states, 0, 1).reshape(gradient.shape[1], self.tiling.chunk_rows, width)


def _over_chunks(
    problem: _Problem,
    vocabulary: LastAxis,
    with_gradients: bool,
    hidden: Array,
    matrix: Array,
    targets: Array,
    mask: Array,
    ce_scale: Array,
    kl_scale: Array,
    teacher: Teacher | None,
) -> tuple[Array, LossSums, tuple[Array, Array | None] | None]:
    """The chunks of one device's rows, one after the other: total, sums, gradients by hidden states and unembedding."""
    # All rows in a line, filled up to whole chunks.
    heads, width, rows, others = hidden.shape[0], hidden.shape[-1], targets.size, int(teacher is not None)
    tiling = choose_tiling(rows, heads + others, matrix.shape[0], width, problem.chunk_rows, problem.on_cpu)
    padding = -rows % tiling.chunk_rows

    def in_line(states: Array) -> Array:
        return jnp.pad(states.reshape(-1, rows, states.shape[-1]), ((0, 0), (0, padding), (0, 0)))

    mask_JxM = jnp.pad(mask.reshape(heads, rows), ((others, 0), (0, padding)))
    targets_M = jnp.pad(targets.reshape(rows), (0, padding))
    of_teacher = None if teacher is None else (in_line(teacher.hidden), teacher.unembedding)
    of_device = in_line(hidden), matrix, targets_M, mask_JxM, jnp.pad(ce_scale, (others, 0)), kl_scale, of_teacher
    chunks = _Chunks(problem, vocabulary, tiling, with_gradients, *of_device)
    # Chunks with nothing to supervise go last, where the loop does not come.
    supervised = jnp.any(mask_JxM.reshape(heads + others, -1, tiling.chunk_rows), axis=(0, 2))
    order = jnp.argsort(~supervised)

    def step(index: Array, carry: Any) -> Any:
        return chunks.one_chunk(order[index] * tiling.chunk_rows, carry)

    sums, by_hidden, by_matrix, _ = jax.lax.fori_loop(0, jnp.sum(supervised), step, chunks.start())
    # What the sums come to, and gradients without what was filled up.
    sums = dataclasses.replace(sums, ce=sums.ce[others:])
    total = jnp.dot(sums.ce, ce_scale) + jnp.dot(sums.kl, kl_scale)
    if by_hidden is None:
        return total, sums, None
    by_hidden = jnp.pad(by_hidden[:, :rows], ((heads - by_hidden.shape[0], 0), (0, 0), (0, 0)))
    return total, sums, (by_hidden.reshape(hidden.shape), by_matrix)


def _products(hidden: Array, matrix: Array) -> Array:
    """Logits of groups of rows, [groups, J, rows of a group, V], in float32."""
    return jnp.einsum("qjpd,vd->qjpv", hidden, matrix, preferred_element_type=jnp.float32)


def _add_product(total: Array, gradient: Array, hidden: Array, block: int) -> Array:
    """total[v] + the sum over rows of gradient[row, v] hidden[row], in float32, a block of the vocabulary at a time."""
    gradient, hidden = (values.reshape(-1, values.shape[-1]) for values in (gradient, hidden))

    def product(part: Array) -> Array:
        return jnp.einsum("mv,md->vd", part, hidden, preferred_element_type=jnp.float32)

    vocabulary = total.shape[0]
    # All at once, if it is small; else the product is never there as a whole.
    if block >= vocabulary:
        return total + product(gradient)

    def add(start: Array | int, size: int, total: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(gradient, start, size, 1)
        old = jax.lax.dynamic_slice_in_dim(total, start, size, 0)
        return jax.lax.dynamic_update_slice_in_dim(total, old + product(part), start, 0)

    # Whole blocks, and what is left over.
    whole = vocabulary // block
    total = jax.lax.fori_loop(0, whole, lambda index, total: add(index * block, block, total), total)
    return add(whole * block, vocabulary - whole * block, total) if vocabulary % block else total
