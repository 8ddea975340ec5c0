"""One Transformer block: pre-norm attention with RoPE and grouped queries, and a feed-forward layer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.config import ModelConfig
from mtpd_jax.model.feed_forward import FEED_FORWARDS
from mtpd_jax.model.layers import NormScale, compute_dtype, constrain_activation, norm, partitioned, weights_dtype
from mtpd_jax.model.views import View
from mtpd_jax.shapes import Hidden


@struct.dataclass
class BlockOutput:
    """What a block returns beside the new state.

    Attributes:
      cache: with the tokens in it; None where the view has none.
      statistics: of the feed-forward layer; None where it has none.
    """

    cache: Any
    statistics: Any


class Attention(nn.Module):
    """Grouped-query attention to whatever the view shows."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Hidden, view: View) -> tuple[Hidden, Any]:
        config = self.config
        groups, per_group = config.kv_heads, config.query_heads // config.kv_heads
        # One product for all three: each key/value head follows the query heads that share it.
        qkv_BxTxGxRxH = nn.DenseGeneral(
            (groups, per_group + 2, config.head_size),
            use_bias=config.qkv_bias,
            dtype=compute_dtype(config),
            param_dtype=weights_dtype(config),
            kernel_init=partitioned(nn.initializers.lecun_normal(), "width", "kv_heads", None, "head_size"),
            bias_init=partitioned(nn.initializers.zeros_init(), "kv_heads", None, "head_size"),
            name="qkv",
        )(x)
        # Queries and keys are normalised and rotated together.
        both_BxTxGxRxH, value_BxTxGxH = qkv_BxTxGxRxH[:, :, :, :-1], qkv_BxTxGxRxH[:, :, :, -1]
        if config.qk_norm:
            query_scale, key_scale = (NormScale(config, name=name)() for name in ("query_norm", "key_norm"))
            scale_RxH = jnp.stack([query_scale] * per_group + [key_scale])
            wide = both_BxTxGxRxH.astype(jnp.float32)
            inverse = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + config.norm_epsilon)
            both_BxTxGxRxH = (wide * inverse * scale_RxH[None, None, None]).astype(both_BxTxGxRxH.dtype)
        both_BxTxGxRxH = view.rotation.apply(both_BxTxGxRxH)
        # What they see is the view's affair, and so is a cache.
        query_BxTxGxRxH, key_BxTxGxH = both_BxTxGxRxH[:, :, :, :-1], both_BxTxGxRxH[:, :, :, -1]
        mixed_BxTxGxRxH, cache = view.attend(query_BxTxGxRxH, key_BxTxGxH, value_BxTxGxH)
        mixed_BxTxNxH = mixed_BxTxGxRxH.reshape(*x.shape[:2], config.query_heads, config.head_size)
        # All heads together, back to the width.
        out = nn.DenseGeneral(
            config.width,
            axis=(-2, -1),
            use_bias=False,
            dtype=compute_dtype(config),
            param_dtype=weights_dtype(config),
            # Zero, so that every block starts as the identity: at a few hundred steps this is worth tenths of a nat.
            kernel_init=partitioned(nn.initializers.zeros_init(), "query_heads", "head_size", "width"),
            name="out",
        )(mixed_BxTxNxH)
        return out, cache


class Block(nn.Module):
    """A pre-norm Transformer block; backbone and heads use the same one."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Hidden, view: View) -> tuple[Hidden, BlockOutput]:
        """Runs the block on T tokens per row, which see what the view shows.

        Args:
          x: [B, T, D].
          view: the same for all layers of a pass, but for the cache in it.

        Returns:
          The new [B, T, D], and what else there is. (Carry first, then output: the order that ``nn.scan`` wants.)
        """
        config = self.config
        with jax.named_scope("attention"):
            mixed, cache = Attention(config, name="attention")(norm(config, "attention_norm")(x), view)
            x = constrain_activation(x + mixed)
        # Then the feed-forward layer, whatever the config says it is.
        with jax.named_scope("mlp"):
            feed_forward = FEED_FORWARDS[config.feed_forward](config, name="mlp")
            added, statistics = feed_forward(norm(config, "mlp_norm")(x))
            x = constrain_activation(x + added)
        return x, BlockOutput(cache, statistics)


def rematerialised(module: type[nn.Module], config: ModelConfig, prevent_cse: bool = True) -> type[nn.Module]:
    """A module whose activations are recomputed in the backward pass, if the config says so.

    Args:
      module, config: see above.
      prevent_cse: as of ``jax.checkpoint``; not needed in a scan.
    """
    return nn.remat(module, prevent_cse=prevent_cse) if config.remat else module


def scanned(module: type[nn.Module], config: ModelConfig, length: int, inputs: tuple[Any, ...], **options: Any) -> Any:
    """A module applied ``length`` times, as a scan, so that compile time does not grow with it.

    Args:
      module: whose call takes the carry, then ``inputs``.
      config: says whether activations are recomputed in the backward pass.
      length: how often.
      inputs: for each input after the carry, its axis to scan over, or ``nn.broadcast`` where all get the same.
      options: ``nn.scan``'s: by default, parameters are stacked along a leading axis.
    """
    return nn.scan(
        rematerialised(module, config, prevent_cse=False),
        in_axes=inputs,  # pyright: ignore[reportArgumentType]
        length=length,
        **{"variable_axes": {"params": 0}, "split_rngs": {"params": True}, **options},
    )
