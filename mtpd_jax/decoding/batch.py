"""A batch of texts as one program: prompts are read, rounds are run, and a row that is finished takes the next prompt.

The rows of a batch share every pass, so that a pass costs the same however many of them are finished. Therefore a queue
of prompts stands behind them: whenever a row is finished, its text is put away, and the next prompt is read into its
place. What a prompt brings forth depends, up to rounding, on the prompt and its own key alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from mtpd_jax.decoding.network import DecodingParameters, Network
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.rows import Rows, slice_rows
from mtpd_jax.decoding.sampling import choose, fold
from mtpd_jax.decoding.stops import Stops
from mtpd_jax.decoding.strategies.strategy import Strategy, strategy_of
from mtpd_jax.model.cache import KVCache
from mtpd_jax.shapes import Array, Hidden, Int
from mtpd_jax.sharding import RULES, parameter_parts

# (parameters, prompts [Q, T], lengths [Q], keys [Q], count [devices], stops) -> rows [Q]
Decode = Callable[..., Rows]


@struct.dataclass
class Batch:
    """Texts that are written side by side.

    Attributes:
      rows: the texts.
      state: of the strategy.
      keys: [B]; one per row, which all its draws come from.
    """

    rows: Rows
    state: Any
    keys: Array


def prefill(
    strategy: Strategy,
    parameters: DecodingParameters,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    keys: Array,
    stops: Stops,
    chunk: int,
) -> Batch:
    """Reads the prompts and writes the first token of each continuation.

    A chunk at a time goes through the backbone and to whoever drafts, so that memory does not grow with the prompt's
    length beyond the caches.

    Args:
      prompts: [B, T], filled up on the right with anything: a slot is overwritten before it can be seen.
      lengths: [B]; tokens of each prompt, at least one.
      keys: one per row.
      chunk: tokens; T is a multiple of it.
    """
    (batch, padded), options, network = prompts.shape, strategy.options, strategy.network
    # Room for what may be written, and for what a last round writes past it.
    slots = padded + options.max_new_tokens + options.width
    rows = Rows.start(prompts, lengths, options.num_drafts, options.max_new_tokens, slots)

    def read_chunk(carry: tuple[Any, Hidden], begin: Array) -> tuple[tuple[Any, Hidden], None]:
        state, last = carry
        hidden, state = strategy.read(parameters, rows, state, jnp.full(batch, begin), chunk)
        last = slice_rows(jnp.concatenate([last, hidden], axis=1), jnp.clip(lengths - begin, 0, chunk), 1)
        return (state, last), None

    # Chunk by chunk; the state of each prompt's last token is kept for its first continuation.
    start = strategy.start(batch, slots), jnp.zeros((batch, 1, network.config.width), network.dtype)
    if padded == chunk:
        (state, last), _ = read_chunk(start, jnp.zeros((), jnp.int32))
    else:
        (state, last), _ = jax.lax.scan(read_chunk, start, jnp.arange(0, padded, chunk))
    first, _ = choose(fold(keys, lengths), network.logits(parameters, last[:, 0]), options.sampling)
    one = jnp.ones_like(lengths)
    return Batch(rows.append(first[:, None], one, jnp.zeros_like(first)[:, None], stops), state, keys)


def one_round(strategy: Strategy, parameters: DecodingParameters, batch: Batch, stops: Stops) -> Batch:
    """Every row that is not finished grows by at least one token."""
    keys = fold(batch.keys, batch.rows.length)
    return Batch(*strategy.round(parameters, batch.rows, batch.state, keys, stops), batch.keys)


def put_row(batch: Batch, row: Int[Array, ""], alone: Batch) -> Batch:
    """The batch with a batch of one row in the place of one of its rows."""

    def put(whole: Any, part: Any) -> Any:
        if isinstance(whole, KVCache):
            return whole.put_row(row, part)
        return jax.lax.dynamic_update_index_in_dim(whole, part[0], row, 0)

    return jax.tree.map(put, batch, alone, is_leaf=lambda part: isinstance(part, KVCache))


@struct.dataclass
class _Queue:
    """Texts that are written while others wait.

    Attributes:
      batch: those that are being written.
      number: [B]; their numbers in the queue.
      finished: [Q]; those that are.
    """

    batch: Batch
    number: Int[Array, " B"]
    finished: Rows


def decode_queue(
    strategy: Strategy,
    parameters: DecodingParameters,
    prompts: Int[Array, "Q T"],
    lengths: Int[Array, " Q"],
    keys: Array,
    count: Int[Array, "1"],
    stops: Stops,
    *,
    rows: int,
    chunk: int,
) -> Rows:
    """Decodes prompts, so many rows at a time.

    Args:
      prompts, lengths, keys: see ``prefill``; of the whole queue.
      count: how many of them there are; what follows is not decoded.
      rows: B, at most Q.

    Returns:
      The texts of the whole queue, in its order.
    """
    batch = prefill(strategy, parameters, prompts[:rows], lengths[:rows], keys[:rows], stops, chunk)
    # Rows for which there is no prompt have nothing to do.
    there = jnp.arange(rows) < count
    batch = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, finished=batch.rows.finished | ~there))

    def run_until(batch: Batch, enough: Callable[[Array], Array]) -> Batch:
        return jax.lax.while_loop(
            lambda batch: ~enough(batch.rows.finished),
            lambda batch: one_round(strategy, parameters, batch, stops),
            batch,
        )

    if rows == prompts.shape[0]:
        return run_until(batch, jnp.all).rows

    def next_prompt(number: Array, queue: _Queue) -> _Queue:
        # The last time there is no prompt left: all rows are waited for, and a row that nobody asks for is begun.
        def enough(finished: Array) -> Array:
            return jnp.where(number < count[0], jnp.any(finished), jnp.all(finished))

        # Until a row is free: all texts are put away, and that row's again when it is finished.
        batch = run_until(queue.batch, enough)
        row = jnp.argmax(batch.rows.finished)
        finished = _put_away(queue.finished, queue.number, batch.rows)
        # The next prompt, read as a batch of its own, takes its place.
        prompt, length, key = (jax.lax.dynamic_slice_in_dim(part, number, 1) for part in (prompts, lengths, keys))
        alone = prefill(strategy, parameters, prompt, length, key, stops, chunk)
        return _Queue(put_row(batch, row, alone), queue.number.at[row].set(number), finished)

    # Of rows that were never begun, too, as there have to be some.
    empty = jax.tree.map(lambda leaf: jnp.zeros((prompts.shape[0], *leaf.shape[1:]), leaf.dtype), batch.rows)
    queue = _Queue(batch, jnp.arange(rows), empty)
    return jax.lax.fori_loop(rows, jnp.maximum(count[0], rows) + 1, next_prompt, queue).finished


def _put_away(finished: Rows, number: Int[Array, " B"], rows: Rows) -> Rows:
    """Copies the rows that are being written to their places; what is not finished yet is copied again later."""
    return jax.tree.map(lambda whole, part: whole.at[number].set(part, mode="drop"), finished, rows)


def make_decode(network: Network, options: Options, chunk: int, rows: int, mesh: Mesh | None = None) -> Decode:
    """Returns the jitted function (parameters, prompts [Q, T], lengths [Q], keys [Q], count [devices], stops) -> rows.

    Args:
      network, options: of decoding.
      chunk: see ``prefill``.
      rows: that a device decodes at a time.
      mesh: with one, the devices along its batch axes share the queue evenly, and each runs until its own part is
        finished: they have nothing to tell each other. ``count`` has a number for each of them. Over the other axes the
        parameters may be split, and caches and products are split as they are.
    """
    strategy = strategy_of(network, options)

    def decode(parameters: DecodingParameters, prompts: Array, *rest: Any) -> Rows:
        return decode_queue(strategy, parameters, prompts, *rest, rows=rows, chunk=chunk)

    if mesh is None:
        return network.jit(decode)
    whole, split = PartitionSpec(), RULES.spec("batch")
    # Rows are shared by hand, for the partitioner cannot know that they have nothing to do with each other.
    manual = set(RULES.mesh_axes("batch")) if parameter_parts(mesh) > 1 else set(mesh.axis_names)
    return network.jit(
        jax.shard_map(
            decode, mesh=mesh, in_specs=(whole, split, split, split, split, whole), out_specs=split,
            axis_names=manual, check_vma=False,
        )
    )  # fmt: skip


def make_stream(network: Network, options: Options, chunk: int) -> tuple[Callable[..., Batch], Callable[..., Batch]]:
    """Returns jitted functions that write the same text, some rounds at a time.

    Args:
      network, options: of decoding.
      chunk: see ``prefill``.

    Returns:
      (parameters, prompts [B, T], lengths [B], keys [B], stops) -> batch, and (parameters, batch, stops, rounds) ->
      batch, after so many rounds or when all rows are finished. The second consumes the batch that it is given.
    """
    strategy = strategy_of(network, options)

    def begin(parameters: DecodingParameters, prompts: Array, lengths: Array, keys: Array, stops: Stops) -> Batch:
        return prefill(strategy, parameters, prompts, lengths, keys, stops, chunk)

    def go_on(parameters: DecodingParameters, batch: Batch, stops: Stops, rounds: Array) -> Batch:
        def one_more(carry: tuple[Batch, Array]) -> tuple[Batch, Array]:
            return one_round(strategy, parameters, carry[0], stops), carry[1] + 1

        def unfinished(carry: tuple[Batch, Array]) -> Array:
            return ~jnp.all(carry[0].rows.finished) & (carry[1] < rounds)

        return jax.lax.while_loop(unfinished, one_more, (batch, jnp.zeros_like(rounds)))[0]

    return network.jit(begin), network.jit(go_on, donate_argnums=1)
