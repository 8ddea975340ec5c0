"""Teacher-forced scores of text, token by token; whatever is reported of text is a fold of these.

A text is scored in windows of the training length, each beginning with the last token of the one before, so that every
token but the first is scored once.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from mtpd_jax.data.documents import Document
from mtpd_jax.data.pipeline import Batch, put_on_devices
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.losses.align import align
from mtpd_jax.losses.scores import TokenScores, score_rows
from mtpd_jax.model.backbone import LanguageModel, unembedding_of
from mtpd_jax.model.layers import apply
from mtpd_jax.shapes import Bool, Float, Int, Parameters
from mtpd_jax.sharding import batch_sharding, parts_of, replicated, within


@dataclasses.dataclass(frozen=True)
class MainScore:
    """The main head on text.

    Attributes:
      ce: nats per scored token; None where nothing was scored.
      bits_per_byte: total nats / ln 2 over the UTF-8 bytes of the scored tokens.
    """

    ce: float | None
    bits_per_byte: float | None


@dataclasses.dataclass(frozen=True)
class HeadScore:
    """One head on text, teacher-forced; each None where the head had no target.

    Attributes:
      ce: nats per supervised token, against the text.
      kl: KL(main head || head) in nats, over the full vocabulary at temperature 1.
      agreement: share of supervised tokens where the head's argmax is the main head's for the same target.
    """

    ce: float | None
    kl: float | None
    agreement: float | None


@dataclasses.dataclass(frozen=True)
class ScoredText:
    """What every head says of every token of a text but the first.

    Attributes:
      tokens: [T]; ids of those that are scored.
      bytes: [T]; UTF-8 bytes that each stands for.
      supervised: [J, T]; whether the head, main head first, could look far enough back within the window.
      ce, kl, agrees, greedy: [J, T], and [T]; see ``TokenScores``; 0 where nothing is supervised.
    """

    tokens: Int[np.ndarray, " T"]
    bytes: Int[np.ndarray, " T"]
    supervised: Bool[np.ndarray, "J T"]
    ce: Float[np.ndarray, "J T"]
    kl: Float[np.ndarray, "J T"]
    agrees: Bool[np.ndarray, "J T"]
    greedy: Bool[np.ndarray, " T"]

    def sums(self) -> "TextSums":
        """The sums over its tokens, in double precision."""
        weight, ce, kl, agreed = (
            values.sum(-1, dtype=np.float64) for values in (self.supervised, self.ce, self.kl, self.agrees)
        )
        return TextSums(weight, ce, kl, agreed, int(self.bytes.sum()))


@dataclasses.dataclass(frozen=True)
class TextSums:
    """Sums over scored tokens, main head first.

    Attributes:
      weight, ce, kl, agreed: [J]; supervised tokens, nats, nats, tokens on which the head agrees with the main head.
      bytes: of the main head's tokens.
    """

    weight: np.ndarray
    ce: np.ndarray
    kl: np.ndarray
    agreed: np.ndarray
    bytes: int

    def __add__(self, other: "TextSums") -> "TextSums":
        return TextSums(*(getattr(self, one.name) + getattr(other, one.name) for one in dataclasses.fields(self)))

    @classmethod
    def nothing(cls, heads: int) -> "TextSums":
        """Sums over no tokens, for so many heads beside the main head."""
        nothing = np.zeros(heads + 1)
        return cls(nothing, nothing, nothing, nothing, 0)


@dataclasses.dataclass(frozen=True)
class TextScore:
    """Scores of text; ``tokens`` and ``bytes`` count what the main head was scored on."""

    main: MainScore
    heads: tuple[HeadScore, ...]
    tokens: int
    bytes: int

    @classmethod
    def of(cls, sums: TextSums) -> "TextScore":
        """The means of sums, over as many texts as they are of."""

        def mean(total: float, weight: float) -> float | None:
            return float(total / weight) if weight else None

        # Head by head: totals, and the tokens that they are of.
        by_head = list(zip(*(part.tolist() for part in (sums.ce, sums.kl, sums.agreed, sums.weight)), strict=True))
        heads = tuple(HeadScore(*(mean(total, weight) for total in totals)) for *totals, weight in by_head[1:])
        nats, _, _, tokens = by_head[0]
        return cls(MainScore(mean(nats, tokens), mean(nats / math.log(2), sums.bytes)), heads, int(tokens), sums.bytes)


def windows(ids: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Cuts a document into windows of at most ``length`` tokens, each beginning with the last token of the one before.

    So every token but the first is a target exactly once.
    """
    for start in range(0, max(1, len(ids) - 1), length - 1):
        yield ids[start : start + length]


class Scorer:
    """Scores texts with a model; compiled once.

    Args:
      model: of the run.
      tokenizer: of the run.
      mesh: where the parameters lie.
      length: tokens of a window: the training length.
      batch_size: windows that are scored together, at least; they are shared out evenly.

    Attributes:
      tokenizer, length: as given.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, mesh: Mesh, length: int, batch_size: int):
        parts = parts_of(mesh, "batch")
        self.tokenizer, self.length = tokenizer, length
        self._batch_size = -(-batch_size // parts) * parts
        self._sharding, self._heads = batch_sharding(mesh, leading=0), model.heads_config.num_heads
        numbers = range(1, self._heads + 1)

        def score(parameters: Parameters, rows: Batch) -> TokenScores:
            # All heads' states, side by side at the token that they predict.
            hidden = apply(model, parameters, rows.tokens, rows.segment_ids, rows.positions)
            aligned = align(hidden, rows.tokens, rows.segment_ids, numbers)
            return score_rows(aligned, unembedding_of(parameters), mesh)

        # Whole on every device, since every process reads all of them.
        self._score = jax.jit(within(mesh, score), out_shardings=replicated(mesh))

    def score(
        self,
        parameters: Parameters,
        texts: Iterable[tuple[np.ndarray, ...]],
        on_batch: Callable[[], bool] | None = None,
    ) -> Iterator[ScoredText]:
        """Scores texts, one after the other, as they are asked for.

        Args:
          parameters: of the model, on the mesh.
          texts: ids and UTF-8 bytes of every token, such as ``encode_document_and_bytes`` returns; and which of them
            count, unless all do.
          on_batch: called after each batch; returning False ends the scoring.
        """
        waiting: list[_Pending] = []
        rows: list[tuple[_Pending, np.ndarray]] = []

        def flush() -> bool:
            # One batch through the device, and back to the texts that its rows are of.
            batch = filled([row for _, row in rows], self._batch_size, self.length)
            found = jax.device_get(self._score(parameters, put_on_devices(batch, self._sharding)))
            for number, (text, row) in enumerate(rows):
                text.add(found, number, len(row) - 1)
            rows.clear()
            return on_batch is None or on_batch()

        def finished() -> Iterator[ScoredText]:
            while waiting and waiting[0].windows == len(waiting[0].parts):
                yield waiting.pop(0).scored()

        for ids, byte_lengths, *counted in texts:
            # A text's windows may come to lie in several batches.
            cut = list(windows(ids, self.length))
            waiting.append(_Pending(ids, byte_lengths, len(cut), counted[0] if counted else None))
            for row in cut:
                rows.append((waiting[-1], row))
                if len(rows) == self._batch_size and not flush():
                    return
            yield from finished()
        # The last batch is filled up.
        if not rows or flush():
            yield from finished()

    def sum_documents(
        self, parameters: Parameters, documents: Iterable[Document], on_batch: Callable[[], bool] | None = None
    ) -> TextSums | None:
        """Sums the scores of documents, a text with an end token after it; None if ``on_batch`` ended it."""
        encoded = map(self._encode, documents)
        total, going = TextSums.nothing(self._heads), True

        def goes_on() -> bool:
            nonlocal going
            going = on_batch is None or on_batch()
            return going

        for scored in self.score(parameters, encoded, goes_on):
            total += scored.sums()
        return total if going else None

    def _encode(self, document: Document) -> tuple[np.ndarray, ...]:
        """What ``score`` takes of a document. Of what a model wrote only that counts, and not its prompt."""
        if isinstance(document, str):
            return self.tokenizer.encode_document_and_bytes(document)
        lengths = self._bytes_of_ids.take(document.ids, mode="clip")  # a model may have more ids than its tokenizer
        return document.ids, lengths * document.supervised, document.supervised

    @functools.cached_property
    def _bytes_of_ids(self) -> np.ndarray:
        """UTF-8 bytes that each id writes; none where the tokenizer does not say."""
        with contextlib.suppress(ValueError):
            return np.array([len(written) for written in self.tokenizer.token_bytes()])
        return np.zeros(self.tokenizer.size, np.int64)


@dataclasses.dataclass
class _Pending:
    """A text of which some windows have been scored.

    Attributes:
      ids, byte_lengths: of all its tokens.
      windows: how many it has.
      counted: which of its tokens count; None: all.
      parts: the scores of those that have been scored, a token per column.
    """

    ids: np.ndarray
    byte_lengths: np.ndarray
    windows: int
    counted: np.ndarray | None = None
    parts: list[TokenScores] = dataclasses.field(default_factory=list)

    def add(self, scores: TokenScores, row: int, tokens: int) -> None:
        """Takes in what a row of a batch says of a window with so many tokens after its first."""
        self.parts.append(jax.tree.map(lambda values: values[..., row, :tokens], scores))

    def scored(self) -> ScoredText:
        """The whole text."""
        # Windows overlap in a token that is no target of the second: targets follow each other without a gap.
        whole = jax.tree.map(lambda *parts: np.concatenate(parts, axis=-1), *self.parts)
        there = whole.supervised if self.counted is None else whole.supervised & self.counted[None, 1:]
        return ScoredText(
            self.ids[1:], self.byte_lengths[1:], there, np.where(there, whole.ce, 0), np.where(there, whole.kl, 0),
            there & whole.agrees, there[0] & whole.greedy,
        )  # fmt: skip


def filled(rows: Sequence[np.ndarray], batch_size: int, length: int) -> Batch:
    """A [B, T] batch with one window per row; what is left over is padding."""
    tokens, segment_ids = np.zeros((2, batch_size, length), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], segment_ids[row, : len(ids)] = ids, 1
    return Batch(tokens, segment_ids, np.tile(np.arange(length, dtype=np.int32), (batch_size, 1)))
