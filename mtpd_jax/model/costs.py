"""What a model needs at least: weights, and FLOPs per token.

Weights are those of matrices, without norms and biases; all numbers are whole, and do not overflow.
"""

import dataclasses

from mtpd_jax.config import HeadsConfig, ModelConfig
from mtpd_jax.model.feed_forward import FEED_FORWARDS
from mtpd_jax.model.heads import HEAD_KINDS


@dataclasses.dataclass(frozen=True)
class Part:
    """What a part of a network costs to run on one token.

    Attributes:
      weights: of its matrices.
      multiplications: weights that are used, and products of attention scores, as many again.
    """

    weights: int
    multiplications: int

    def times(self, count: int) -> "Part":
        """So many of it, each with weights of its own."""
        return Part(count * self.weights, count * self.multiplications)

    def __add__(self, other: "Part") -> "Part":
        return Part(self.weights + other.weights, self.multiplications + other.multiplications)


def block(model: ModelConfig, length: int) -> Part:
    """A Transformer block; causal attention over ``length`` tokens counted whole, as PaLM (arXiv 2204.02311 B) does."""
    # Queries and output, keys and values.
    attention = 2 * model.width * model.head_size * (model.query_heads + model.kv_heads)
    weights = attention + FEED_FORWARDS[model.feed_forward].weights(model)
    return Part(weights, weights + 2 * length * model.query_heads * model.head_size)


def head(model: ModelConfig, config: HeadsConfig, length: int) -> Part:
    """A head, without its logits."""
    own = HEAD_KINDS[config.kind].weights(model)
    return block(model, length) + Part(own, own)


def heads(model: ModelConfig, config: HeadsConfig, count: int, length: int) -> Part:
    """So many heads in a row; the weights of a shared one are there once and used at every depth."""
    one = head(model, config, length)
    # Weights of each module there is; products at every depth.
    modules = min(count, 1) if HEAD_KINDS[config.kind].shared else count
    return Part(modules * one.weights, count * one.multiplications)


def trunk(model: ModelConfig, length: int) -> Part:
    """Embedding, backbone, and the main head's logits. (Looking up an embedding multiplies nothing.)"""
    matrix = model.vocabulary_size * model.width
    own = Part(matrix if model.tied_unembedding else 2 * matrix, matrix)
    return block(model, length).times(model.layers) + own


def unembedding(model: ModelConfig) -> int:
    """Multiplications of one head's logits."""
    return model.vocabulary_size * model.width


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a way of training costs.

    Attributes:
      trained, frozen: weights.
      differentiated_blocks: blocks that are run backwards, and so keep activations.
      flops_per_token: of a training token: what the model needs, and not what an implementation recomputes. 2 per
        multiplication forward, 2 for the gradient by the weights, 2 for that by the inputs.
    """

    trained: int
    frozen: int
    differentiated_blocks: int
    flops_per_token: int
