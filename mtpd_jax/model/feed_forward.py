"""The layers that may follow attention in a block, by the name that ``config.model.feed_forward`` has for them."""

from typing import Any

import flax.linen as nn

from mtpd_jax.config import ModelConfig
from mtpd_jax.model.layers import compute_dtype, partitioned, weights_dtype
from mtpd_jax.shapes import Hidden
from mtpd_jax.sharding import constrain


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    config: ModelConfig

    @staticmethod
    def weights(config: ModelConfig) -> int:
        """Of its matrices; each is used once per token."""
        return 3 * config.width * config.mlp_width

    @nn.compact
    def __call__(self, x: Hidden) -> tuple[Hidden, None]:
        """Returns the new [B, T, D], and no statistics."""
        config = self.config

        def dense(features: int | tuple[int, int], name: str, kernel_init: Any) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                features,
                use_bias=False,
                dtype=compute_dtype(config),
                param_dtype=weights_dtype(config),
                kernel_init=kernel_init,
                name=name,
            )

        # Gate and values by one product; the product of both back to the width.
        gate_init = partitioned(nn.initializers.lecun_normal(), "width", None, "mlp_width")
        gate_up_BxTx2xF = dense((2, config.mlp_width), "gate_up", gate_init)(x)
        hidden_BxTxF = nn.silu(gate_up_BxTx2xF[:, :, 0]) * gate_up_BxTx2xF[:, :, 1]
        hidden_BxTxF = constrain(hidden_BxTxF, "batch", None, "mlp_width")
        down_init = partitioned(nn.initializers.zeros_init(), "mlp_width", "width")
        return dense(config.width, "down", down_init)(hidden_BxTxF), None


# A module of a config: [B, T, D] -> the new [B, T, D], and statistics of the pass, which the model hands on; and
# ``weights``, which costs are counted from.
FEED_FORWARDS: dict[str, Any] = {"gated": GatedMLP}
