"""The language model: embedding, a scanned decoder-only backbone, and the heads on top of its final state."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.config import Config, HeadsConfig, ModelConfig
from mtpd_jax.model.heads import Heads
from mtpd_jax.model.layers import (
    Block,
    Rotation,
    apply,
    causal_mask,
    compute_dtype,
    constrain_activation,
    norm,
    partitioned,
)
from mtpd_jax.model.shift import shift
from mtpd_jax.shapes import Array, AttentionMask, Float, HeadsHidden, Hidden, Int, Positions, SegmentIds, Tokens


@struct.dataclass
class HiddenStates:
    """What the model returns in training. Logits are the business of the loss, which makes them a chunk at a time.

    Attributes:
      main: [B, T, D]; h^0, the backbone's state after its final norm.
      heads: [K, B, T, D]; h^1…h^K, each after its head's own norm; row k-1 at position i predicts t_{i+k+1}.
      carried: [B, T, D]; what a head K+1 would be given as its state.
    """

    main: Hidden
    heads: HeadsHidden
    carried: Hidden


class Backbone(nn.Module):
    """L blocks, scanned over stacked parameters, and the final norm."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Hidden, rotation: Rotation, mask: AttentionMask) -> Hidden:
        block = nn.remat(Block, prevent_cse=False) if self.config.remat else Block
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast,) * 4,  # pyright: ignore[reportArgumentType]
            length=self.config.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.config, name="blocks")
        x, _ = scanned(x, None, rotation, mask, None)
        return norm(self.config, "final_norm")(x)


def embed(table: Float[Array, "V D"], tokens: Int[Array, "*axes T"], config: ModelConfig) -> Float[Array, "*axes T D"]:
    """Looks up input embeddings, scaled by sqrt(D) if the config says so.

    Unscaled, a tied embedding (whose rows have unit norm, for the logits' sake) drowns in the residual stream.
    """
    return jnp.asarray(table, compute_dtype(config))[tokens] * (config.width**0.5 if config.scale_embedding else 1.0)


def embed_ahead(
    table: Float[Array, "V D"], tokens: Tokens, segment_ids: SegmentIds, first: int, last: int, config: ModelConfig
) -> Float[Array, "K B T D"]:
    """What heads first…last read: for head k at position i, Emb(t_{i+k}).

    Where that lies beyond the document the value is arbitrary: such a position has no target, and no position that has
    one can attend to it.
    """
    ahead_KxBxT = jnp.stack([shift(tokens, segment_ids, k)[0] for k in range(first, last + 1)])
    return embed(table, ahead_KxBxT, config)


class LanguageModel(nn.Module):
    """Backbone and heads with a shared embedding and unembedding."""

    config: ModelConfig
    heads_config: HeadsConfig

    def setup(self) -> None:
        config = self.config
        shape = (config.vocabulary_size, config.width)
        initializer = partitioned(nn.initializers.normal(config.width**-0.5), "vocabulary", "embed")
        self.embedding = self.param("embedding", initializer, shape, jnp.float32)
        if not config.tied_unembedding:
            self.unembedding = self.param("unembedding", initializer, shape, jnp.float32)
        self.backbone = Backbone(config)
        if self.heads_config.num_heads:
            self.heads = Heads(config, self.heads_config)

    def __call__(
        self, tokens: Tokens, segment_ids: SegmentIds, positions: Positions, detach_trunk: bool = False
    ) -> HiddenStates:
        """Runs backbone and heads on packed rows.

        Args:
          tokens, segment_ids, positions: [B, T]; segment 0 is padding.
          detach_trunk: cut the gradient from the heads into backbone and embedding.
        """
        mask_BxTxT, rotation = causal_mask(segment_ids), Rotation.of(positions, self.config)
        embedded = constrain_activation(embed(self.embedding, tokens, self.config))
        with jax.named_scope("backbone"):
            main = self.backbone(embedded, rotation, mask_BxTxT)
        num_heads = self.heads_config.num_heads
        if not num_heads:
            return HiddenStates(main, jnp.zeros((0, *main.shape), main.dtype), main)
        ahead_KxBxTxD, state = embed_ahead(self.embedding, tokens, segment_ids, 1, num_heads, self.config), main
        if detach_trunk:
            ahead_KxBxTxD, state = jax.lax.stop_gradient((ahead_KxBxTxD, state))
        with jax.named_scope("heads"):
            carried, heads_KxBxTxD = self.heads(state, ahead_KxBxTxD, rotation, mask_BxTxT)
        return HiddenStates(main, heads_KxBxTxD, carried)


def further_heads(
    model: LanguageModel,
    frozen_heads: int,
    trained: Any,
    frozen: Any,
    tokens: Tokens,
    segment_ids: SegmentIds,
    positions: Positions,
) -> HiddenStates:
    """Runs a model in two parts: what is frozen, and the heads after it. Looped extension trains so (MTP-D §3.3).

    Differentiated by ``trained``, the first part has no backward pass at all: nothing in it depends on ``trained``.

    Args:
      model: the whole model, K heads.
      frozen_heads: m, the heads that are frozen with the trunk.
      trained, frozen: the two parts of its parameters (see ``training.partition``).
      tokens, segment_ids, positions: [B, T]; segment 0 is padding.

    Returns:
      The main head's states, and those of heads m+1…K.
    """

    def with_heads(number: int) -> HeadsConfig:
        return dataclasses.replace(model.heads_config, num_heads=number)

    num_heads = model.heads_config.num_heads
    first = LanguageModel(model.config, with_heads(frozen_heads))
    hidden = apply(first, frozen, tokens, segment_ids, positions)
    ahead = embed_ahead(frozen["embedding"], tokens, segment_ids, frozen_heads + 1, num_heads, model.config)
    heads = Heads(model.config, with_heads(num_heads - frozen_heads))
    with jax.named_scope("further_heads"):
        rotation, mask = Rotation.of(positions, model.config), causal_mask(segment_ids)
        carried, further = apply(heads, trained["heads"], hidden.carried, ahead, rotation, mask)
    return HiddenStates(hidden.main, further, carried)


def build_model(config: Config) -> LanguageModel:
    """Returns the model of a config. It holds no arrays."""
    return LanguageModel(config.model, config.heads)


def unembedding_of(parameters: Any) -> Float[Array, "V D"]:
    """The unembedding matrix; with tied weights, the embedding."""
    return parameters.get("unembedding", parameters["embedding"])


def count_parameters(parameters: Any) -> int:
    """Number of scalars in a tree of (abstract) arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(parameters))
