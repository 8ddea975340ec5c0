"""Teacher-forced agreement on the texts that decoding wrote: what acceptance is held beside."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.decoding.decoder import Continuation, Decoder
from mtpd_jax.decoding.network import DecodingParameters, Network, over_layers
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.model.cache import KVCache
from mtpd_jax.model.views import PackedRows
from mtpd_jax.shapes import Array, Hidden, Int
from mtpd_jax.sharding import WHOLE

# Texts that ``fit`` draws, and their tokens. Our choice.
_FIT_TEXTS, _FIT_TOKENS = 8, 64
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
        # A depth's logits at a time.
        deeper = jax.lax.map(lambda state: WHOLE.argmax(network.logits(parameters, state)), states)
        return jnp.concatenate([first, deeper])

    def run_head(depth: Any, state: Hidden, cache: KVCache) -> tuple[Hidden, KVCache, Array]:
        ahead = jnp.roll(tokens, -1 - depth, axis=1)  # what comes around meets no target
        state, normed, cache = network.run_head(parameters, depth, state, ahead, start, cache, margin=0)
        return state, cache, WHOLE.argmax(network.logits(parameters, normed))

    caches = network.empty_head_caches(batch, length, depths)
    _, _, chosen = over_layers(run_head, main, caches, depths)
    return first if chosen is None else jnp.concatenate([first, chosen])


def fit(decoder: Decoder, tokenizer: Tokenizer, heads: int) -> str:
    """Says how well heads fit a backbone that they were not trained on: how often they agree with it on its own text.

    Args:
      decoder: of both.
      tokenizer: whose first token, or else end token, the texts begin after; they are drawn at temperature 1.
      heads: of the model.
    """
    prompts = [np.asarray(tokenizer.begin_ids or (tokenizer.end_id,), np.int32)] * _FIT_TEXTS
    length = min(_FIT_TOKENS, decoder.context - 1)
    written = decoder.run(prompts, Options(0, length, Sampling(1.0)))
    agreed, counted = (counts.sum(axis=1) for counts in count_agreement(decoder, prompts, written, heads))
    rates = ", ".join(f"{share:.1%}" for share in agreed / np.maximum(counted, 1))
    return (
        f"the heads were trained on another backbone: on {int(counted[0])} tokens of {_FIT_TEXTS} texts that this one "
        f"wrote, heads 1 to {heads} choose the token that it chooses in {rates}"
    )


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
