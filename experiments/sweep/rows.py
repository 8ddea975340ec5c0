"""The rows of a sweep: what was measured of a finished run, as it stands in the JSON lines."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.lines import append_line, read_lines

# One number per held-out text.
PerText = list[float]


@dataclasses.dataclass(frozen=True)
class HeadCounts:
    """One head on the held-out texts, teacher-forced: supervised tokens, nats, nats of KL, and agreements, by text."""

    weight: PerText
    nats: PerText
    kl: PerText
    agreed: PerText


@dataclasses.dataclass(frozen=True)
class TextCounts:
    """The held-out texts, teacher-forced: their bytes, the main head's nats and tokens, by text, and the heads."""

    bytes: list[int]
    nats: PerText
    weight: PerText
    heads: list[HeadCounts]

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> "TextCounts":
        """From JSON."""
        return cls(**{**tree, "heads": [HeadCounts(**head) for head in tree["heads"]]})


@dataclasses.dataclass(frozen=True)
class WayCounts:
    """The prompts decoded with one number of heads.

    Attributes:
      tokens, passes, seconds: by text; see ``Continuation``.
      tried, accepted: by head and text.
      distinct_4grams: of all texts together.
      ties, different: texts that are not plain decoding's, by a tie or else; None under sampling.
    """

    tokens: list[int]
    passes: list[int]
    seconds: list[float]
    tried: list[list[int]]
    accepted: list[list[int]]
    distinct_4grams: float | None
    ties: int | None = None
    different: int | None = None


@dataclasses.dataclass(frozen=True)
class ModeCounts:
    """The prompts decoded greedily, or sampled.

    Attributes:
      agreed, counted: by head and text, teacher-forced on what plain decoding wrote.
      by_heads: by number of heads.
    """

    agreed: list[list[int]]
    counted: list[list[int]]
    by_heads: dict[int, WayCounts]

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> "ModeCounts":
        """From JSON, where the numbers of heads stand beside the counts."""
        by_heads = {int(name): WayCounts(**part) for name, part in tree.items() if name.isdigit()}
        return cls(tree["agreed"], tree["counted"], by_heads)

    def to_json(self) -> dict[str, Any]:
        """The form that ``of`` reads."""
        ways = {str(number): _without_none(dataclasses.asdict(way)) for number, way in self.by_heads.items()}
        return {"agreed": self.agreed, "counted": self.counted, **ways}


@dataclasses.dataclass(frozen=True)
class SpanCounts:
    """The prompts continued in one way that fills in masks.

    Attributes:
      tokens, passes, seconds: by text.
      accepted: by draft, the slots after a span's first, and text.
      nats: of what was written, by the teacher, by text.
      kept: tokens before the first that plain decoding of the same model does not write, by text.
      as_teacher: tokens before the first that is not of the teacher's own greedy text, by text.
      distinct_4grams: of all texts together.
      lossless: whether its text is plain decoding's, or distributed as it.
    """

    tokens: list[int]
    passes: list[int]
    seconds: list[float]
    accepted: list[list[int]]
    nats: PerText
    kept: list[int]
    as_teacher: list[int]
    distinct_4grams: float | None
    lossless: bool


@dataclasses.dataclass(frozen=True)
class SpanMeasures:
    """What is measured of a model that fills in masks, beside its teacher.

    Attributes:
      ways: by mode and the name of a way; see ``evaluation.quality.span_ways``. Plain decoding among them.
      teacher_tokens, teacher_nats: of the teacher's own greedy text, by prompt, by itself.
      teacher_text: nats of the held-out texts by the teacher, as ``TextCounts.nats`` are by the student.
      slots: ``evaluation.slots.SlotReport`` of the held-out texts, as JSON.
    """

    ways: dict[str, dict[str, SpanCounts]]
    teacher_tokens: list[int]
    teacher_nats: PerText
    teacher_text: PerText
    slots: dict[str, Any]

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> "SpanMeasures":
        """From JSON."""
        ways = {mode: {name: SpanCounts(**way) for name, way in of.items()} for mode, of in tree["ways"].items()}
        return cls(**{**tree, "ways": ways})


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is measured of a finished run.

    Attributes:
      steps, tokens, parameters, head_parameters: of its training, and of the model.
      training_flops: model FLOPs of all its steps.
      curve: held-out cross entropy and agreement during training, by the names of ``metrics.jsonl``.
      text: teacher-forced.
      decoding: by mode, see ``scale.MODES``.
      spans: of a model that fills in masks.
    """

    steps: int
    tokens: int
    parameters: int
    head_parameters: int
    training_flops: float
    curve: list[dict[str, Any]]
    text: TextCounts
    decoding: dict[str, ModeCounts]
    spans: SpanMeasures | None = dataclasses.field(default=None, kw_only=True)

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        plain = {one.name: getattr(self, one.name) for one in dataclasses.fields(Measured) if one.name != "spans"}
        modes = {mode: counts.to_json() for mode, counts in self.decoding.items()}
        spans = {} if self.spans is None else {"spans": dataclasses.asdict(self.spans)}
        return {**plain, "text": dataclasses.asdict(self.text), "decoding": modes, **spans}


@dataclasses.dataclass(frozen=True)
class Row(Measured):
    """A finished run.

    Attributes:
      config, seed, code: what it is known by: see ``Run.key``, and ``fingerprint.code_version``.
      variant: its name in the experiment.
      seconds: of training, compilation and evaluation included.
      environment: see ``experiments.environment``.
    """

    config: str
    seed: int
    code: str
    variant: str
    seconds: float
    environment: dict[str, Any]

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> "Row":
        """From JSON."""
        modes = {mode: ModeCounts.of(counts) for mode, counts in tree["decoding"].items()}
        spans = {"spans": SpanMeasures.of(tree["spans"])} if "spans" in tree else {}
        return cls(**{**tree, "text": TextCounts.of(tree["text"]), "decoding": modes, **spans})

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON, what it is known by first."""
        name = {field: getattr(self, field) for field in ("config", "seed", "code", "variant", "seconds")}
        return {**name, **super().to_json(), "environment": self.environment}


def read_rows(path: pathlib.Path) -> list[Row]:
    """The rows of a JSON-lines file; a last line that a killed process left unfinished is not one.

    Raises:
      ValueError: another line is no row.
    """
    lines = read_lines(path)
    try:
        return [Row.of(line) for line in lines]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file of rows ({error}); restore it from the last commit") from error


def append_row(path: pathlib.Path, row: Row) -> None:
    """Adds a row, on disk before this returns; see ``append_line``."""
    append_line(path, row.to_json())


def _without_none(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if value is not None or name == "distinct_4grams"}
