"""Self-speculative decoding: the heads draft K tokens, one pass of the backbone verifies them, nothing is lost.

One round, with n confirmed tokens t_0…t_{n-1}, of which the backbone has read all but the last:

    draft    at position n-2, head 1 reads h^0 and t_{n-1} and drafts t_n; head 2 reads h^1 and that draft; …
    verify   the backbone reads t_{n-1} and the K drafts in one pass, and says for each what it would have written
    accept   the longest run of drafts that it agrees with, and one token of its own after them

Nothing is rolled back. A pass writes its keys and values at its tokens' positions, and so overwrites those of
rejected drafts before anything can attend to them; for the heads' caches see ``decoding.drafting``. With K = 0 this is
plain decoding, one token per pass.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from mtpd_jax.decoding.drafting import Drafts, HeadState, draft
from mtpd_jax.decoding.network import DecodingParameters, Network, over_layers
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.rows import Rows, read, slice_rows
from mtpd_jax.decoding.sampling import accept_drafts, choose, count_leading, fold, probabilities
from mtpd_jax.shapes import Array, Bool, Hidden, Int
from mtpd_jax.sharding import WHOLE

# Numbers folded into a row's key, to keep its draws apart: drafts use 1…K.
_VERIFY = 0


@struct.dataclass
class State:
    """What goes from round to round.

    Attributes:
      rows: the texts.
      cache: the backbone's, holding positions up to n-2.
      heads: what the heads keep.
    """

    rows: Rows
    cache: Any
    heads: HeadState


def prefill(
    network: Network,
    parameters: DecodingParameters,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    keys: Array,
    options: Options,
    end_id: int,
    chunk: int,
) -> State:
    """Reads the prompts and writes the first token of each continuation.

    A chunk at a time goes through the backbone and through all heads, so that memory does not grow with the prompt's
    length beyond the caches. The heads look ahead into the next chunk.

    Args:
      prompts: [B, T], filled up on the right with anything: a slot is overwritten before it can be seen.
      lengths: [B]; tokens of each prompt, at least one.
      keys: one per row.
      chunk: tokens; T is a multiple of it.
    """
    batch, padded = prompts.shape
    depths, window = options.num_heads, options.window
    slots = padded + options.max_new_tokens + options.width
    rows = Rows.start(prompts, lengths, depths, options.max_new_tokens, slots)

    def read_chunk(state: tuple[Any, Any, Hidden], begin: Array) -> tuple[tuple[Any, Any, Hidden], None]:
        cache, head_caches, kept = state
        first = jnp.full(batch, begin)
        hidden, cache = network.extend(parameters, read(rows.tokens, first, chunk), first, cache)

        def run_head(depth: Any, state: Hidden, cache: Any) -> tuple[Hidden, Any, None]:
            ahead = read(rows.tokens, first + depth + 1, chunk)
            state, _, cache = network.run_head(parameters, depth, state, ahead, first, cache, margin=window)
            return state, cache, None

        _, head_caches, _ = over_layers(run_head, hidden, head_caches, depths)
        kept = slice_rows(jnp.concatenate([kept, hidden], axis=1), jnp.clip(lengths - begin, 0, chunk), window)
        return (cache, head_caches, kept), None

    start = (
        network.empty_cache(batch, slots),
        network.empty_head_caches(batch, slots + window, depths),
        jnp.zeros((batch, window, network.config.width), network.dtype),
    )
    if padded == chunk:
        (cache, head_caches, kept), _ = read_chunk(start, jnp.zeros((), jnp.int32))
    else:
        (cache, head_caches, kept), _ = jax.lax.scan(read_chunk, start, jnp.arange(0, padded, chunk))
    first, _ = choose(fold(keys, lengths), network.logits(parameters, kept[:, -1]), options.sampling)
    one = jnp.ones_like(lengths)
    return State(rows.append(first[:, None], one, 0 * one, end_id), cache, HeadState(head_caches, kept, one))


def verify(
    network: Network, parameters: DecodingParameters, state: State, drafts: Drafts, keys: Array, options: Options
) -> tuple[Int[Array, "B J"], Int[Array, " B"], Any, Hidden]:
    """One pass of the backbone over the last confirmed token and the drafts.

    Returns:
      The candidates (the drafts, with the main head's own token in the place after the last accepted one), how many
      drafts are accepted, the backbone's cache, and h^0 of the pass, [B, K+1, D].
    """
    rows, num_drafts = state.rows, options.num_heads
    first = rows.length - 1
    inputs = jnp.concatenate([read(rows.tokens, first, 1), drafts.tokens], axis=1)
    padded = jnp.pad(inputs, ((0, 0), (0, options.width - num_drafts - 1)))
    hidden, cache = network.extend(parameters, padded, first, state.cache)
    logits = network.logits(parameters, hidden)[:, : num_drafts + 1]
    if options.sampling.greedy:
        choices = WHOLE.argmax(logits)
        made = jnp.arange(num_drafts)[None, :] < drafts.count[:, None]
        accepted = count_leading((drafts.tokens == choices[:, :-1]) & made)
        own = jnp.take_along_axis(choices, accepted[:, None], axis=1)[:, 0]
    else:
        target = probabilities(logits, options.sampling)
        accepted, own = accept_drafts(fold(keys, _VERIFY), drafts.tokens, drafts.count, drafts.probabilities, target)
    places = jnp.arange(num_drafts + 1)[None, :]
    candidates = jnp.where(places == accepted[:, None], own[:, None], jnp.pad(drafts.tokens, ((0, 0), (0, 1))))
    return candidates, accepted, cache, hidden[:, : num_drafts + 1]


def advance(
    state: State,
    drafts: Drafts,
    candidates: Int[Array, "B J"],
    accepted: Int[Array, " B"],
    cache: Any,
    heads: HeadState,
    hidden: Hidden,
    end_id: int,
) -> State:
    """Appends what was accepted, counts it, and moves the window of h^0 along."""
    rows, width = state.rows, candidates.shape[1]
    # Draft k was tried if those before it stand, none of them ended the text, and there was room for it.
    k = jnp.arange(width - 1)[None, :]
    ended = jnp.cumsum(candidates[:, :-1] == end_id, axis=1) - (candidates[:, :-1] == end_id) > 0
    room = jnp.minimum(drafts.count, rows.limit - rows.length)[:, None]
    tried = (k <= accepted[:, None]) & (k < room) & ~ended & ~rows.finished[:, None]
    counted = dataclasses.replace(
        rows,
        passes=rows.passes + ~rows.finished,
        tried=rows.tried + tried,
        accepted=rows.accepted + (tried & (k < accepted[:, None])),
    )
    moved = counted.append(candidates, accepted + 1, accepted, end_id)
    confirmed = moved.length - rows.length
    window = slice_rows(jnp.concatenate([heads.window, hidden], axis=1), confirmed, heads.window.shape[1])
    return State(moved, cache, HeadState(heads.caches, window, heads.behind + confirmed))


def one_round(
    network: Network, parameters: DecodingParameters, state: State, keys: Array, options: Options, end_id: int
) -> State:
    """Drafts, verifies and appends; ``keys`` are those of the rows."""
    keys = fold(keys, state.rows.length)
    drafts, heads = draft(network, parameters, state.rows, state.heads, keys, options)
    candidates, accepted, cache, hidden = verify(network, parameters, state, drafts, keys, options)
    return advance(state, drafts, candidates, accepted, cache, heads, hidden, end_id)


def make_decode(network: Network, options: Options, end_id: int, chunk: int, mesh: Mesh | None = None) -> Any:
    """Returns the jitted function (parameters, prompts [B, T], lengths [B], keys [B]) -> ``Rows``.

    Greedy output equals plain decoding's up to rounding; sampled output has plain decoding's distribution.

    Args:
      network, options, end_id, chunk: see ``prefill``.
      mesh: with one, of a single axis, its devices share the rows evenly. Each holds all parameters, and runs until its
        own rows are finished: they have nothing to tell each other.
    """

    def unfinished(state: State) -> Bool[Array, ""]:
        return ~jnp.all(state.rows.finished)

    def decode(parameters: DecodingParameters, prompts: Array, lengths: Array, keys: Array) -> Rows:
        state = prefill(network, parameters, prompts, lengths, keys, options, end_id, chunk)
        return jax.lax.while_loop(
            unfinished, lambda state: one_round(network, parameters, state, keys, options, end_id), state
        ).rows

    if mesh is None:
        return network.jit(decode)
    whole, rows = PartitionSpec(), PartitionSpec(*mesh.axis_names)
    return network.jit(
        jax.shard_map(decode, mesh=mesh, in_specs=(whole, rows, rows, rows), out_specs=rows, check_vma=False)
    )
