"""Teacher-forced agreement on the texts that decoding wrote: what acceptance is held beside."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtpd_jax.decoding.decoder import Continuation, Decoder
from mtpd_jax.decoding.network import DecodingParameters, Network, over_layers
from mtpd_jax.decoding.options import Options
from mtpd_jax.model.cache import KVCache
from mtpd_jax.model.views import PackedRows
from mtpd_jax.shapes import Array, Hidden, Int
from mtpd_jax.sharding import WHOLE

# Texts are padded to a multiple of this, so that few lengths are compiled. Our choice.
_TEXT_MULTIPLE = 64


def choices_of_all_heads(
    network: Network, parameters: DecodingParameters, tokens: Int[Array, "B T"], depths: int
) -> Int[Array, "J B T"]:
    """The likeliest token by every head at every position, each head reading the text itself instead of drafts.

    Row 0 is the main head; row j at position i is head j's choice for the token at i+j+1.
    """
    batch, length = tokens.shape
    start = jnp.zeros(batch, jnp.int32)
    # The main head reads the text, and then each head the text itself and the state of the one before.
    main, _ = network.extend(parameters, tokens, start, network.empty_cache(batch, length))

    first = WHOLE.argmax(network.logits(parameters, main))[None]
    if depths and network.shares_cache:
        ahead = jnp.stack([jnp.roll(tokens, -depth, axis=1) for depth in range(1, depths + 1)])
        places = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
        rows = PackedRows.of(jnp.ones_like(tokens), places, network.config)
        states = network.run_chains(parameters, main, ahead, rows)
        return jnp.concatenate([first, WHOLE.argmax(network.logits(parameters, states))])

    def run_head(depth: Any, state: Hidden, cache: KVCache) -> tuple[Hidden, KVCache, Array]:
        ahead = jnp.roll(tokens, -1 - depth, axis=1)  # what comes around meets no target
        state, normed, cache = network.run_head(parameters, depth, state, ahead, start, cache, margin=0)
        return state, cache, WHOLE.argmax(network.logits(parameters, normed))

    caches = network.empty_head_caches(batch, length, depths)
    _, _, chosen = over_layers(run_head, main, caches, depths)
    return first if chosen is None else jnp.concatenate([first, chosen])


def count_agreement(
    decoder: Decoder, prompts: Sequence[np.ndarray], continuations: Sequence[Continuation], depths: int
) -> tuple[np.ndarray, np.ndarray]:
    """Counts, per head and prompt, the tokens on which a head's choice is the main head's, and all that are counted.

    Every token is counted that a draft could have stood for: all but the first, which comes from prefill.

    Args:
      decoder: of the model that wrote the texts.
      prompts, continuations: the texts, written by plain decoding.
      depths: heads; more than the model has are looped, as in decoding.

    Returns:
      Both [heads, prompts].
    """
    network, parameters = decoder.network(Options(depths, 1))
    choices = network.jit(lambda parameters, tokens: choices_of_all_heads(network, parameters, tokens, depths))
    agreed, counted = np.zeros((2, depths, len(prompts)))
    for number, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        # Few lengths are compiled; causality makes padding harmless.
        text = np.concatenate([prompt, np.asarray(continuation.tokens, np.int32)])
        padded = np.zeros((1, -(-len(text) // _TEXT_MULTIPLE) * _TEXT_MULTIPLE), np.int32)
        padded[0, : len(text)] = text
        chosen = np.asarray(jax.device_get(choices(parameters, padded)))[:, 0]
        for depth in range(1, depths + 1):
            # Tokens that a draft could have stood for, and that the head could look far enough back for.
            targets = np.arange(max(len(prompt), depth) + 1, len(text))
            agreed[depth - 1, number] = np.sum(chosen[depth, targets - 1 - depth] == chosen[0, targets - 1])
            counted[depth - 1, number] = len(targets)
    return agreed, counted
