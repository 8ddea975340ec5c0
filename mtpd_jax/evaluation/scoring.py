"""Teacher-forced scores of a text: cross entropy, bits per byte, and each head's agreement with the main head."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from mtpd_jax.data.pipeline import Batch, put_on_devices
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.losses.objective import Objective
from mtpd_jax.losses.terms import LossSums
from mtpd_jax.model.backbone import LanguageModel, unembedding_of
from mtpd_jax.model.layers import apply
from mtpd_jax.shapes import Array
from mtpd_jax.sharding import batch_sharding, within


@dataclasses.dataclass(frozen=True)
class MainScore:
    """The main head on a text.

    Attributes:
      ce: nats per scored token; None where nothing was scored.
      bits_per_byte: total nats / ln 2 over the UTF-8 bytes of the scored tokens.
    """

    ce: float | None
    bits_per_byte: float | None


@dataclasses.dataclass(frozen=True)
class HeadScore:
    """One head on a text, teacher-forced; each None where the head had no target.

    Attributes:
      ce: nats per supervised token, against the text.
      kl: KL(main head || head) in nats, over the full vocabulary at temperature 1.
      agreement: share of supervised tokens where the head's argmax is the main head's for the same target.
    """

    ce: float | None
    kl: float | None
    agreement: float | None


@dataclasses.dataclass(frozen=True)
class TextScore:
    """Scores of a text; ``tokens`` and ``bytes`` count what the main head was scored on."""

    main: MainScore
    heads: tuple[HeadScore, ...]
    tokens: int
    bytes: int


Scorer = Callable[[object, Batch], tuple[Array, LossSums]]


def make_scorer(model: LanguageModel, objective: Objective, mesh: Mesh) -> Scorer:
    """Returns the jitted function (parameters, [B, T] batch) -> (weights, sums)."""

    def score(parameters: object, rows: Batch) -> tuple[Array, LossSums]:
        weights = objective.count(rows.segment_ids)
        hidden = apply(model, parameters, rows.tokens, rows.segment_ids, rows.positions)
        unembedding = unembedding_of(parameters)
        _, sums = objective.loss(hidden, unembedding, rows.tokens, rows.segment_ids, weights, mesh)
        return weights, sums

    return jax.jit(within(mesh, score))


def windows(ids: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Cuts a document into windows of at most ``length`` tokens, each beginning with the last token of the one before.

    So every token but the first is a target exactly once.
    """
    for start in range(0, max(1, len(ids) - 1), length - 1):
        yield ids[start : start + length]


def batches(rows: Iterable[np.ndarray], batch_size: int, length: int) -> Iterator[Batch]:
    """Fills [B, T] batches with one window per row; what is left over is padding."""

    def fill(chunk: list[np.ndarray]) -> Batch:
        tokens, segment_ids = np.zeros((2, batch_size, length), np.int32)
        for row, ids in enumerate(chunk):
            tokens[row, : len(ids)], segment_ids[row, : len(ids)] = ids, 1
        return Batch(tokens, segment_ids, np.tile(np.arange(length, dtype=np.int32), (batch_size, 1)))

    pending: list[np.ndarray] = []
    for row in rows:
        pending.append(row)
        if len(pending) == batch_size:
            yield fill(pending)
            pending = []
    if pending:
        yield fill(pending)


def score_documents(
    scorer: Scorer,
    parameters: object,
    documents: Iterable[str],
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    num_heads: int,
    length: int,
    batch_size: int,
    on_batch: Callable[[], bool] = lambda: True,
) -> TextScore | None:
    """Scores documents, each with an end token after it.

    Args:
      scorer: from ``make_scorer``, with ``scoring_objective``.
      parameters, tokenizer, mesh: of the run.
      documents: texts.
      num_heads: K.
      length: tokens of a window: the training length.
      batch_size: rows per batch; a multiple of the mesh's batch axes.
      on_batch: called after each batch; returning False ends the scoring.

    Returns:
      The score, or None if ``on_batch`` ended it.
    """
    encoded_bytes = 0

    def rows() -> Iterator[np.ndarray]:
        nonlocal encoded_bytes
        for text in documents:
            ids, byte_lengths = tokenizer.encode_document_and_bytes(text)
            encoded_bytes += int(byte_lengths[1:].sum())
            yield from windows(ids, length)

    sharding = batch_sharding(mesh, leading=0)
    weights, sums = np.zeros(num_heads + 1), LossSums(*(np.zeros(num_heads + extra) for extra in (1, 0, 0)))
    for batch in batches(rows(), batch_size, length):
        added = jax.device_get(scorer(parameters, put_on_devices(batch, sharding)))
        weights, sums = jax.tree.map(np.add, (weights, sums), added)
        if not on_batch():
            return None
    return _summarise(weights, sums, encoded_bytes)


def _summarise(weights: np.ndarray, sums: LossSums, scored_bytes: int) -> TextScore:
    def mean(total: float, weight: float) -> float | None:
        return float(total / weight) if weight else None

    heads = tuple(
        HeadScore(
            mean(sums.ce[k], weights[k]), mean(sums.kl[k - 1], weights[k]), mean(sums.agreement[k - 1], weights[k])
        )
        for k in range(1, len(weights))
    )
    main = MainScore(mean(sums.ce[0], weights[0]), mean(sums.ce[0] / math.log(2), scored_bytes))
    return TextScore(main, heads, int(weights[0]), scored_bytes)
