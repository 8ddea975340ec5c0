"""Decoding prompts with a trained model: batching, compilation kept apart from timing, and results as plain values."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtpd_jax.decoding.network import DecodingParameters, Network, cast_matrices
from mtpd_jax.decoding.options import Options, check_seed
from mtpd_jax.decoding.rows import Rows
from mtpd_jax.decoding.speculative import make_decode
from mtpd_jax.model.backbone import LanguageModel, unembedding_of
from mtpd_jax.model.layers import apply, compute_dtype
from mtpd_jax.platform import platform_of
from mtpd_jax.shapes import Array
from mtpd_jax.training.feasibility import check_decoding

# Tokens that the shortest prompts are padded to. Our choice.
_SHORTEST = 32
# Heads that are written out one after the other, at most. Our choice.
_MOST_WRITTEN_OUT = 32
# Attention over a chunk holds chunk x slots scores. Our choice.
_PREFILL_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What was written after one prompt.

    Attributes:
      tokens: ids, the end token included if one was written.
      proposers: for each token, 0 if the main head chose it, k if it is an accepted draft of head k.
      passes: verification passes, without prefill.
      tried, accepted: per head, rounds in which its draft was verified after all those before it were accepted, and
        those of them in which it was accepted, too.
      seconds: wall time of the call that wrote it, shared evenly among the call's prompts.
    """

    tokens: tuple[int, ...]
    proposers: tuple[int, ...]
    passes: int
    tried: tuple[int, ...]
    accepted: tuple[int, ...]
    seconds: float


class Decoder:
    """Plain and speculative decoding with a trained model; each combination of options and shapes is compiled once.

    Args:
      model: what was trained.
      parameters: its parameters, whole on every device that they lie on; these devices share the rows of a batch.
      end_id: the token that ends a text.
      context: tokens that a text may have, prompt included; beyond it the model was not trained.
      scanned: the layout of the layers; None: chosen by the platform.
      chunk: tokens of a prompt that are read at a time.
    """

    def __init__(
        self,
        model: LanguageModel,
        parameters: Any,
        end_id: int,
        context: int,
        scanned: bool | None = None,
        chunk: int = _PREFILL_CHUNK,
    ):
        self._model, self._parameters, self._end_id, self._context = model, parameters, end_id, context
        self._scanned, self._chunk = scanned, chunk
        devices = jax.tree.leaves(parameters)[0].sharding.addressable_devices
        self._devices = sorted(devices, key=lambda device: device.id)
        self._compiled: dict[Any, Any] = {}
        self._laid_out: dict[Any, tuple[Network, DecodingParameters]] = {}

    @property
    def dtype(self) -> str:
        """The dtype of activations and products."""
        return compute_dtype(self._model.config).name

    def run(
        self, prompts: Sequence[np.ndarray], options: Options, *, seed: int = 0, first_row: int = 0
    ) -> list[Continuation]:
        """Decodes a batch of prompts.

        Args:
          prompts: token ids, at least one per prompt.
          options: how.
          seed, first_row: row r draws from the key (seed, first_row + r), whatever else is in the batch.

        Raises:
          ValueError: see ``check``.
        """
        self.check(prompts, options)
        check_seed(seed)
        per_device = -(-len(prompts) // len(self._devices))
        parts = -(-len(prompts) // per_device)
        # What is missing to rows for all is the last prompt again.
        texts = [*prompts, *[prompts[-1]] * (parts * per_device - len(prompts))]
        lengths = np.array([len(text) for text in texts], np.int32)
        padded = np.zeros((len(texts), self._padded_length(int(lengths.max()))), np.int32)
        for row, text in enumerate(texts):
            padded[row, : len(text)] = text
        rows = np.arange(first_row, first_row + len(texts), dtype=np.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(rows))
        network, parameters = self.network(options)
        mesh = Mesh(np.array(self._devices[:parts]), "rows")
        split = NamedSharding(mesh, PartitionSpec("rows"))
        if parts < len(self._devices):
            parameters = _on(mesh, parameters)
        arguments = (parameters, *jax.device_put((padded, lengths, keys), split))
        decode = self._program(network, arguments, options, mesh)
        start = time.perf_counter()
        rows_written: Rows = jax.device_get(jax.block_until_ready(decode(*arguments)))
        seconds = (time.perf_counter() - start) / len(prompts)
        return [_continuation(rows_written, row, int(lengths[row]), seconds) for row in range(len(prompts))]

    def _padded_length(self, length: int) -> int:
        """The next power of two up to a chunk, and then the next multiple of it, so that few lengths are compiled."""
        if length > self._chunk:
            return -(-length // self._chunk) * self._chunk
        return min(self._chunk, max(_SHORTEST, 1 << (length - 1).bit_length()))

    def network(self, options: Options) -> tuple[Network, DecodingParameters]:
        """The network for these options, and the parameters in its layout."""
        # A program of many heads written out would take minutes to compile.
        scanned_heads = options.adaptive or options.num_heads > _MOST_WRITTEN_OUT
        platform = platform_of(self._devices[0])
        network = Network(self._model, platform, self._scanned, True if scanned_heads else None)
        layout = (network.scanned, network.scanned_heads)
        if layout not in self._laid_out:
            devices = Mesh(np.array(self._devices), "rows")
            lay_out = jax.jit(network.parameters, out_shardings=NamedSharding(devices, PartitionSpec()))
            self._laid_out[layout] = network, lay_out(_on(devices, self._parameters))
        return self._laid_out[layout]

    def logits_at(self, text: Sequence[int], dtype: str) -> np.ndarray:
        """The main head's logits after a text, [V], from one pass over all of it without a cache.

        Args:
          text: token ids.
          dtype: of activations and products; the weights are those of decoding, whatever it is.
        """
        config = dataclasses.replace(self._model.config, dtype=dtype, attention="dense")
        model = LanguageModel(config, self._model.heads_config)
        row = np.zeros((1, self._padded_length(len(text))), np.int32)  # causality makes padding harmless
        row[0, : len(text)] = text
        network, _ = self.network(Options(0, 1))

        def last(parameters: Any, row: Array, last_index: Array) -> Array:
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

    def check(self, prompts: Sequence[np.ndarray], options: Options, batch_size: int | None = None) -> None:
        """Checks what ``run`` would be given; callers with many batches call it for all of them first.

        Args:
          prompts, options: see ``run``.
          batch_size: prompts that are decoded together; None: all.

        Raises:
          ValueError: an empty prompt, one that does not leave room in the context, options out of range, or more
            memory needed than there is.
        """
        options.validate(self._model.heads_config.num_heads)
        if options.num_heads >= self._context:
            raise ValueError(f"heads = {options.num_heads}: expected fewer than the model's context of {self._context}")
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
        rows = -(-min(len(prompts), batch_size or len(prompts)) // len(self._devices))
        longest = max(map(len, prompts)) + options.max_new_tokens
        check_decoding(self._model.config, options.num_heads, rows, longest, self._devices[0])

    def _program(self, network: Network, arguments: tuple[Any, ...], options: Options, mesh: Mesh) -> Any:
        shape = arguments[1].shape
        if (options, shape) not in self._compiled:
            chunk = min(self._chunk, shape[1])
            decode = make_decode(network, options, self._end_id, chunk, mesh if mesh.size > 1 else None)
            self._compiled[options, shape] = decode.lower(*arguments).compile()
        return self._compiled[options, shape]


def _on(mesh: Mesh, parameters: Any) -> Any:
    """The copies of the parameters that the mesh's devices hold already, as arrays of these devices."""
    devices, sharding = set(mesh.devices.flat), NamedSharding(mesh, PartitionSpec())

    def on_mesh(leaf: Array) -> Array:
        copies = [shard.data for shard in leaf.addressable_shards if shard.device in devices]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)

    return jax.tree.map(on_mesh, parameters)


def _continuation(written: Rows, row: int, prompt_length: int, seconds: float) -> Continuation:
    span = slice(prompt_length, int(written.length[row]))
    return Continuation(
        tokens=tuple(map(int, written.tokens[row, span])),
        proposers=tuple(map(int, written.proposer[row, span])),
        passes=int(written.passes[row]),
        tried=tuple(map(int, written.tried[row])),
        accepted=tuple(map(int, written.accepted[row])),
        seconds=seconds,
    )
