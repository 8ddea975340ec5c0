"""Who may see whom, and the kernels that attend accordingly.

A pattern is a small structure that can draw itself as a dense mask. A kernel takes queries, keys, values and a pattern;
those that know the pattern's structure never make the mask. The dense kernel is the reference for the others.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.config import ModelConfig
from mtpd_jax.shapes import Array, AttentionMask, Float, Positions, SegmentIds
from mtpd_jax.sharding import RULES, parts_of, traced_mesh

# The score of what may not be seen: finite, since a position before the beginning of a text sees nothing at all.
_HIDDEN = -1e30
# Queries and keys that a Pallas kernel holds at once: the largest of these that divides the row. The smallest is what
# splash attention can do with at least; the others are our choice, after MaxText's 512 for splash.
_SPLASH_BLOCKS = (512, 256, 128)
_TRITON_BLOCKS = (64,)


@runtime_checkable
class Pattern(Protocol):
    """Which keys each query may attend to."""

    def dense(self) -> AttentionMask:
        """The pattern as a mask, [B, T, S], True where attention is allowed."""
        ...


@struct.dataclass
class Documents:
    """Tokens of a packed row see earlier ones, and themselves, of their own document.

    For segment ids 1 1 2 2:   x . . .
                               x x . .
                               . . x .
                               . . x x

    Attributes:
      segment_ids: [B, T]; padding, segment 0, is a document like any other: what it sees is never looked at.
    """

    segment_ids: SegmentIds

    def dense(self) -> AttentionMask:
        length = self.segment_ids.shape[1]
        causal_TxS = jnp.tril(jnp.ones((length, length), bool))
        return causal_TxS[None] & (self.segment_ids[:, :, None] == self.segment_ids[:, None, :])


@struct.dataclass
class Slots:
    """Tokens see those slots of a cache that hold their own position and earlier ones of their row.

    With margin 1, slots 0…4 hold positions -1…3, and the query at position 2 sees ``. x x x .``

    Attributes:
      positions: [B, T]; of the queries.
      slots: S.
      margin: position p lies in slot p + margin.
    """

    positions: Positions
    slots: int = struct.field(pytree_node=False)
    margin: int = struct.field(pytree_node=False, default=0)

    def dense(self) -> AttentionMask:
        key_positions_S = jnp.arange(self.slots) - self.margin
        seen = key_positions_S[None, None, :] <= self.positions[:, :, None]
        return (key_positions_S >= 0)[None, None, :] & seen


@struct.dataclass
class Drawn:
    """A pattern that is given as its mask: a block mask, or another pattern drawn once for all layers.

    Attributes:
      mask: [B, T, S].
    """

    mask: AttentionMask

    def dense(self) -> AttentionMask:
        return self.mask


Query = Float[Array, "B T N H"]
Key = Float[Array, "B S G H"]


def attend_densely(query: Query, key: Key, value: Key, pattern: Pattern) -> Query:
    """All scores at once: the reference, and the kernel of CPUs and of patterns that are given as arrays."""
    return jax.nn.dot_product_attention(query, key, value, mask=pattern.dense()[:, None])


def attend_by_cudnn(query: Query, key: Key, value: Key, pattern: Pattern) -> Query:
    """cuDNN's fused attention, of 16-bit floats, H a multiple of 8. Documents go in as a dense bias, [B, 1, T, T]."""
    mask = pattern.dense()[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")


def attend_by_splash(query: Query, key: Key, value: Key, pattern: Documents, interpret: bool = False) -> Query:
    """Splash attention on TPU: what lies above the diagonal is skipped, other documents are masked block by block.

    Args:
      query, key, value: after RoPE.
      pattern: of whole rows, of a length that one of the kernel's blocks divides.
      interpret: run the kernel's program on a CPU, for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    def attend(query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
        length, query_heads, size = query.shape[1:]
        block = _block(_SPLASH_BLOCKS, length)
        sizes = splash_attention_kernel.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        )
        mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * query_heads)
        # Made anew in every trace: it holds arrays of the trace.
        kernel = splash_attention_kernel.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)

        def of_row(query: Array, key: Array, value: Array, segment_ids: Array) -> Any:
            segments = splash_attention_kernel.SegmentIds(segment_ids, segment_ids)
            return kernel(query, key, value, segment_ids=segments)

        # The kernel takes heads before tokens, and does not scale.
        by_head = [values.swapaxes(1, 2) for values in (query * size**-0.5, key, value)]
        return jax.vmap(of_row)(by_head[0], by_head[1], by_head[2], segment_ids).swapaxes(1, 2)

    return _on_each_device(attend, query, key, value, pattern)


def attend_by_triton(query: Query, key: Key, value: Key, pattern: Documents, interpret: bool = False) -> Query:
    """The Pallas Triton kernel on GPU: what lies above the diagonal is skipped, other documents are masked.

    For arguments see ``attend_by_splash``. Keys and values are repeated, for the kernel knows no shared ones.
    """
    from jax.experimental.pallas.ops.gpu import attention  # which later versions of JAX warn of when it is imported

    def attend(query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
        length, query_heads, size = query.shape[1:]
        block = _block(_TRITON_BLOCKS, length)
        sizes = attention.BlockSizes(
            block_q=block, block_k=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        )
        key, value = (jnp.repeat(values, query_heads // values.shape[2], axis=2) for values in (key, value))
        return attention.mha(
            query, key, value, segment_ids, sm_scale=size**-0.5, causal=True, block_sizes=sizes, interpret=interpret
        )

    return _on_each_device(attend, query, key, value, pattern)


def _on_each_device(attend: Callable[..., Array], query: Query, key: Key, value: Key, pattern: Documents) -> Query:
    """Runs a kernel, which the partitioner cannot split, on each device's own rows and heads."""
    arguments = query, key, value, pattern.segment_ids
    mesh = traced_mesh()
    if mesh is None:
        return attend(*arguments)
    queries, keys = (RULES.spec("batch", None, axis, None) for axis in ("query_heads", "kv_heads"))
    specs = queries, keys, keys, RULES.spec("batch", None)
    # Checks of what varies over the mesh know no Pallas kernels.
    return jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)(*arguments)


def _block(blocks: tuple[int, ...], length: int) -> int:
    return next(block for block in blocks if length % block == 0)


def attend_to_slots(
    query: Float[Array, "B T G R H"],
    keys: Float[Array, "GB H S"],
    values: Float[Array, "GB S H"],
    pattern: Pattern,
) -> Float[Array, "B T G R H"]:
    """Attention of a few queries over many slots, in the layout of the cache: no slot is moved or repeated.

    R query heads share a key/value head.
    """
    batch, length, groups, per_group, size = query.shape
    # Scores: queries that share keys stand below each other.
    query_GBxRTxH = (query * size**-0.5).transpose(2, 0, 3, 1, 4).reshape(groups * batch, per_group * length, size)
    scores_GBxRTxS = jnp.matmul(query_GBxRTxH, keys, preferred_element_type=jnp.float32)
    # What may not be seen.
    scores_GxBxRxTxS = scores_GBxRTxS.reshape(groups, batch, per_group, length, -1)
    mask_BxTxS = pattern.dense()
    scores_GBxRTxS = jnp.where(mask_BxTxS[None, :, None], scores_GxBxRxTxS, _HIDDEN).reshape(scores_GBxRTxS.shape)
    # The mixture of values; the sum of the weights divides it, which is small, and not them.
    weights_GBxRTxS = jnp.exp(scores_GBxRTxS - jnp.max(scores_GBxRTxS, axis=-1, keepdims=True))
    mixed_GBxRTxH = jnp.matmul(weights_GBxRTxS.astype(values.dtype), values, preferred_element_type=jnp.float32)
    mixed_GBxRTxH = (mixed_GBxRTxH / jnp.sum(weights_GBxRTxS, axis=-1, keepdims=True)).astype(values.dtype)
    return mixed_GBxRTxH.reshape(groups, batch, per_group, length, size).transpose(1, 3, 0, 2, 4)


# Named as ``config.model.attention`` names them.
KERNELS: dict[str, Callable[..., Any]] = {
    "dense": attend_densely,
    "cudnn": attend_by_cudnn,
    "splash": attend_by_splash,
    "triton": attend_by_triton,
}
_BLOCKS = {"splash": _SPLASH_BLOCKS, "triton": _TRITON_BLOCKS}


def kernel_for(config: ModelConfig, rows: int, length: int) -> str:
    """The kernel for whole rows: the config's, or the dense one where that cannot attend over them.

    Pallas kernels need as many rows on every device of what is being traced, as a step has, and not every call.
    """
    mesh, kernel = traced_mesh(), config.attention
    shared = kernel not in _BLOCKS or mesh is None or rows % parts_of(mesh, "batch") == 0
    return kernel if shared and not lacking(kernel, config, length) else "dense"


def lacking(kernel: str, config: ModelConfig, length: int) -> str:
    """What a kernel needs that a model with rows of this length has not; nothing if it can attend over them.

    Args:
      kernel: of ``KERNELS``.
      config: of the model, as a platform has resolved it.
      length: tokens of a row.
    """
    multiple = min(_BLOCKS.get(kernel, (1,)))
    if length % multiple:
        return f"rows of a multiple of {multiple} tokens, not {length}"
    if kernel == "cudnn" and (config.dtype != "bfloat16" or config.head_size % 8 or config.head_size > 128):
        return f"bfloat16 and a head_size of a multiple of 8, up to 128, not {config.dtype} and {config.head_size}"
    return "rows of an even number of tokens" if kernel == "cudnn" and length % 2 else ""


def knows_documents(kernel: str) -> bool:
    """Whether a kernel attends within documents without a mask of them; such a one can do nothing else."""
    return kernel in _BLOCKS


def attend(kernel: str, query: Query, key: Key, value: Key, pattern: Pattern) -> Query:
    """Attends with a kernel of ``KERNELS``; patterns that are given as arrays are not for those that know documents."""
    fits = isinstance(pattern, Documents) or not knows_documents(kernel)
    return KERNELS[kernel if fits else "dense"](query, key, value, pattern)
