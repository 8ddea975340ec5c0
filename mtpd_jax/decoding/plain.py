"""Plain decoding, one token per pass: the reference for speculative decoding and its baseline; and what both share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.decoding.sampling import Sampling, choose, fold
from mtpd_jax.model.backbone import LanguageModel, unembedding_of
from mtpd_jax.model.cache import KVCache, empty_cache, visible
from mtpd_jax.model.layers import apply, compute_dtype
from mtpd_jax.shapes import AnyArray, Array, Bool, Float, Hidden, Int


@struct.dataclass
class Rows:
    """The texts being written, one per row, and the count of what it took.

    Attributes:
      tokens: [B, S]; prompt and continuation; beyond ``length`` anything may stand.
      length: [B]; confirmed tokens, prompt included.
      limit: [B]; the length at which a row is cut off.
      finished: [B]; an end token was written, or the limit reached.
      proposer: [B, S]; 0 for a token that the main head chose, k for an accepted draft of head k.
      passes: [B]; verification passes (of a row that was not finished yet), without prefill.
      tried: [B, K]; rounds in which head k's draft was verified and all drafts before it were accepted.
      accepted: [B, K]; rounds in which head k's draft was accepted, too.
    """

    tokens: Int[AnyArray, "B S"]
    length: Int[AnyArray, " B"]
    limit: Int[AnyArray, " B"]
    finished: Bool[AnyArray, " B"]
    proposer: Int[AnyArray, "B S"]
    passes: Int[AnyArray, " B"]
    tried: Int[AnyArray, "B K"]
    accepted: Int[AnyArray, "B K"]


def decoding_parameters(model: LanguageModel, parameters: Any) -> Any:
    """Casts matrices to the dtype of the products once, so that no pass reads more bytes than it multiplies."""
    dtype = compute_dtype(model.config)

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        names = {getattr(key, "key", None) for key in path}
        return leaf if names & {"scale", "bias"} else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, parameters)


def precision_of(model: LanguageModel) -> str:
    """Float32 decoding multiplies in float32; accelerators would otherwise round the operands to TF32 or bfloat16."""
    return "highest" if compute_dtype(model.config) == jnp.float32 else "default"


def jit_at_precision(model: LanguageModel, decode: Callable[..., Rows]) -> Any:
    """Jits a decoding loop with the matrix products of ``precision_of`` its model."""

    def with_precision(*arguments: Any) -> Rows:
        with jax.default_matmul_precision(precision_of(model)):
            return decode(*arguments)

    return jax.jit(with_precision)


def logits_of(hidden: Float[Array, "*rows D"], parameters: Any) -> Float[Array, "*rows V"]:
    """The shared unembedding's logits, in float32."""
    unembedding = unembedding_of(parameters).astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, unembedding, preferred_element_type=jnp.float32)


def prefill(
    model: LanguageModel,
    parameters: Any,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    keys: Array,
    *,
    num_heads: int,
    max_new_tokens: int,
    end_id: int,
    sampling: Sampling,
) -> tuple[Rows, KVCache, Hidden]:
    """Reads the prompts and writes the first token of each continuation.

    Args:
      prompts: [B, P], filled up on the right with anything: a slot is overwritten before it can be seen.
      lengths: [B]; tokens of each prompt, at least one.
      keys: one per row.
      num_heads: K; the buffers get room for K drafts beyond the limit.

    Returns:
      The rows, the backbone's cache, and h^0 of the prompts, [B, P, D].
    """
    batch, padded = prompts.shape
    slots = padded + max_new_tokens + num_heads + 1
    positions = jnp.broadcast_to(jnp.arange(padded), prompts.shape)
    cache = empty_cache(model.config.layers, batch, slots, model.config, compute_dtype(model.config))
    start = jnp.zeros(batch, jnp.int32)
    hidden, cache = apply(
        model, parameters, prompts, positions, visible(positions, slots), cache, start, method=model.extend
    )
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    first, _ = choose(fold(keys, lengths), logits_of(last, parameters), sampling)
    counts, buffer = jnp.zeros((batch, num_heads), jnp.int32), jnp.zeros((batch, slots), jnp.int32)
    rows = Rows(
        tokens=jax.lax.dynamic_update_slice(buffer, prompts, (0, 0)),
        length=lengths,
        limit=lengths + max_new_tokens,
        finished=jnp.zeros(batch, bool),
        proposer=buffer,
        passes=jnp.zeros(batch, jnp.int32),
        tried=counts,
        accepted=counts,
    )
    return append(rows, first[:, None], jnp.ones(batch, jnp.int32), jnp.zeros(batch, jnp.int32), end_id), cache, hidden


def write(buffer: Int[Array, "B S"], values: Int[Array, "B T"], start: Int[Array, " B"]) -> Int[Array, "B S"]:
    """Writes T values into each row, from that row's own place on."""
    return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(buffer, values, start)


def read(buffer: Int[Array, "B S"], start: Int[Array, " B"], count: int) -> Int[Array, "B T"]:
    """Reads ``count`` values of each row from its own place on; places outside the buffer read its ends."""
    places = start[:, None] + jnp.arange(count)[None, :]
    return jnp.take_along_axis(buffer, jnp.clip(places, 0, buffer.shape[1] - 1), axis=1)


def append(
    rows: Rows, candidates: Int[Array, "B T"], count: Int[Array, " B"], drafted: Int[Array, " B"], end_id: int
) -> Rows:
    """Appends tokens to every row that is not finished, up to its limit and through its first end token.

    Args:
      candidates: [B, T].
      count: [B]; how many of them are confirmed, at least one.
      drafted: [B]; how many of those are drafts (of head 1, 2, …); what follows is the main head's.
    """
    index = jnp.arange(candidates.shape[1])[None, :]
    count = jnp.minimum(count, rows.limit - rows.length)
    is_end = (candidates == end_id) & (index < count[:, None])
    first_end = jnp.min(jnp.where(is_end, index, candidates.shape[1]), axis=1)
    count = jnp.where(rows.finished, 0, jnp.minimum(count, first_end + 1))
    length = rows.length + count
    proposer = jnp.where(index < drafted[:, None], index + 1, 0)
    return dataclasses.replace(
        rows,
        tokens=write(rows.tokens, candidates, rows.length),
        proposer=write(rows.proposer, proposer, rows.length),
        length=length,
        finished=rows.finished | jnp.any(is_end, axis=1) | (length >= rows.limit),
    )


def make_plain(model: LanguageModel, *, max_new_tokens: int, end_id: int, sampling: Sampling) -> Any:
    """Returns the jitted loop (parameters, prompts [B, P], lengths [B], keys [B]) -> ``Rows`` with K = 0."""

    def decode(parameters: Any, prompts: Array, lengths: Array, keys: Array) -> Rows:
        parameters = decoding_parameters(model, parameters)
        rows, cache, _ = prefill(
            model, parameters, prompts, lengths, keys,
            num_heads=0, max_new_tokens=max_new_tokens, end_id=end_id, sampling=sampling,
        )  # fmt: skip
        one = jnp.ones_like(lengths)

        def unfinished(state: tuple[Rows, KVCache]) -> Array:
            return ~jnp.all(state[0].finished)

        def one_token(state: tuple[Rows, KVCache]) -> tuple[Rows, KVCache]:
            rows, cache = state
            position = (rows.length - 1)[:, None]
            mask = visible(position, rows.tokens.shape[1])
            newest = read(rows.tokens, position[:, 0], 1)
            hidden, cache = apply(model, parameters, newest, position, mask, cache, position[:, 0], method=model.extend)
            token, _ = choose(fold(keys, rows.length), logits_of(hidden[:, 0], parameters), sampling)
            rows = dataclasses.replace(rows, passes=rows.passes + ~rows.finished)
            return append(rows, token[:, None], one, one * 0, end_id), cache

        rows, _ = jax.lax.while_loop(unfinished, one_token, (rows, cache))
        return rows

    return jit_at_precision(model, decode)
