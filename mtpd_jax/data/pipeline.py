"""From documents to packed batches, with grain: one deterministic global stream, the same in every process."""

from typing import Any

import grain
import jax
import numpy as np
from flax import struct
from grain import experimental
from jax.sharding import Sharding

from mtpd_jax.config import Config
from mtpd_jax.data.documents import Document, held_out
from mtpd_jax.data.sources import Source, identity
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.shapes import AnyArray, Bool, Int


@struct.dataclass
class Batch:
    """Packed rows.

    Attributes:
      tokens: token ids.
      segment_ids: the document, within the row, that a token belongs to, from 1; 0 is padding.
      positions: the token's place in its document's part of the row, from 0.
      supervised: which tokens may be learned, as targets; None: all.
    """

    tokens: Int[AnyArray, "*axes T"]
    segment_ids: Int[AnyArray, "*axes T"]
    positions: Int[AnyArray, "*axes T"]
    supervised: Bool[AnyArray, "*axes T"] | None = None


class TrainingData:
    """The endless stream of global batches, each a ``Batch`` of [micro-batch, B, T] int32 arrays.

    Documents are shuffled anew every epoch, tokenized, concatenated and split into rows by grain's packing, and the
    rows shuffled among their neighbours, because a long document fills many rows in a run. Every process draws
    this same stream and keeps its own rows (``put_on_devices``), so the order of the data depends on the seed alone
    and a state can be restored on any number of processes. A context manager: leaving it ends its threads.
    """

    def __init__(self, config: Config, source: Source, tokenizer: Tokenizer):
        """Opens the stream at its beginning."""
        self._source = identity(source)
        self._iterator = iter(_dataset(config, source, tokenizer))

    @property
    def identity(self) -> dict[str, Any]:
        """Which documents these are, held-out ones included (see ``sources.identity``)."""
        return self._source

    def __enter__(self) -> "TrainingData":
        return self

    def __exit__(self, *_: Any) -> None:
        self._iterator.close()

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The place in the stream after the last batch drawn, as JSON."""
        return {"source": self._source, "iterator": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place in the stream.

        Raises:
          ValueError: the source is not the one that the state came from: other documents, or other contents.
        """
        present, expected = self._source, state["source"]
        if present != expected:
            raise ValueError(
                f"config.data: the {present['documents']} documents found are not the {expected['documents']} "
                "that the run was trained on, have changed, or were recorded by an earlier version; it can only go on "
                "with the data that it began with"
            )
        self._iterator.set_state(_with_tuples(state["iterator"]))


def _with_tuples(state: Any) -> Any:
    """Turns the lists that JSON made of tuples back: grain's packing compares its stored slices with tuples."""
    if isinstance(state, dict):
        return {name: _with_tuples(value) for name, value in state.items()}
    return tuple(state) if isinstance(state, list) else state


def _dataset(config: Config, source: Source, tokenizer: Tokenizer) -> grain.IterDataset:
    training, window = config.training, config.data.shuffle_window

    def to_batch(element: dict[str, np.ndarray]) -> Batch:
        def cut(name: str) -> np.ndarray:
            return element[name].astype(np.int32).reshape(training.micro_batches, -1, training.sequence_length)

        supervised = cut("supervised").astype(bool) if "supervised" in element else None
        return Batch(cut("tokens"), cut("tokens_segment_ids"), cut("tokens_positions"), supervised)

    def tokenize(document: Document) -> dict[str, np.ndarray] | None:
        # grain drops what is None: the documents of the other side.
        if held_out(document, config.data.validation_fraction):
            return None
        if isinstance(document, str):
            return {"tokens": tokenizer.encode_document(document)}
        return {"tokens": document.ids, "supervised": document.supervised.astype(np.int32)}

    # Documents, shuffled anew every epoch; packed into rows; rows shuffled among neighbours; batches.
    tokenized = grain.MapDataset.source(source).shuffle(seed=training.seed).repeat().map(tokenize)
    fields = ("tokens", "supervised") if source.tokenizer_digest else ("tokens",)
    rows = experimental.ConcatThenSplitIterDataset(
        tokenized.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)),
        length_struct=dict.fromkeys(fields, training.sequence_length),
    )
    # A long document fills many rows in a run.
    if window:
        rows = experimental.WindowShuffleIterDataset(rows, window_size=window, seed=training.seed)
    batches = rows.batch(training.batch_size, drop_remainder=True).map(to_batch)
    return experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=4)


def put_on_devices(batch: Batch, sharding: Sharding) -> Batch:
    """Places a global batch; each process transfers only the rows of its own devices."""

    def put(values: Any) -> jax.Array:
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(put, batch)
