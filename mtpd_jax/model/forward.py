"""The network, composed once: embed → blocks → norm, and on the final state one head after the other.

Whoever runs a model does it through these functions: training, scoring, prefill, drafting and verification. They
differ in where the layers' parameters lie and in how the layers are run (functions that are given), and in what the
tokens may see (the view).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtpd_jax.config import ModelConfig
from mtpd_jax.model.head import HeadOutput
from mtpd_jax.model.layers import compute_dtype, constrain_activation
from mtpd_jax.model.views import View
from mtpd_jax.shapes import Array, Float, Hidden, Int

# (x, view) -> (x, outputs of the blocks): all blocks of a backbone.
RunBlocks = Callable[[Hidden, Any], tuple[Hidden, Any]]
# (state, embedded, view) -> (state for the next head, output): one head, or several in a row.
RunHeads = Callable[[Hidden, Any, Any], tuple[Hidden, HeadOutput]]


def embed(
    table: Float[Array, "V D"],
    tokens: Int[Array, "*axes T"],
    config: ModelConfig,
    mask_embedding: Float[Array, " D"] | None = None,
) -> Float[Array, "*axes T D"]:
    """Looks up input embeddings, scaled by sqrt(D) if the config says so.

    Unscaled, a tied embedding (whose rows have unit norm, for the logits' sake) drowns in the residual stream.

    Args:
      table: of the vocabulary.
      tokens: with a mask embedding, the id V is that.
      config: of the model.
      mask_embedding: of models that have one.
    """
    table = jnp.asarray(table, compute_dtype(config))
    if mask_embedding is None:
        found = table[tokens]
    else:
        last = table.shape[0] - 1
        is_mask = (tokens > last)[..., None]
        found = jnp.where(is_mask, mask_embedding.astype(table.dtype), table[jnp.minimum(tokens, last)])
    return found * (config.width**0.5 if config.scale_embedding else 1.0)


def run_backbone(
    config: ModelConfig,
    embedding: Float[Array, "V D"],
    blocks: RunBlocks,
    final_norm: Callable[[Hidden], Hidden],
    tokens: Int[Array, "B T"],
    view: View,
    mask_embedding: Float[Array, " D"] | None = None,
) -> tuple[Hidden, Any]:
    """Returns h^0, the state after the final norm, and the outputs of the blocks."""
    x = constrain_activation(embed(embedding, tokens, config, mask_embedding))
    with jax.named_scope("backbone"):
        x, outputs = blocks(x, view)
        return final_norm(x), outputs


def run_heads(
    config: ModelConfig,
    embedding: Float[Array, "V D"],
    heads: RunHeads,
    state: Hidden,
    ahead: Int[Array, "*K B T"],
    view: View,
    *,
    detach: bool = False,
) -> tuple[Hidden, HeadOutput]:
    """Runs heads on a state.

    Args:
      config, embedding: of the model; the embedding is shared with the backbone.
      heads: how they are run.
      state: [B, T, D]; h^0 for the first head, else what the head before returned as state.
      ahead: the token that each position looks ahead to, t_{i+k} for head k: [K, B, T] for K heads, [B, T] for one.
      view: of the tokens.
      detach: cut the gradient from the heads into state and embedding.

    Returns:
      The state for the next head, and what the heads return beside it.
    """
    embedded = embed(embedding, ahead, config)
    if detach:
        embedded, state = jax.lax.stop_gradient((embedded, state))
    with jax.named_scope("heads"):
        return heads(state, embedded, view)
