"""The language model: embedding, a scanned decoder-only backbone, and the heads on top of its final state."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.config import Config, HeadsConfig, ModelConfig
from mtpd_jax.model.block import Block, scanned
from mtpd_jax.model.forward import run_backbone, run_heads
from mtpd_jax.model.heads import Heads
from mtpd_jax.model.layers import norm, partitioned, weights_dtype
from mtpd_jax.model.shift import shift
from mtpd_jax.model.views import PackedRows, View
from mtpd_jax.platform import Platform
from mtpd_jax.shapes import Array, Float, HeadsHidden, Hidden, Int, Parameters, Positions, SegmentIds, Tokens


@struct.dataclass
class HiddenStates:
    """What the model returns in training. Logits are the business of the loss, which makes them a chunk at a time.

    Attributes:
      main: [B, T, D]; h^0, the backbone's state after its final norm.
      heads: [K, B, T, D]; the states of heads in a row, by default h^1…h^K, each after its head's own norm; that of
        head k at position i predicts t_{i+k+1}.
      carried: [B, T, D]; what the next head would be given as its state.
      statistics: of the feed-forward layers, stacked by layer: the backbone's, and the heads'; None each where they
        have none.
    """

    main: Hidden
    heads: HeadsHidden
    carried: Hidden
    statistics: tuple[Any, Any] = (None, None)


def tokens_ahead(tokens: Tokens, segment_ids: SegmentIds, first: int, last: int) -> Int[Array, "K B T"]:
    """The tokens whose embeddings heads first…last read: for head k at position i, t_{i+k}.

    Where that lies beyond the document the value is arbitrary: such a position has no target, and no position that has
    one can attend to it.
    """
    return jnp.stack([shift(tokens, segment_ids, k)[0] for k in range(first, last + 1)])


class Backbone(nn.Module):
    """L blocks, scanned over stacked parameters, and the final norm. ``forward.run_backbone`` runs them."""

    config: ModelConfig

    def setup(self) -> None:
        stack = scanned(
            Block, self.config, self.config.layers, (nn.broadcast,), metadata_params={nn.PARTITION_NAME: "layers"}
        )
        self.blocks = stack(self.config)
        self.final_norm = norm(self.config)


class LanguageModel(nn.Module):
    """Backbone and heads with a shared embedding and unembedding. Its config is one that a platform has resolved."""

    config: ModelConfig
    heads_config: HeadsConfig

    def setup(self) -> None:
        config = self.config
        # One matrix, or two: what tokens go in by, and what logits come out by.
        shape = (config.vocabulary_size, config.width)
        initializer = partitioned(nn.initializers.normal(config.width**-0.5), "vocabulary", "width")
        self.embedding = self.param("embedding", initializer, shape, weights_dtype(config))
        if not config.tied_unembedding:
            self.unembedding = self.param("unembedding", initializer, shape, weights_dtype(config))
        # What is read where a token is not there yet; see ``ModelConfig.mask_embedding``.
        self.mask_embedding = None
        if config.mask_embedding:
            of_mask = partitioned(nn.initializers.normal(config.width**-0.5), None)
            self.mask_embedding = self.param("mask_embedding", of_mask, (config.width,), weights_dtype(config))
        self.backbone = Backbone(config)
        if self.heads_config.num_heads:
            self.heads = Heads(config, self.heads_config)

    def __call__(
        self,
        tokens: Tokens,
        segment_ids: SegmentIds,
        positions: Positions,
        *,
        view: View | None = None,
        detach_trunk: bool = False,
    ) -> HiddenStates:
        """Runs backbone and heads on packed rows.

        Args:
          tokens, segment_ids, positions: [B, T]; segment 0 is padding.
          view: what the tokens see; None: earlier ones of their document.
          detach_trunk: cut the gradient from the heads into backbone and embedding.
        """
        view = PackedRows.of(segment_ids, positions, self.config) if view is None else view
        # h^0 of all positions.
        blocks, final_norm = self.backbone.blocks, self.backbone.final_norm
        main, outputs = run_backbone(self.config, self.embedding, blocks, final_norm, tokens, view, self.mask_embedding)
        # The heads read it, head 1 first.
        below = HiddenStates(main, jnp.zeros((0, *main.shape), main.dtype), main, (outputs.statistics, None))
        return self.further_heads(below, 1, tokens, segment_ids, view=view, detach=detach_trunk)

    def further_heads(
        self,
        below: HiddenStates,
        first: int,
        tokens: Tokens,
        segment_ids: SegmentIds,
        *,
        view: View,
        detach: bool = False,
    ) -> HiddenStates:
        """Runs this model's heads on what lies below them, perhaps of another model, as heads ``first`` and following.

        Args:
          below: what backbone and heads before ``first`` returned for these rows.
          first: the first head's number, at least 1.
          tokens, segment_ids: [B, T]; segment 0 is padding.
          view: what the tokens see.
          detach: cut the gradient from these heads into what is below, and into the embedding.

        Returns:
          The main head's states, and those of these heads alone.
        """
        number = self.heads_config.num_heads
        if not number:
            return below
        # What each head looks ahead to, and then all of them in one scan.
        ahead_KxBxT = tokens_ahead(tokens, segment_ids, first, first + number - 1)
        carried, output = run_heads(
            self.config, self.embedding, self.heads, below.carried, ahead_KxBxT, view, detach=detach
        )
        return HiddenStates(below.main, output.normed, carried, (below.statistics[0], output.block.statistics))


def build_model(config: Config, platform: Platform) -> LanguageModel:
    """Returns the model of a config, as it is computed on a platform. It holds no arrays."""
    model = dataclasses.replace(platform.resolve(config.model), context=config.context)
    return LanguageModel(model, config.heads)


def unembedding_of(parameters: Parameters) -> Float[Array, "V D"]:
    """The unembedding matrix; with tied weights, the embedding."""
    return parameters.get("unembedding", parameters["embedding"])


def count_parameters(parameters: Any) -> int:
    """Number of scalars in a tree of (abstract) arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(parameters))
