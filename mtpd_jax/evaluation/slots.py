"""What a student makes of masks in text that it was not trained on, slot by slot, as its teacher sees it.

Teacher-forced as in training: masks after every so many tokens of text, what the student writes there, and what its
teacher would have written after the same. How sure the student is stands beside how often it is right: a threshold on
confidence is worth what that comes to.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mtpd_jax.config import Config
from mtpd_jax.data.pipeline import Batch, put_on_devices
from mtpd_jax.evaluation.scoring import filled
from mtpd_jax.losses.align import AlignedRows
from mtpd_jax.losses.scores import score_rows
from mtpd_jax.methods.method import method_of
from mtpd_jax.methods.standalone import Exercise, Standalone, StandaloneConfig, at_slots
from mtpd_jax.model.backbone import unembedding_of
from mtpd_jax.shapes import Array, Bool, Float, Parameters
from mtpd_jax.sharding import batch_sharding, parts_of, replicated, within

# Token ids of a document, or of a part of it, and which of them count; None: all.
TextRow = tuple[np.ndarray, np.ndarray | None]
# Bins of the reliability table, of equal width. Our choice.
_BINS = 10


@dataclasses.dataclass(frozen=True)
class SlotScore:
    """One slot of spans.

    Attributes:
      agreement: share in which the student's token is the teacher's after the same text and the same tokens before it.
      chain: share in which that holds of all slots up to this one.
      confidence: mean probability of the student's token.
      tokens: that were compared.
    """

    agreement: float | None
    chain: float | None
    confidence: float | None
    tokens: int


@dataclasses.dataclass(frozen=True)
class Bin:
    """Tokens of slots after the first whose probability lies in a range: how sure the student was, how often right."""

    low: float
    high: float
    confidence: float | None
    agreement: float | None
    tokens: int


@dataclasses.dataclass(frozen=True)
class SlotReport:
    """A student beside its teacher, on text.

    Attributes:
      slots: 1 to k.
      reliability: see ``Bin``.
    """

    slots: tuple[SlotScore, ...]
    reliability: tuple[Bin, ...]


@dataclasses.dataclass
class _Sums:
    """What is counted: of every slot, and of every bin."""

    tokens: np.ndarray
    agreed: np.ndarray
    chained: np.ndarray
    confidence: np.ndarray
    bins: np.ndarray  # [3, bins]: tokens, confidence, agreement

    def report(self) -> SlotReport:
        def share(total: float, of: float) -> float | None:
            return float(total / of) if of else None

        slots = tuple(
            SlotScore(share(agreed, n), share(chained, n), share(confidence, n), int(n))
            for agreed, chained, confidence, n in zip(
                self.agreed, self.chained, self.confidence, self.tokens, strict=True
            )
        )
        edges = np.linspace(0, 1, _BINS + 1).tolist()
        bins = tuple(
            Bin(edges[i], edges[i + 1], share(confidence, n), share(agreed, n), int(n))
            for i, (n, confidence, agreed) in enumerate(self.bins.T)
        )
        return SlotReport(slots, bins)


def score_slots(
    config: Config,
    mesh: Mesh,
    student: Parameters,
    teacher: Parameters,
    rows: Iterable[TextRow],
    batch_size: int,
) -> SlotReport:
    """Compares a student with its teacher, with the longest spans that it was trained on.

    A span begins after every so many tokens of a row, from one row to the next at another token.

    Args:
      config, mesh: of the student's run, and where both lie.
      student, teacher: parameters.
      rows: of at most a training sequence.
      batch_size: rows together, at least.
    """
    method, text = _asking(config, mesh)
    parts, k = parts_of(mesh, "batch"), method.objective.k_max
    size = -(-batch_size // parts) * parts

    def compare(student: Parameters, teacher: Parameters, batch: Batch, offsets: Array) -> tuple[Array, Array, Array]:
        laid_out = method.lay_out(batch, k, offsets)
        frozen = method.frozen_of(teacher)
        done = method.exercise(student, frozen, batch, laid_out)
        return done.taught, done.choices == done.labels, _confidence(method, student, done, laid_out.slots)

    step = jax.jit(within(mesh, compare), out_shardings=replicated(mesh))
    sharding, nothing = batch_sharding(mesh, leading=0), np.zeros(k)
    sums = _Sums(nothing.copy(), nothing.copy(), nothing.copy(), nothing.copy(), np.zeros((3, _BINS)))
    for number, batch in enumerate(_batches(rows, size, method.config.training.sequence_length)):
        batch = put_on_devices(batch, sharding)
        # Every offset in turn, however many rows there are in a batch, so that no place of a row is left out.
        offsets = (size * number + np.arange(size)) % text
        found = jax.device_get(step(student, teacher, batch, jnp.asarray(offsets)))
        _add(sums, *(values.reshape(size, k, -1) for values in found))
    return sums.report()


def _asking(config: Config, mesh: Mesh) -> tuple[Standalone, int]:
    """A method that asks a student to write, and its teacher what it would have written, whatever it was trained with;
    and after how many tokens of text a span comes.

    In training, the masks of a row take the places of text: its end is left to other rows. Here a row has as many more
    slots as its masks need.
    """
    assert isinstance(config.objective, StandaloneConfig)
    objective, length = config.objective, config.training.sequence_length
    size = length // objective.regions_of(length)
    text = size - objective.k_max + 1
    regions = -(-length // text)
    asked = dataclasses.replace(objective, written="student", labels="teacher", regions=regions)
    longer = dataclasses.replace(config.training, sequence_length=regions * size)
    method = method_of(dataclasses.replace(config, objective=asked, training=longer), mesh)
    assert isinstance(method, Standalone)
    return method, text


def _confidence(method: Standalone, student: Parameters, done: Exercise, slots: Array) -> Float[Array, "B R"]:
    """The probability of every token that the student chose."""
    chosen = AlignedRows(at_slots(done.states, slots)[None], done.choices, done.taught[None])
    return jnp.exp(-score_rows(chosen, unembedding_of(student), method.mesh).ce[0])


def _add(
    sums: _Sums,
    taught: Bool[np.ndarray, "B k M"],
    agrees: Bool[np.ndarray, "B k M"],
    confidence: Float[np.ndarray, "B k M"],
) -> None:
    chained = np.logical_and.accumulate(agrees | ~taught, axis=1) & taught
    sums.tokens += taught.sum((0, 2))
    sums.agreed += (taught & agrees).sum((0, 2))
    sums.chained += chained.sum((0, 2))
    sums.confidence += np.where(taught, confidence, 0).sum((0, 2))
    # Guesses only: the first slot is what the model writes anyway.
    guessed = taught[:, 1:]
    sure, right = confidence[:, 1:][guessed], agrees[:, 1:][guessed]
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    for row, weights in enumerate((None, sure, right.astype(float))):
        sums.bins[row] += np.bincount(bins, weights, minlength=_BINS)


def _batches(rows: Iterable[TextRow], size: int, length: int) -> Iterator[Batch]:
    """[B, T] batches with one text in a row, rows and the last batch filled up."""
    rows = iter(rows)
    while waiting := list(itertools.islice(rows, size)):
        batch = filled([ids for ids, _ in waiting], size, length)
        supervised = batch.segment_ids != 0
        for row, (_, counted) in enumerate(waiting):
            if counted is not None:
                supervised[row, : len(counted)] = counted
        yield dataclasses.replace(batch, supervised=supervised)
