"""The model as decoding runs it: a few tokens per pass, against caches, from parameters laid out for that.

In training a scan runs over stacked layers and whole packed rows. Here every pass reads all weights for a handful of
tokens, so that its time is the time of reading them, and their layout decides (``DecodingParameters``).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from mtpd_jax.model import costs
from mtpd_jax.model.backbone import LanguageModel, unembedding_of
from mtpd_jax.model.block import Block
from mtpd_jax.model.cache import Caches, KVCache, empty_cache, slots_of
from mtpd_jax.model.chains import run_chain
from mtpd_jax.model.forward import run_backbone, run_heads
from mtpd_jax.model.head import HeadOutput
from mtpd_jax.model.heads import HEAD_KINDS
from mtpd_jax.model.layers import apply, cast_matrices, compute_dtype, norm
from mtpd_jax.model.views import CachedRows, PackedRows
from mtpd_jax.platform import Platform
from mtpd_jax.shapes import Array, Float, HeadsHidden, Hidden, Int, Parameters
from mtpd_jax.sharding import within


@struct.dataclass
class DecodingParameters:
    """A model's parameters, in the dtype of its products.

    Attributes:
      embedding: [V, D].
      unembedding: [D, V], the layout in which CPUs multiply few rows twice as fast.
      blocks: the backbone's: a tuple with one tree per layer, or one tree of arrays stacked along a leading axis,
        over which the layers are scanned.
      final_norm: the backbone's.
      heads: like ``blocks``; a shared head is a stack of one.
      mask_embedding: [D], of models that have one.
    """

    # Not annotated as arrays: ahead-of-time compilation makes such trees of other things, too.
    embedding: Any
    unembedding: Any
    blocks: Any
    final_norm: Any
    heads: Any
    mask_embedding: Any = None


def precision_of(model: LanguageModel) -> str:
    """Float32 decoding multiplies in float32; accelerators would otherwise round the operands to TF32 or bfloat16."""
    return "highest" if compute_dtype(model.config) == jnp.float32 else "default"


class Network:
    """Backbone and heads as functions of ``DecodingParameters``.

    Args:
      model: what was trained.
      platform: that decodes.
      scanned: the layout of the backbone, see ``DecodingParameters``; None: the platform's choice.
      scanned_heads: the layout of the heads, which only a stack lets run to a depth that is not known beforehand;
        None: as the backbone.
      mesh: of the devices that share the parameters of one copy; None where each has all of them.
    """

    def __init__(
        self,
        model: LanguageModel,
        platform: Platform,
        scanned: bool | None = None,
        scanned_heads: bool | None = None,
        mesh: Mesh | None = None,
    ):
        self.config, self.heads_config = model.config, model.heads_config
        self.mesh = mesh
        self.dtype, self.precision = compute_dtype(model.config), precision_of(model)
        # Scanned layers compile faster, and read each block's weights out of a stack.
        weights = model.config.layers * costs.block(model.config, 0).weights
        self.scanned = platform.scans_layers(weights, self.dtype) if scanned is None else scanned
        self.scanned_heads = self.scanned if scanned_heads is None else scanned_heads
        self._block, self._final_norm = Block(model.config), norm(model.config)
        self._kind = HEAD_KINDS[model.heads_config.kind]
        self._head: Any = self._kind.module(model.config, model.heads_config.pass_normed)

    @property
    def shares_cache(self) -> bool:
        """Whether all depths of the heads have one cache; see ``model.chains``."""
        return self.heads_config.cache == "shared"

    @property
    def modules(self) -> int:
        """Head modules with parameters of their own; depth j uses module (j-1) mod this (MTP-D §3.3)."""
        return 1 if self._kind.shared else self.heads_config.num_heads

    def parameters(self, parameters: Parameters) -> DecodingParameters:
        """Lays the model's parameters out for decoding, matrices cast to the dtype of the products once."""
        # Once, and not in every pass.
        parameters = cast_matrices(parameters, self.dtype)
        heads = parameters["heads"]["head"] if self.heads_config.num_heads else None
        # A shared head has no axis for its modules; decoding indexes one.
        if self._kind.shared:
            heads = jax.tree.map(lambda leaf: leaf[None], heads)
        return DecodingParameters(
            embedding=parameters["embedding"],
            unembedding=unembedding_of(parameters).T,
            blocks=_laid_out(parameters["backbone"]["blocks"], self.config.layers, self.scanned),
            final_norm=parameters["backbone"]["final_norm"],
            heads=_laid_out(heads, self.modules, self.scanned_heads),
            mask_embedding=parameters.get("mask_embedding"),
        )

    def empty_cache(self, batch: int, slots: int) -> Caches:
        """The backbone's cache before anything was read."""
        return self._empty(batch, slots, self.config.layers, self.scanned)

    def empty_head_caches(self, batch: int, slots: int, depths: int) -> Caches:
        """A cache for every depth of the heads, or the one that they share, before anything was read."""
        if self.shares_cache:
            return empty_cache(batch, slots, self.config, self.dtype)
        return self._empty(batch, slots, depths, self.scanned_heads)

    def _empty(self, batch: int, slots: int, count: int, stacked: bool) -> Caches:
        if stacked:
            return empty_cache(batch, slots, self.config, self.dtype, stack=count)
        return tuple(empty_cache(batch, slots, self.config, self.dtype) for _ in range(count))

    def extend(
        self, parameters: DecodingParameters, tokens: Int[Array, "B T"], start: Int[Array, " B"], cache: Caches
    ) -> tuple[Hidden, Caches]:
        """Runs the backbone over T consecutive tokens per row, from position ``start`` on: h^0 and the new cache."""
        # What the tokens see is the same for all layers but for the cache.
        slots = slots_of(cache[0] if isinstance(cache, tuple) else cache)
        # New tokens see all slots up to their own.
        view = CachedRows.of(start, tokens.shape[1], slots, self.config)

        def blocks(x: Hidden, view: CachedRows) -> tuple[Hidden, Caches]:
            def run_block(layer: int | Array, x: Hidden, block_cache: KVCache) -> tuple[Hidden, KVCache, None]:
                x, output = apply(self._block, _layer(parameters.blocks, layer), x, view.of_layer(block_cache))
                return x, output.cache, None

            x, caches, _ = over_layers(run_block, x, cache, self.config.layers)
            return x, caches

        def final_norm(x: Hidden) -> Hidden:
            return apply(self._final_norm, parameters.final_norm, x)

        return run_backbone(
            self.config, parameters.embedding, blocks, final_norm, tokens, view, parameters.mask_embedding
        )

    def run_head(
        self,
        parameters: DecodingParameters,
        depth: int | Array,
        state: Hidden,
        ahead: Int[Array, "B T"],
        first: Int[Array, " B"],
        cache: KVCache,
        margin: int,
    ) -> tuple[Hidden, Hidden, KVCache]:
        """Runs the head of one depth over T consecutive positions, from ``first`` on.

        Args:
          depth: from 0; past the last module the modules come round again.
          state: [B, T, D]; h^0 for depth 0, else what the depth before returned as state.
          ahead: [B, T]; the token that each position looks ahead to, t_{i+depth+1}.
          cache, margin: of this depth; position p lies in slot p + margin. In one cache for all depths, depth k of the
            chain that begins at position i has the position i+k-1.

        Returns:
          The state for the next depth, the normed state, and the new cache.
        """
        # The heads' slots are shifted, for their windows may begin before position 0.
        view = CachedRows.of(first, ahead.shape[1], slots_of(cache), self.config, margin)

        def head(state: Hidden, embedded: Hidden, view: CachedRows) -> tuple[Hidden, HeadOutput]:
            weights = _layer(parameters.heads, depth % self.modules)
            return apply(self._head, weights, state, embedded, view.of_layer(cache))

        state, output = run_heads(self.config, parameters.embedding, head, state, ahead, view)
        return state, output.normed, output.block.cache

    def run_chains(
        self, parameters: DecodingParameters, state: Hidden, ahead: Int[Array, "K B T"], rows: PackedRows
    ) -> HeadsHidden:
        """The normed states, [K, B, T, D], of heads with one cache at every depth of the chains of whole rows.

        Args:
          state: [B, T, D]; h^0.
          ahead: [K, B, T]; t_{i+k}.
          rows: that the chains are of.
        """
        weights = _layer(parameters.heads, 0)

        def heads(state: Hidden, embedded: Float[Array, "K B T D"], view: PackedRows) -> tuple[Hidden, HeadOutput]:
            return run_chain(lambda *inputs: apply(self._head, weights, *inputs), self.config, state, embedded, view)

        return run_heads(self.config, parameters.embedding, heads, state, ahead, rows)[1].normed

    def logits(self, parameters: DecodingParameters, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """The shared unembedding's logits, in float32."""
        return jnp.matmul(hidden, parameters.unembedding, preferred_element_type=jnp.float32)

    def jit(self, function: Callable[..., Any], **options: Any) -> Any:
        """Jits a function, with options of ``jax.jit``; its products have the network's precision, and lie on its mesh
        as the rules say."""

        def with_precision(*arguments: Any) -> Any:
            with jax.default_matmul_precision(self.precision):
                return function(*arguments)

        return jax.jit(with_precision if self.mesh is None else within(self.mesh, with_precision), **options)


def over_layers(
    body: Callable[[Any, Any, KVCache], tuple[Any, KVCache, Any]], carry: Any, caches: Caches, count: int
) -> tuple[Any, Caches, Any]:
    """Runs ``body(index, carry, cache) -> (carry, cache, output)`` for the layers, or heads, 0…count-1.

    Args:
      caches: of all layers, stacked (then the layers are scanned) or as a tuple (then they are written out).

    Returns:
      The last carry, the new caches, and the outputs stacked along a leading axis (None without any layer).
    """
    if not count:
        return carry, caches, None
    # A stack: one body, whose index is an array.
    if not isinstance(caches, tuple):

        def step(state: tuple[Any, KVCache], index: Array) -> tuple[tuple[Any, KVCache], Any]:
            carry, cache, output = body(index, state[0], state[1].use(index))
            return (carry, cache.use(None)), output

        (carry, caches), outputs = jax.lax.scan(step, (carry, caches), jnp.arange(count))
        return carry, caches, outputs
    # A tuple: a body per layer, written out.
    new_caches, outputs = [], []
    for index, cache in enumerate(caches):
        carry, cache, output = body(index, carry, cache)
        new_caches.append(cache)
        outputs.append(output)
    return carry, tuple(new_caches), jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def _laid_out(stacked: Any, count: int, scanned: bool) -> Any:
    leaves, structure = jax.tree.flatten(stacked)
    return stacked if scanned else tuple(structure.unflatten([leaf[i] for leaf in leaves]) for i in range(count))


def _layer(layers: Any, index: int | Array) -> Any:
    if isinstance(layers, tuple):
        return layers[index]
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), layers)
