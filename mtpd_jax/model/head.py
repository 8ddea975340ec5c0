"""The multi-token-prediction heads: a cascade in which each head refines the state of the one before.

Head k reads, at position i, the embedding of token t_{i+k} and the state h^{k-1}_i, and predicts t_{i+k+1}:

    h^0_i ──► head 1 ──► h^1_i ──► head 2 ──► h^2_i ──► …
                 ▲                    ▲
            Emb(t_{i+1})         Emb(t_{i+2})

DeepSeek-V3 (arXiv 2412.19437 §2.2), with the concatenation order [embedding, hidden] of its released checkpoints.
"""

import flax.linen as nn
import jax.numpy as jnp
from flax import struct

from mtpd_jax.config import ModelConfig
from mtpd_jax.model.block import Block, BlockOutput
from mtpd_jax.model.layers import compute_dtype, constrain_activation, norm, partitioned, weights_dtype
from mtpd_jax.model.views import View
from mtpd_jax.shapes import Array, Float, Hidden


@struct.dataclass
class HeadOutput:
    """What a head returns beside the state for the next one.

    Attributes:
      normed: [B, T, D], with a leading axis for several heads; what the shared unembedding makes the head's logits of.
      block: of the head's block.
    """

    normed: Float[Array, "*K B T D"]
    block: BlockOutput


class Head(nn.Module):
    """One head: fuse the next token's embedding into the state, run one block, normalise."""

    config: ModelConfig
    pass_normed: bool

    @nn.compact
    def __call__(self, state: Hidden, embedded: Hidden, view: View) -> tuple[Hidden, HeadOutput]:
        """Runs the head on T positions per row.

        Args:
          state: [B, T, D]; for the first head the backbone's hidden state after its final norm, for head k what
            head k-1 returned as its state.
          embedded: [B, T, D]; for head k at position i, Emb(t_{i+k}).
          view: as for ``Block``. Head k at position i uses RoPE position i.
        """
        config = self.config
        # The next token's embedding and the state so far, each normalised, projected to one state.
        both_BxTx2D = jnp.concatenate(
            [norm(config, "embedding_norm")(embedded), norm(config, "hidden_norm")(state)], axis=-1
        )
        x = nn.Dense(
            config.width,
            use_bias=False,
            dtype=compute_dtype(config),
            param_dtype=weights_dtype(config),
            kernel_init=partitioned(nn.initializers.lecun_normal(), "width", None),
            name="projection",
        )(both_BxTx2D)
        x = constrain_activation(x)
        # That state sees the earlier ones.
        x, output = Block(config, name="block")(x, view)
        normed = norm(config, "output_norm")(x)
        return (normed if self.pass_normed else x), HeadOutput(normed, output)
