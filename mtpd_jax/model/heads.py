"""The multi-token-prediction heads: a cascade in which each head refines the state of the one before.

Head k reads, at position i, the embedding of token t_{i+k} and the state h^{k-1}_i, and predicts t_{i+k+1}:

    h^0_i ──► head 1 ──► h^1_i ──► head 2 ──► h^2_i ──► …
                 ▲                    ▲
            Emb(t_{i+1})         Emb(t_{i+2})

DeepSeek-V3 (arXiv 2412.19437 §2.2), with the concatenation order [embedding, hidden] of its released checkpoints.
"""

import flax.linen as nn
import jax.numpy as jnp

from mtpd_jax.config import HeadsConfig, ModelConfig
from mtpd_jax.model.cache import KVCache
from mtpd_jax.model.layers import Block, Rotation, compute_dtype, constrain_activation, norm, partitioned
from mtpd_jax.shapes import Array, AttentionMask, Float, HeadsHidden, Hidden, Int


class Head(nn.Module):
    """One head: fuse the next token's embedding into the state, run one block, normalise."""

    config: ModelConfig
    pass_normed: bool

    @nn.compact
    def __call__(
        self,
        state: Hidden,
        embedded: Hidden,
        cache: KVCache | None,
        rotation: Rotation,
        mask: AttentionMask,
        start: Int[Array, " B"] | None,
    ) -> tuple[Hidden, tuple[Hidden, KVCache | None]]:
        """Runs the head on T positions per row.

        Args:
          state: [B, T, D]; for the first head the backbone's hidden state after its final norm, for head k what
            head k-1 returned as its state.
          embedded: [B, T, D]; for head k at position i, Emb(t_{i+k}).
          cache, rotation, mask, start: as for ``Block``. Head k at position i uses RoPE position i.

        Returns:
          The state for the next head, and the pair of the normed state, from which the shared unembedding makes
          this head's logits, and the new cache.
        """
        config = self.config
        both_BxTx2D = jnp.concatenate(
            [norm(config, "embedding_norm")(embedded), norm(config, "hidden_norm")(state)], axis=-1
        )
        x = nn.Dense(
            config.width,
            use_bias=False,
            dtype=compute_dtype(config),
            kernel_init=partitioned(nn.initializers.lecun_normal(), "embed", None),
            name="projection",
        )(both_BxTx2D)
        x = constrain_activation(x)
        x, cache = Block(config, name="block")(x, cache, rotation, mask, start)
        normed = norm(config, "output_norm")(x)
        return (normed if self.pass_normed else x), (normed, cache)


class Heads(nn.Module):
    """K heads one after the other, as a scan, so that compile time does not grow with K.

    Parameters of a cascade are stacked along a leading axis of K; those of a recurrent head have no such axis.
    """

    config: ModelConfig
    heads: HeadsConfig

    @nn.compact
    def __call__(
        self, state: Hidden, embedded: Float[Array, "K B T D"], rotation: Rotation, mask: AttentionMask
    ) -> tuple[Hidden, HeadsHidden]:
        """Returns, for a whole packed row (no cache), the state for a head K+1, and h^1…h^K, [K, B, T, D]."""
        tied = self.heads.kind == "recurrent"
        head = nn.remat(Head, prevent_cse=False) if self.config.remat else Head
        scanned = nn.scan(
            head,
            variable_axes={} if tied else {"params": 0},
            variable_broadcast="params" if tied else False,
            split_rngs={"params": not tied},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=self.heads.num_heads,
            metadata_params={} if tied else {nn.PARTITION_NAME: "heads"},
        )(self.config, self.heads.pass_normed, name="head")
        state, (normed_KxBxTxD, _) = scanned(state, embedded, None, rotation, mask, None)
        return state, normed_KxBxTxD
