"""One Transformer block: pre-norm attention with RoPE and grouped queries, and a gated feed-forward layer."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.config import ModelConfig
from mtpd_jax.model.cache import KVCache
from mtpd_jax.shapes import Array, AttentionMask, Float, Hidden, Int, Positions, SegmentIds
from mtpd_jax.sharding import constrain

# The score of a slot that may not be seen: finite, since a position before the beginning of a text sees none at all.
_HIDDEN = -1e30


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of activations and matrix products; ``auto`` is float32 on CPU and bfloat16 elsewhere."""
    if config.dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.dtype)


def apply(module: nn.Module, parameters: Any, *inputs: Any, **options: Any) -> Any:
    """Runs a Linen module as a pure function. Nothing here has mutable collections, so outputs are all it returns."""
    return module.apply({"params": parameters}, *inputs, **options)


def partitioned(initializer: Callable[..., Array], *axes: str | None) -> Callable[..., Any]:
    """Attaches logical axis names (see ``sharding.ShardingRules``) to what an initializer returns."""
    return nn.with_logical_partitioning(initializer, axes)


def constrain_activation(x: Hidden) -> Hidden:
    """Rows split over the batch axes, the width whole: how activations lie between layers."""
    return constrain(x, "batch", None, None)


def norm(config: ModelConfig, name: str | None = None) -> nn.RMSNorm:
    """RMSNorm over the last axis, computed in float32, with a learned scale that starts at one."""
    scale_init = partitioned(nn.initializers.ones_init(), None)
    return nn.RMSNorm(epsilon=config.norm_epsilon, dtype=compute_dtype(config), scale_init=scale_init, name=name)


def causal_mask(segment_ids: SegmentIds) -> AttentionMask:
    """Which tokens of a packed row each token may attend to: earlier ones, and itself, of its own document.

    For segment ids 1 1 2 2:   x . . .
                               x x . .
                               . . x .
                               . . x x
    """
    length = segment_ids.shape[1]
    causal_TxS = jnp.tril(jnp.ones((length, length), bool))
    return causal_TxS[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])


@struct.dataclass
class Rotation:
    """What rotary position embedding turns queries and keys by: computed once per pass, used by every block.

    Attributes:
      cos, sin: [B, T, H/2], in float32: at position 10,000 bfloat16 would be off by whole turns.
    """

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]

    @classmethod
    def of(cls, positions: Positions, config: ModelConfig) -> "Rotation":
        """The pair (i, i + H/2) at a position turns by position * theta^(-2i/H) (RoFormer, arXiv 2104.09864)."""
        half = config.head_size // 2
        frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angles_BxTxh = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
        return cls(jnp.cos(angles_BxTxh), jnp.sin(angles_BxTxh))

    def apply(self, x: Float[Array, "B T *heads H"]) -> Float[Array, "B T *heads H"]:
        """Turns every head's vectors."""
        cos, sin = (jnp.expand_dims(part, range(2, x.ndim)) for part in (self.cos, self.sin))
        halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
        sign = jnp.array([[-1.0], [1.0]])
        turned = halves * cos + jnp.flip(halves, axis=-2) * (sin * jnp.expand_dims(sign, range(x.ndim - 1)))
        return turned.reshape(x.shape).astype(x.dtype)


def attend_to_cache(
    query: Float[Array, "B T G R H"],
    keys: Float[Array, "BG H S"],
    values: Float[Array, "BG S H"],
    mask: AttentionMask,
) -> Float[Array, "B T G R H"]:
    """Softmax attention of a few queries over many slots, in the layout of the cache: no slot is moved or repeated."""
    batch, length, groups, per_group, size = query.shape
    query_BGxRTxH = (query * size**-0.5).transpose(0, 2, 3, 1, 4).reshape(batch * groups, per_group * length, size)
    scores_BGxRTxS = jnp.matmul(query_BGxRTxH, keys, preferred_element_type=jnp.float32)
    scores_BxGxRxTxS = scores_BGxRTxS.reshape(batch, groups, per_group, length, -1)
    scores_BGxRTxS = jnp.where(mask[:, None, None], scores_BxGxRxTxS, _HIDDEN).reshape(scores_BGxRTxS.shape)
    weights_BGxRTxS = jnp.exp(scores_BGxRTxS - jnp.max(scores_BGxRTxS, axis=-1, keepdims=True))
    # The sum divides the mixture, which is small, and not the weights.
    mixed_BGxRTxH = jnp.matmul(weights_BGxRTxS.astype(values.dtype), values, preferred_element_type=jnp.float32)
    mixed_BGxRTxH = (mixed_BGxRTxH / jnp.sum(weights_BGxRTxS, axis=-1, keepdims=True)).astype(values.dtype)
    return mixed_BGxRTxH.reshape(batch, groups, per_group, length, size).transpose(0, 3, 1, 2, 4)


class NormScale(nn.Module):
    """The learned scale of an RMSNorm, [H], for whoever applies several of them in one go."""

    size: int

    @nn.compact
    def __call__(self) -> Float[Array, " H"]:
        return self.param("scale", partitioned(nn.initializers.ones_init(), None), (self.size,), jnp.float32)


class Attention(nn.Module):
    """Grouped-query attention over the row itself, or over a cache that the row's keys are first written to."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        rotation: Rotation,
        mask: AttentionMask,
        cache: KVCache | None,
        start: Int[Array, " B"] | None,
    ) -> tuple[Hidden, KVCache | None]:
        config = self.config
        groups, per_group = config.kv_heads, config.query_heads // config.kv_heads
        # One product for all three: each key/value head follows the query heads that share it.
        qkv_BxTxGxRxH = nn.DenseGeneral(
            (groups, per_group + 2, config.head_size),
            use_bias=config.qkv_bias,
            dtype=compute_dtype(config),
            kernel_init=partitioned(nn.initializers.lecun_normal(), "embed", "kv_heads", None, "head_size"),
            bias_init=partitioned(nn.initializers.zeros_init(), "kv_heads", None, "head_size"),
            name="qkv",
        )(x)
        # Queries and keys are normalised and rotated together.
        both_BxTxGxRxH, value_BxTxGxH = qkv_BxTxGxRxH[:, :, :, :-1], qkv_BxTxGxRxH[:, :, :, -1]
        if config.qk_norm:
            query_scale, key_scale = (NormScale(config.head_size, name=name)() for name in ("query_norm", "key_norm"))
            scale_RxH = jnp.stack([query_scale] * per_group + [key_scale])
            wide = both_BxTxGxRxH.astype(jnp.float32)
            inverse = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + config.norm_epsilon)
            both_BxTxGxRxH = (wide * inverse * scale_RxH[None, None, None]).astype(both_BxTxGxRxH.dtype)
        both_BxTxGxRxH = rotation.apply(both_BxTxGxRxH)
        query_BxTxGxRxH, key_BxTxGxH = both_BxTxGxRxH[:, :, :, :-1], both_BxTxGxRxH[:, :, :, -1]
        if cache is None or start is None:
            query_BxTxNxH = query_BxTxGxRxH.reshape(*x.shape[:2], config.query_heads, config.head_size)
            mixed = jax.nn.dot_product_attention(query_BxTxNxH, key_BxTxGxH, value_BxTxGxH, mask=mask[:, None])
        else:
            cache = cache.write(start, key_BxTxGxH, value_BxTxGxH)
            mixed = attend_to_cache(query_BxTxGxRxH, *cache.read(), mask)
        mixed_BxTxNxH = mixed.reshape(*x.shape[:2], config.query_heads, config.head_size)
        out = nn.DenseGeneral(
            config.width,
            axis=(-2, -1),
            use_bias=False,
            dtype=compute_dtype(config),
            # Zero, so that every block starts as the identity: at a few hundred steps this is worth tenths of a nat.
            kernel_init=partitioned(nn.initializers.zeros_init(), "query_heads", "head_size", "embed"),
            name="out",
        )(mixed_BxTxNxH)
        return out, cache


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        config = self.config

        def dense(features: int | tuple[int, int], name: str, kernel_init: Any) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                features, use_bias=False, dtype=compute_dtype(config), kernel_init=kernel_init, name=name
            )

        gate_init = partitioned(nn.initializers.lecun_normal(), "embed", None, "mlp")
        gate_up_BxTx2xF = dense((2, config.mlp_width), "gate_up", gate_init)(x)
        hidden_BxTxF = nn.silu(gate_up_BxTx2xF[:, :, 0]) * gate_up_BxTx2xF[:, :, 1]
        hidden_BxTxF = constrain(hidden_BxTxF, "batch", None, "mlp")
        return dense(config.width, "down", partitioned(nn.initializers.zeros_init(), "mlp", "embed"))(hidden_BxTxF)


class Block(nn.Module):
    """A pre-norm Transformer block; backbone and heads use the same one."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        cache: KVCache | None,
        rotation: Rotation,
        mask: AttentionMask,
        start: Int[Array, " B"] | None,
    ) -> tuple[Hidden, KVCache | None]:
        """Runs the block on T tokens per row.

        Args:
          x: [B, T, D].
          cache: None, or the block's cache, to which these tokens are written before they attend to it.
          rotation: of the positions.
          mask: [B, T, T] without a cache, [B, T, S] with one; True where attention is allowed.
          start: [B]; the slot of each row's first token, with a cache.

        Returns:
          The new [B, T, D] and the new cache. (Carry first, then output: the order that ``nn.scan`` wants.)
        """
        config = self.config
        with jax.named_scope("attention"):
            mixed, cache = Attention(config, name="attention")(
                norm(config, "attention_norm")(x), rotation, mask, cache, start
            )
            x = constrain_activation(x + mixed)
        with jax.named_scope("mlp"):
            x = x + GatedMLP(config, name="mlp")(norm(config, "mlp_norm")(x))
            x = constrain_activation(x)
        return x, cache
