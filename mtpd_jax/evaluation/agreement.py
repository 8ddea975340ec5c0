"""Teacher-forced agreement on the texts that decoding wrote: what acceptance is held beside."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.decoding.decoder import Continuation, Decoder
from mtpd_jax.decoding.network import DecodingParameters, Network, over_layers
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.model.cache import Caches, KVCache
from mtpd_jax.model.views import PackedRows
from mtpd_jax.shapes import Array, Hidden, Int
from mtpd_jax.sharding import WHOLE

# Texts that ``fit`` draws, and their tokens. Our choice.
_FIT_TEXTS, _FIT_TOKENS = 8, 64


def choices_of_all_heads(
    network: Network, parameters: DecodingParameters, tokens: Int[Array, "B T"], depths: int, chunk: int
) -> Int[Array, "J B T"]:
    """The likeliest token by every head at every position, each head reading the text itself instead of drafts.

    Row 0 is the main head; row j at position i is head j's choice for the token at i+j+1. Texts are read a chunk at a
    time, as prompts are, so that neither all scores nor all logits of a long one are there at once.

    Args:
      depths: heads; at least one.
      chunk: positions; T is a multiple of it.
    """
    batch, length = tokens.shape

    def by_chunk(read: Callable[..., tuple[Any, Any]], state: Any, *inputs: Array) -> Any:
        """What ``read(state, first position, *chunks) -> (state, outputs)`` makes of chunks, put together again."""
        parts = [each.reshape(batch, -1, chunk, *each.shape[2:]).swapaxes(0, 1) for each in inputs]
        begins = jnp.broadcast_to(jnp.arange(0, length, chunk)[:, None], (length // chunk, batch))
        _, outputs = jax.lax.scan(lambda state, part: read(state, *part), state, (begins, *parts))
        return jax.tree.map(lambda part: part.swapaxes(0, 1).reshape(batch, length, *part.shape[3:]), outputs)

    def likeliest(state: Hidden) -> Array:
        return by_chunk(lambda _, begin, part: (None, WHOLE.argmax(network.logits(parameters, part))), None, state)

    def read_text(cache: Caches, begin: Array, part: Array) -> tuple[Caches, Hidden]:
        hidden, cache = network.extend(parameters, part, begin, cache)
        return cache, hidden

    # The main head reads the text, and then each head the text itself and the state of the one before.
    main = by_chunk(read_text, network.empty_cache(batch, length), tokens)
    first = likeliest(main)[None]
    if network.shares_cache:
        ahead = jnp.stack([jnp.roll(tokens, -depth, axis=1) for depth in range(1, depths + 1)])
        places = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
        rows = PackedRows.of(jnp.ones_like(tokens), places, network.config)
        states = network.run_chains(parameters, main, ahead, rows)
        return jnp.concatenate([first, jax.lax.map(likeliest, states)])

    def run_head(depth: Any, state: Hidden, cache: KVCache) -> tuple[Hidden, KVCache, Array]:
        ahead = jnp.roll(tokens, -1 - depth, axis=1)  # what comes around meets no target

        def read_states(
            cache: KVCache, begin: Array, state: Hidden, ahead: Array
        ) -> tuple[KVCache, tuple[Hidden, Hidden]]:
            state, normed, cache = network.run_head(parameters, depth, state, ahead, begin, cache, margin=0)
            return cache, (state, normed)

        state, normed = by_chunk(read_states, cache, state, ahead)
        return state, cache, likeliest(normed)  # no other depth reads this cache

    caches = network.empty_head_caches(batch, length, depths)
    _, _, chosen = over_layers(run_head, main, caches, depths)
    return jnp.concatenate([first, chosen])


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
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    continuations: Sequence[Continuation],
    depths: int,
    until: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Counts, per head and prompt, the tokens on which a head's choice is the main head's, and all that are counted.

    Every token is counted that a draft could have stood for: all but the first, which comes from prefill.

    Args:
      decoder: of the model that wrote the texts.
      prompts, continuations: the texts, written by plain decoding.
      depths: heads; more than the model has are looped, as in decoding.
      until: tokens of text that heads draft up to, see ``Options``.

    Returns:
      Both [heads, prompts].
    """
    agreed, counted = np.zeros((2, depths, len(prompts)))
    if not depths:
        return agreed, counted
    network, parameters = decoder.one_copy(Options(depths, 1))

    def choose(parameters: DecodingParameters, tokens: Array) -> Array:
        return choices_of_all_heads(network, parameters, tokens, depths, decoder.chunk_of(tokens.shape[1]))

    choices = network.jit(choose)
    for number, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        # Few lengths are compiled; causality makes padding harmless.
        text = np.concatenate([prompt, np.asarray(continuation.tokens, np.int32)])
        padded = np.zeros((1, decoder.padded_length(len(text))), np.int32)
        padded[0, : len(text)] = text
        chosen = np.asarray(jax.device_get(choices(parameters, padded)))[:, 0]
        for depth in range(1, depths + 1):
            # Tokens that a draft could have stood for, and that the head could look far enough back for.
            targets = np.arange(max(len(prompt), depth) + 1, len(text[:until]))
            agreed[depth - 1, number] = np.sum(chosen[depth, targets - 1 - depth] == chosen[0, targets - 1])
            counted[depth - 1, number] = len(targets)
    return agreed, counted
