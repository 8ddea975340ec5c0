"""Decoding prompts with a trained model: batching, compilation kept apart from timing, and results as plain values."""

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtpd_jax.decoding.batch import Batch, make_decode, make_stream
from mtpd_jax.decoding.copies import Shares, of_copies, of_this_process, on_mesh
from mtpd_jax.decoding.drafters import DRAFTERS
from mtpd_jax.decoding.drafters.drafter import heads_that_draft
from mtpd_jax.decoding.network import DecodingParameters, Network
from mtpd_jax.decoding.options import Options, check_seed
from mtpd_jax.decoding.rows import Rows, places
from mtpd_jax.decoding.stops import Stops
from mtpd_jax.decoding.strategies import STRATEGIES
from mtpd_jax.model.backbone import LanguageModel, unembedding_of
from mtpd_jax.model.layers import apply, cast_matrices, compute_dtype
from mtpd_jax.platform import platform_of
from mtpd_jax.shapes import Array, Parameters
from mtpd_jax.sharding import RULES, data_mesh, parts_of
from mtpd_jax.training.feasibility import check_decoding
from mtpd_jax.validation import check_count

# Tokens that the shortest prompts are padded to. Our choice.
_SHORTEST = 32
# Heads that are written out one after the other, at most. Our choice.
_MOST_WRITTEN_OUT = 32
# Attention over a chunk holds chunk x slots scores. Our choice.
_PREFILL_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class PlaceCounts:
    """The rounds that began at a place of a text, from token ``begin`` on; for the others see ``Continuation``."""

    begin: int
    passes: int
    tried: tuple[int, ...]
    accepted: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What was written after one prompt.

    Attributes:
      tokens: ids, those of the end token or stop string included if one was written.
      proposers: for each token, 0 if the main head chose it, k if it is an accepted draft of head k, -1 if it was
        copied from the text before it.
      passes: verification passes, without prefill.
      tried, accepted: for the first draft of a round, the second, …: rounds in which it was verified after all those
        before it were accepted, and those of them in which it was accepted, too.
      seconds: wall time of the call that wrote it, shared evenly among the call's prompts.
      by_place: the counts of passes and drafts, by the place in the text where a round began (see ``rows.places``), of
        those where one did; prompts are text, too.
    """

    tokens: tuple[int, ...]
    proposers: tuple[int, ...]
    passes: int
    tried: tuple[int, ...]
    accepted: tuple[int, ...]
    seconds: float
    by_place: tuple[PlaceCounts, ...] = ()


class Decoder:
    """Decoding with a trained model; each combination of options and shapes is compiled once.

    Args:
      model: what was trained. Its ``config.context`` is what a text may have, prompt included.
      parameters: its parameters, on the mesh.
      mesh: whose batch axes hold copies of the parameters, which share the rows; over the others they may be split.
        None: the one device on which they lie.
      end_ids: the tokens that end a text.
      scanned: the layout of the layers; None: chosen by the platform.
      chunk: tokens of a prompt that are read at a time.

    Attributes:
      on_compile: called before a program for some options is compiled, which may take minutes.
    """

    def __init__(
        self,
        model: LanguageModel,
        parameters: Parameters,
        end_ids: Sequence[int],
        mesh: Mesh | None = None,
        *,
        scanned: bool | None = None,
        chunk: int = _PREFILL_CHUNK,
    ):
        assert model.config.context is not None  # ``build_model`` says what it is
        self._model, self._parameters, self._end_ids = model, parameters, tuple(end_ids)
        self._context, self._scanned, self.chunk = model.config.context, scanned, chunk
        if mesh is None:
            mesh = data_mesh(list(jax.tree.leaves(parameters)[0].devices()))
        self.on_compile: Callable[[Options], object] = lambda options: None
        self._mesh = of_this_process(mesh)
        self._copies = parts_of(self._mesh, "batch")
        self._compiled: dict[Any, Any] = {}
        self._layouts: dict[Any, tuple[Network, Any]] = {}
        self._laid_out: dict[Any, DecodingParameters] = {}

    @property
    def context(self) -> int:
        """Tokens that a text may have."""
        return self._context

    def with_parameters(self, parameters: Parameters) -> "Decoder":
        """The same model with other parameters, which lie alike; what is compiled is shared."""
        other = copy.copy(self)
        other._parameters, other._laid_out = parameters, {}
        return other

    @property
    def dtype(self) -> str:
        """The dtype of activations and products."""
        return compute_dtype(self._model.config).name

    def run(
        self,
        prompts: Sequence[np.ndarray],
        options: Options,
        *,
        rows: int | None = None,
        transitions: np.ndarray | None = None,
        seed: int = 0,
        first_row: int = 0,
        keys: Array | None = None,
    ) -> list[Continuation]:
        """Decodes prompts.

        Args:
          prompts: token ids, at least one per prompt.
          options: how.
          rows: prompts that are decoded together; a row that is finished takes the next prompt. None: all.
          transitions: of the stop strings, see ``stops.transitions_of``.
          seed, first_row: prompt number n draws from the key (seed, first_row + n), whatever is decoded beside it.
          keys: [P]; instead, one per prompt.

        Raises:
          ValueError: see ``check``.
        """
        self.check(prompts, options, rows)
        check_seed(seed)
        # No more copies of the model than rows, and rows and prompts are shared out evenly.
        rows = min(len(prompts), rows or len(prompts))
        rows_per_copy = -(-rows // self._copies)
        copies = -(-rows // rows_per_copy)
        # Each copy has its own part of the prompts, and each prompt its own key.
        shares = Shares.of(prompts, copies, rows_per_copy, self.padded_length(max(map(len, prompts))))
        if keys is None:
            numbers = jnp.arange(first_row, first_row + len(prompts), dtype=jnp.uint32)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
        of_place = np.zeros(len(shares.lengths), np.int32)
        of_place[shares.places] = np.arange(len(prompts))
        keys = keys[of_place]
        # What the program is given, where its devices have it.
        network, parameters = self.network(options)
        mesh = of_copies(self._mesh, copies)
        by_row = shares.prompts, shares.lengths, keys, shares.counts
        arguments = self._placed(mesh, parameters, by_row, transitions)
        # Compiled before the clock starts.
        decode = self._program(network, arguments, options, rows_per_copy, mesh)
        start = time.perf_counter()
        written: Rows = jax.device_get(jax.block_until_ready(decode(*arguments)))
        seconds = (time.perf_counter() - start) / len(prompts)
        return [_continuation(written, place, int(shares.lengths[place]), seconds) for place in shares.places.tolist()]

    def stream(
        self,
        prompt: np.ndarray,
        options: Options,
        *,
        transitions: np.ndarray | None = None,
        seed: int = 0,
        rounds: int = 4,
    ) -> Iterator[Continuation]:
        """Decodes a prompt, and yields what is written so far after every few rounds, and in the end the whole.

        That is what ``run`` writes after the same prompt alone. ``seconds`` count work on the devices.

        Args:
          prompt, options, transitions, seed: see ``run``.
          rounds: that are run in between.

        Raises:
          ValueError: see ``check``.
        """
        self.check([prompt], options, 1)
        check_seed(seed)
        check_count("rounds", rounds)
        padded = np.zeros((1, self.padded_length(len(prompt))), np.int32)
        padded[0, : len(prompt)] = prompt
        # Everything on one copy of the model.
        network, parameters = self.network(options)
        by_row = padded, np.array([len(prompt)], np.int32), jax.random.fold_in(jax.random.key(seed), 0)[None]
        arguments = self._placed(of_copies(self._mesh, 1), parameters, by_row, transitions)
        begin, go_on = self._stream_programs(network, arguments, options)
        # The clock stands still while somebody reads.
        seconds, batch = 0.0, None
        while batch is None or not bool(batch.rows.finished[0]):
            start = time.perf_counter()
            batch = begin(*arguments) if batch is None else go_on(arguments[0], batch, arguments[-1], rounds)
            written: Rows = jax.device_get(jax.block_until_ready(batch.rows))
            seconds += time.perf_counter() - start
            yield _continuation(written, 0, len(prompt), seconds)

    def _placed(
        self, mesh: Mesh, parameters: DecodingParameters, by_row: tuple[Any, ...], transitions: np.ndarray | None
    ) -> tuple[Any, ...]:
        """Parameters, what there is row by row, and stops, where the devices of these copies of the model have them."""
        stops = Stops(self._end_ids, None if transitions is None else jnp.asarray(transitions))
        return (
            parameters if mesh is self._mesh else on_mesh(mesh, parameters),
            *jax.device_put(by_row, NamedSharding(mesh, RULES.spec("batch"))),
            jax.device_put(stops, NamedSharding(mesh, PartitionSpec())),
        )

    def padded_length(self, length: int) -> int:
        """The next power of two up to a chunk, and then the next multiple of it, so that few lengths are compiled."""
        if length > self.chunk:
            return -(-length // self.chunk) * self.chunk
        return min(self.chunk, max(_SHORTEST, 1 << (length - 1).bit_length()))

    def chunk_of(self, length: int) -> int:
        """Tokens that one pass reads of texts of this padded length."""
        return min(self.chunk, length)

    def network(self, options: Options) -> tuple[Network, DecodingParameters]:
        """The network for these options, and the parameters in its layout."""
        # A program of many heads written out would take minutes to compile.
        heads = heads_that_draft(options)
        scanned_heads = heads > 0 and (options.adaptive or heads > _MOST_WRITTEN_OUT)
        split = of_copies(self._mesh, 1) if self._mesh.size > self._copies else None
        network = Network(
            self._model, platform_of(self._mesh), self._scanned, True if scanned_heads else None, mesh=split
        )
        layout = (network.scanned, network.scanned_heads)
        if layout not in self._layouts:
            # Slices and casts of what is split are split likewise; what is whole has to stay so on every device.
            whole = None if split is not None else NamedSharding(self._mesh, PartitionSpec())
            self._layouts[layout] = network, jax.jit(network.parameters, out_shardings=whole)
        network, lay_out = self._layouts[layout]
        if layout not in self._laid_out:
            self._laid_out[layout] = lay_out(on_mesh(self._mesh, self._parameters))
        return network, self._laid_out[layout]

    def one_copy(self, options: Options) -> tuple[Network, DecodingParameters]:
        """As ``network``, with the parameters of one copy of the model, which decodes a text by itself."""
        network, parameters = self.network(options)
        return network, on_mesh(of_copies(self._mesh, 1), parameters)

    def logits_at(self, text: Sequence[int], dtype: str) -> np.ndarray:
        """The main head's logits after a text, [V], from one pass over all of it without a cache.

        Args:
          text: token ids.
          dtype: of activations and products; the weights are those of decoding, whatever it is.
        """
        config = dataclasses.replace(self._model.config, dtype=dtype, attention="dense")
        model = LanguageModel(config, self._model.heads_config)
        row = np.zeros((1, self.padded_length(len(text))), np.int32)  # causality makes padding harmless
        row[0, : len(text)] = text
        network, _ = self.network(Options(0, 1))

        def last(parameters: Parameters, row: Array, last_index: Array) -> Array:
            parameters = cast_matrices(parameters, network.dtype)
            hidden = apply(model, parameters, row, jnp.ones_like(row), jnp.arange(row.shape[1])[None]).main
            return jnp.einsum(
                "d,vd->v", hidden[0, last_index], unembedding_of(parameters), preferred_element_type=jnp.float32
            )

        key = ("logits", dtype, row.shape)
        if key not in self._compiled:
            self._compiled[key] = jax.jit(last)
        with jax.default_matmul_precision("highest"):
            return np.asarray(self._compiled[key](self._parameters, row, len(text) - 1))

    def check(self, prompts: Sequence[np.ndarray], options: Options, rows: int | None = None) -> None:
        """Checks what ``run`` would be given; callers with many batches call it for all of them first.

        Args:
          prompts, options, rows: see ``run``.

        Raises:
          ValueError: an empty prompt, one that does not leave room in the context, options out of range, a draft that
            the model cannot make, or more memory needed than there is.
        """
        options.validate()
        check_drafter(options, self._model.heads_config.num_heads, self._model.config.mask_embedding)
        if options.num_drafts >= self._context:
            raise ValueError(
                f"heads = {options.num_drafts}: expected fewer than the model's context of {self._context}"
            )
        # The prompts fit into the context, each by itself.
        if not prompts:
            raise ValueError("no prompt was given")
        for number, prompt in enumerate(prompts, 1):
            if not len(prompt):
                raise ValueError(f"prompt {number} is empty: decoding needs at least one token to begin from")
            if len(prompt) + options.max_new_tokens > self._context:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens; with max_new_tokens = {options.max_new_tokens} that is "
                    f"more than the model's context of {self._context}: shorten one of them"
                )
        # And all that is decoded together fits into memory.
        rows_per_copy = -(-min(len(prompts), rows or len(prompts)) // self._copies)
        longest = max(map(len, prompts)) + options.max_new_tokens
        heads = heads_that_draft(options)
        if self._model.heads_config.cache == "shared":
            heads = min(heads, 1)
        check_decoding(self._model.config, options.num_drafts, heads, rows_per_copy, longest, self._mesh)

    def _program(
        self, network: Network, arguments: tuple[Any, ...], options: Options, rows: int, mesh: Mesh
    ) -> Callable[..., Rows]:
        stops = arguments[-1].transitions
        key = (options, arguments[1].shape, rows, mesh.size, None if stops is None else stops.shape)
        if key not in self._compiled:
            self.on_compile(options)
            chunk = self.chunk_of(arguments[1].shape[1])
            decode: Any = make_decode(network, options, chunk, rows, mesh if mesh.size > 1 else None)
            self._compiled[key] = decode.lower(*arguments).compile()
        return self._compiled[key]

    def _stream_programs(
        self, network: Network, arguments: tuple[Any, ...], options: Options
    ) -> tuple[Callable[..., Batch], Callable[..., Batch]]:
        stops = arguments[-1].transitions
        key = ("stream", options, arguments[1].shape, None if stops is None else stops.shape)
        if key not in self._compiled:
            self.on_compile(options)
            begin, go_on = make_stream(network, options, self.chunk_of(arguments[1].shape[1]))
            go_on(arguments[0], begin(*arguments), arguments[-1], 0)  # compiled before the clock starts
            self._compiled[key] = begin, go_on
        return self._compiled[key]


def check_drafter(options: Options, heads: int, masks: bool) -> None:
    """Checks that a model with so many heads, or a mask embedding, can draft as the options say.

    Raises:
      ValueError: naming the option and what is allowed.
    """
    for name, value, known in (("drafter", options.drafter, DRAFTERS), ("strategy", options.strategy, STRATEGIES)):
        if value not in known:
            raise ValueError(f"{name} = {value!r}: expected one of {', '.join(known)}")
    # What the strategy asks for; what the drafter cannot do without, and what it cannot do.
    drafter, strategy = DRAFTERS[options.drafter], STRATEGIES[options.strategy]
    if strategy.drafter_name not in (None, options.drafter):
        raise ValueError(
            f"drafter = {options.drafter!r}: expected {strategy.drafter_name!r} with strategy = {options.strategy!r}"
        )
    strategy.check(options)
    if options.num_drafts and drafter.needs_heads and not heads:
        raise ValueError(f"heads = {options.num_drafts}: expected 0, for the model was trained without heads")
    if options.num_drafts and drafter.needs_masks and not masks:
        raise ValueError(f"drafter = {options.drafter!r}: expected a model that was trained to fill in masks")
    if options.min_confidence and not drafter.adapts:
        raise ValueError(f"min_confidence = {options.min_confidence}: expected 0 with drafter = {options.drafter!r}")


def _continuation(written: Rows, row: int, prompt_length: int, seconds: float) -> Continuation:
    span = slice(prompt_length, int(written.length[row]))
    counts = written.passes[row], written.tried[row], written.accepted[row]
    by_place = [
        PlaceCounts(begin, int(passes), tuple(tried.tolist()), tuple(accepted.tolist()))
        for begin, passes, tried, accepted in zip(places(written.tokens.shape[1]), *counts, strict=True)
        if passes
    ]
    return Continuation(
        tokens=tuple(map(int, written.tokens[row, span])),
        proposers=tuple(map(int, written.proposer[row, span])),
        passes=int(counts[0].sum()),
        tried=tuple(counts[1].sum(axis=0).tolist()),
        accepted=tuple(counts[2].sum(axis=0).tolist()),
        seconds=seconds,
        by_place=tuple(by_place),
    )
