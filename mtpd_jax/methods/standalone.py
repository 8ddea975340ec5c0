"""Standalone MTP by online self-distillation ("Multi-Token Prediction via Self-Distillation", arXiv 2602.06019).

A model without heads learns to write k tokens in one pass: the next one after a text, and k-1 more in the places of
mask tokens after it. A frozen copy of what it was at first, the teacher, reads what the student wrote there and says,
slot by slot, what should have been written after it: never two halves of different continuations, which data alone
would teach.

One function has four settings: who writes what the teacher reads, the student or the text (``written``), and what is
learned, the teacher's choice, its distribution, or the text (``labels``). Equation (3) of the paper weighs by the
teacher's probability of all that was written; this is the form of the authors' code, which does not.
"""

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from mtpd_jax.config import Config
from mtpd_jax.data.pipeline import Batch
from mtpd_jax.fields import POSITIVE, ZERO_OR_MORE, at_least, at_most, field, one_of, require
from mtpd_jax.losses.divergences import DIVERGENCES
from mtpd_jax.losses.fused import Teacher, fused_loss
from mtpd_jax.losses.objective import LossTerm
from mtpd_jax.losses.scores import likeliest_tokens
from mtpd_jax.losses.terms import Distillation
from mtpd_jax.methods import spans
from mtpd_jax.methods.method import Method, ReadTokenizer, StepContext
from mtpd_jax.methods.partition import language_model, without_heads
from mtpd_jax.methods.source import SourceConfig, with_model_of
from mtpd_jax.methods.spans import Spans
from mtpd_jax.model import costs
from mtpd_jax.model.backbone import LanguageModel, unembedding_of
from mtpd_jax.model.layers import apply, cast_matrices
from mtpd_jax.model.views import PackedRows
from mtpd_jax.shapes import AnyArray, Array, Bool, Float, Hidden, Int, Parameters, Tokens


@dataclasses.dataclass(frozen=True)
class StandaloneConfig(SourceConfig, case="standalone"):
    """A model that learns to write several tokens per pass, taught by what it was; ``model`` is the source's."""

    # Who writes what the teacher reads in the places of masks. With labels: (student, teacher) is online and hard, the
    # paper's; (student, distribution) online and soft; (data, teacher) offline; (…, data) without a teacher.
    written: Literal["student", "data"] = field("student")
    # What a slot learns: the teacher's choice, its distribution, or what stands in the data.
    labels: Literal["teacher", "distribution", "data"] = field("teacher")
    k_min: int = field(2, at_least(2))  # tokens of the shortest span; the length is drawn for every step
    k_max: int = field(8, at_least(2))  # tokens of the longest span
    # The share of all steps over which the longest span grows from k_min to k_max, doubling. Our choice.
    k_ramp: float = field(0.0, ZERO_OR_MORE, at_most(1))
    # Regions of a row, each with one span; half of what fits with the longest spans, as in the paper. None: that many.
    regions: int | None = field(None, POSITIVE)
    prefix_weight: float = field(0.0, ZERO_OR_MORE)  # weight of the cross entropy of all text before spans
    # Of labels = distribution: the tokens of the teacher's that are compared, and how; see the sections with heads.
    top_n: int = field(10_000, POSITIVE)
    temperature: float = field(1.0, POSITIVE)  # divides both sides' logits
    kl: str = field("forward", one_of(DIVERGENCES))  # what is compared
    end_ids: tuple[int, ...] = field(())  # tokens that end a text; empty: those of the source's tokenizer, recorded

    @property
    def longest_span(self) -> int:
        return self.k_max

    def regions_of(self, length: int) -> int:
        """Regions of a row: M, with S/M slots each. The paper's S / (2 k_max), or the next divisor of S below."""
        if self.regions is not None:
            return self.regions
        return next(number for number in range(max(1, length // (2 * self.k_max)), 0, -1) if length % number == 0)

    def check(self, config: Config) -> None:
        require(config.heads.num_heads == 0, "heads.num_heads", config.heads.num_heads, "0: the model itself drafts")
        require(self.k_max >= self.k_min, "objective.k_max", self.k_max, f"at least k_min = {self.k_min}")
        length = config.training.sequence_length
        regions = self.regions_of(length)
        expected = f"a divisor of training.sequence_length = {length}"
        require(length % regions == 0, "objective.regions", regions, expected)
        expected = f"less than the {length // regions} slots of a region: shorter spans, fewer regions or longer rows"
        require(self.k_max < length // regions, "objective.k_max", self.k_max, expected)


@struct.dataclass
class SpanSums:
    """What a step reports: sums over rows, without gradient.

    Attributes:
      taught: nats, of what slots of spans learn.
      learned: [k_max]; slots that learned, by their place in the span.
      agreement: [k_max]; those of them whose choice is the teacher's, or with labels = data the text's.
      main: nats of the text after the text before spans' masks, or with a prefix weight after all text.
    """

    taught: Float[AnyArray, ""]
    learned: Float[AnyArray, " k"]
    agreement: Float[AnyArray, " k"]
    main: Float[AnyArray, ""]


@struct.dataclass
class Exercise:
    """One batch's masks and who wrote in them: what a student did, and what it is held to.

    Attributes:
      states: [B, S, D]; the student's, of rows with masks in them.
      choices: [B, R]; its own, of the slots of spans.
      taught: [B, R]; which slots learn.
      labels: [B, R]; what they learn, as tokens.
      teacher: [B, R, D]; the teacher's states there; None without one.
    """

    states: Hidden
    choices: Int[Array, "B R"]
    taught: Bool[Array, "B R"]
    labels: Int[Array, "B R"]
    teacher: Hidden | None


class Standalone(Method, section=StandaloneConfig):
    """The whole model is trained; the teacher is what it was, and is kept beside the checkpoints."""

    keeps_teacher: ClassVar[bool] = True
    draws_attention: ClassVar[bool] = True

    def __init__(self, config: Config, mesh: Mesh):
        super().__init__(config, mesh)
        assert isinstance(config.objective, StandaloneConfig)
        self.objective, length = config.objective, config.training.sequence_length
        self.regions = self.objective.regions_of(length)
        self.teacher_model = LanguageModel(
            dataclasses.replace(self.model.config, mask_embedding=False), self.model.heads_config
        )

    @classmethod
    def complete(cls, config: Config, source: Config, tokenizer: ReadTokenizer) -> Config:
        objective, masks = config.objective, source.model.mask_embedding
        assert isinstance(objective, StandaloneConfig)
        # A config that was completed before says so of its masks already.
        own = dataclasses.replace(config.model, mask_embedding=masks)
        config = with_model_of(dataclasses.replace(config, model=own), source)
        # It is trained, whatever it was stored in, and has masks, whether or not it had.
        model = dataclasses.replace(config.model, weights="float32", mask_embedding=True)
        ends = objective.end_ids or tokenizer(config).end_ids
        for token in ends:
            last = model.vocabulary_size - 1
            require(0 <= token <= last, "objective.end_ids", token, f"tokens of the model, 0 to {last}")
        return dataclasses.replace(config, model=model, objective=dataclasses.replace(objective, end_ids=ends))

    def initial_parameters(self, key: Array, source: Parameters | None) -> Parameters:
        if source is None:
            return super().initial_parameters(key, None)
        student = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), without_heads(source))
        # The mean token: neither this nor that one.
        return {"mask_embedding": jnp.mean(student["embedding"], axis=0), **student}

    def split(self, parameters: Parameters) -> tuple[Parameters, Parameters | None]:
        return parameters, self.frozen_of(parameters)

    def frozen_of(self, teacher: Parameters) -> Parameters | None:
        """The teacher as it is computed with; None where there is nothing to ask it."""
        if self.objective.labels == "data":
            return None
        return cast_matrices(language_model(teacher), jnp.dtype(self.model.config.dtype))

    def spans_of(self, rows: Batch, context: StepContext) -> Spans:
        """Where the spans of a step lie; the same however its batch is cut, and whenever it is done again."""
        k, offsets = spans.draw(
            context.key, context.row_keys, size=rows.tokens.shape[1] // self.regions, k_min=self.objective.k_min,
            k_max=self._longest(context.step),
        )  # fmt: skip
        return self.lay_out(rows, k, offsets)

    def lay_out(self, rows: Batch, k: Int[Array, ""] | int, offsets: Int[Array, " B"]) -> Spans:
        """Spans of k tokens in packed rows."""
        objective = self.objective
        return spans.lay_out(
            rows, jnp.asarray(k), offsets, regions=self.regions, k_max=objective.k_max, end_ids=objective.end_ids
        )

    def _longest(self, step: Int[Array, ""]) -> Int[Array, ""] | int:
        """The longest span of a step: k_max, or on the way to it."""
        objective, steps = self.objective, self.objective.k_ramp * self.config.training.steps
        if not steps:
            return objective.k_max
        doublings = math.ceil(math.log2(objective.k_max / objective.k_min))
        grown = objective.k_min * 2 ** jnp.floor(step / steps * doublings)
        return jnp.minimum(grown, objective.k_max).astype(jnp.int32)

    def student(self, parameters: Parameters, rows: Batch, laid_out: Spans) -> Hidden:
        """States of rows with masks in them, [B, S, D]."""
        tokens = laid_out.tokens(rows.tokens, self.model.config.vocabulary_size)
        return self._run(self.model, parameters, tokens, laid_out)

    def _run(self, model: LanguageModel, parameters: Parameters, tokens: Tokens, laid_out: Spans) -> Hidden:
        view = PackedRows.seeing(laid_out.sees, laid_out.segment_ids, laid_out.positions, model.config)
        return apply(model, parameters, tokens, laid_out.segment_ids, laid_out.positions, view=view).main

    def exercise(self, student: Parameters, teacher: Parameters | None, rows: Batch, laid_out: Spans) -> Exercise:
        """Has the student fill the masks in, and asks what it should have written."""
        objective, k_max, matrix = self.objective, self.objective.k_max, unembedding_of(student)
        text, taught = self._text_of_spans(rows, laid_out)
        states = self.student(student, rows, laid_out)
        choices = likeliest_tokens(at_slots(states, laid_out.slots), matrix, laid_out.there, self.mesh)
        if objective.labels == "data":
            return Exercise(states, choices, taught, text, None)
        assert teacher is not None  # see ``frozen_of``
        # What is read in the masks, and which slots are decoded after it at all.
        written = text
        if objective.written == "student":
            written, taught = choices, laid_out.there & spans.before_the_end(choices, k_max, objective.end_ids)
        tokens = laid_out.tokens(rows.tokens, 0)
        asked = self._run(self.teacher_model, teacher, laid_out.written(tokens, written, k_max), laid_out)
        told = at_slots(asked, laid_out.slots)
        labels = likeliest_tokens(told, unembedding_of(teacher), taught, self.mesh)
        return Exercise(states, choices, taught, labels, told)

    def count(self, rows: Batch, context: StepContext) -> Float[Array, " J"]:
        """Slots of spans, and tokens of the text that the student is held to.

        Slots that fall away because the student ended its text are counted, too: what a slot weighs does not depend on
        what others wrote.
        """
        laid_out, objective = self.spans_of(rows, context), self.objective
        of_student = objective.labels != "data" and objective.written == "student"
        taught = laid_out.there if of_student else self._text_of_spans(rows, laid_out)[1]
        _, told = self._text(rows, laid_out)
        return jnp.stack([jnp.sum(taught), jnp.sum(told)]).astype(jnp.float32)

    def _text_of_spans(self, rows: Batch, laid_out: Spans) -> tuple[Int[Array, "B R"], Bool[Array, "B R"]]:
        """What the text has in spans, and which slots learn where that is written in them, or is what they learn."""
        k_max = self.objective.k_max
        text, inside = spans.following(rows, laid_out, self.regions, k_max)
        if self.objective.labels != "data":  # what comes after the text is the teacher's to say
            inside = jnp.pad(inside, ((0, 0), (self.regions, 0)), constant_values=True)[:, : inside.shape[1]]
        return text, laid_out.there & inside & spans.before_the_end(text, k_max, self.objective.end_ids)

    def _text(self, rows: Batch, laid_out: Spans) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
        """What the text before the anchors goes on with if that is learned; else the anchors', which is only reported;
        and where it is in the document."""
        if self.objective.prefix_weight:
            return spans.prefix(rows, laid_out)
        tokens, inside = spans.following(rows, laid_out, self.regions, 1)
        return tokens, inside & laid_out.there[:, : self.regions]

    def loss(
        self,
        trained: Parameters,
        frozen: Parameters | None,
        rows: Batch,
        weights: Float[Array, " J"],
        context: StepContext,
    ) -> tuple[Float[Array, ""], SpanSums]:
        objective, matrix = self.objective, unembedding_of(trained)
        laid_out = self.spans_of(rows, context)
        done = self.exercise(trained, frozen, rows, laid_out)
        by_slot, by_text = jnp.where(weights > 0, 1 / jnp.maximum(weights, 1), 0)
        # What slots of spans learn: a token, or a distribution.
        soft = objective.labels == "distribution"
        compared = Distillation(objective.top_n, objective.temperature, objective.kl, detach_teacher=True)
        teacher = None
        if soft and frozen is not None and done.teacher is not None:
            teacher = Teacher(done.teacher, unembedding_of(frozen))
        states = at_slots(done.states, laid_out.slots)[None]
        total, sums = fused_loss(
            states, matrix, done.labels, done.taught[None],
            jnp.where(soft, 0.0, by_slot)[None], by_slot[None][: int(soft)],
            distillation=compared if soft else None, mesh=self.mesh, chunk_rows=objective.chunk_rows,
            teacher=teacher,
        )  # fmt: skip
        # The text before spans, which nothing in this teaches unless it is asked for.
        tokens, told = self._text(rows, laid_out)
        states = done.states[None]
        if not objective.prefix_weight:
            states = at_slots(done.states, laid_out.slots[:, : self.regions])[None]
            states, matrix = jax.lax.stop_gradient((states, matrix))
        held, of_text = fused_loss(
            states, matrix, tokens, told[None], objective.prefix_weight * by_text[None], by_text[None][:0],
            distillation=None, mesh=self.mesh, chunk_rows=objective.chunk_rows,
        )  # fmt: skip
        by_place = self._by_place(done.taught), self._by_place(done.taught & (done.choices == done.labels))
        return total + held, SpanSums((sums.kl if soft else sums.ce)[0], *by_place, of_text.ce[0])

    def _by_place(self, flags: Bool[Array, "B R"]) -> Float[Array, " k"]:
        return jnp.sum(flags.reshape(len(flags), self.objective.k_max, -1), axis=(0, 2), dtype=jnp.float32)

    def zero_sums(self) -> SpanSums:
        nothing, places = jnp.zeros(()), jnp.zeros(self.objective.k_max)
        return SpanSums(nothing, places, places, nothing)

    def terms(self, sums: SpanSums, weights: Float[AnyArray, " J"]) -> dict[str, LossTerm]:
        """``main/ce``, ``spans/ce`` or ``spans/kl``, and ``slot_1/agreement``, ``slot_2/agreement``, …"""
        learned, agreement = sums.learned.tolist(), sums.agreement.tolist()
        name = "kl" if self.objective.labels == "distribution" else "ce"
        terms = {"main/ce": LossTerm(float(sums.main), float(weights[1]))}
        terms[f"spans/{name}"] = LossTerm(float(sums.taught), sum(learned))
        for place, (agreed, number) in enumerate(zip(agreement, learned, strict=True), 1):
            terms[f"slot_{place}/agreement"] = LossTerm(agreed, number)
        return terms

    def costs(self) -> costs.Costs:
        model, objective, length = self.config.model, self.objective, self.config.training.sequence_length
        trunk, logits = costs.trunk(model, length), costs.unembedding(model)
        body, taught = trunk.multiplications - logits, objective.labels != "data"
        # Of a row: slots that learn, with spans of the mean length, and text that is held against the student.
        slots = self.regions * (objective.k_min + objective.k_max) // 2
        told = (length - slots) * 6 if objective.prefix_weight else self.regions * 2
        # Products of the unembedding: the student's choices, its loss; the teacher's choices, its share of the loss.
        per_slot = 2 + 6 + 2 * taught + 2 * (objective.labels == "distribution")
        flops = (6 + 2 * taught) * body + (per_slot * slots + told) * logits // length
        return costs.Costs(trunk.weights, trunk.weights * taught, model.layers, flops)

    def describe(self) -> str:
        objective = self.objective
        how = "the text" if objective.labels == "data" else f"the teacher's {_LABELS[objective.labels]}"
        written = "" if objective.labels == "data" else f" after what {_WRITERS[objective.written]} wrote"
        return f"spans of {objective.k_min} to {objective.k_max} tokens, {how}{written}, on {objective.source_run}"


_LABELS = {"teacher": "choice", "distribution": "distribution"}
_WRITERS = {"student": "the student", "data": "the text"}


def at_slots(states: Hidden, slots: Int[Array, "B R"]) -> Float[Array, "B R D"]:
    """The states of some slots of every row."""
    return jnp.take_along_axis(states, slots[:, :, None], axis=1)
