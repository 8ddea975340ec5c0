"""What ``mtpd_jax.evaluate`` measured: scores of text and of decoding, and the settings that they were taken with."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.evaluation.decoding import PADDED_PLAIN, DecodingScore, Ways
from mtpd_jax.evaluation.quality import SpanScore
from mtpd_jax.evaluation.samples import Sample
from mtpd_jax.evaluation.scoring import TextScore
from mtpd_jax.evaluation.slots import SlotReport


@dataclasses.dataclass(frozen=True)
class PromptReport:
    """The decoding of one prompt file.

    Attributes:
      heads: scores by number of heads, as text ("0", "1", …); "0" is the fastest plain decoding.
      padded_plain: plain decoding at the width of the others' passes; None without ``bit_exact``.
      others: scores of who else drafts, by name and length of a draft: ``{"lookup": {"4": …}}``.
      spans: of ways to fill in masks, by name, plain decoding among them; see ``evaluation.quality``.
      samples: the first prompts, and what was written after them; see ``samples.samples_of``.
    """

    heads: dict[str, DecodingScore]
    padded_plain: DecodingScore | None = None
    others: dict[str, dict[str, DecodingScore]] = dataclasses.field(default_factory=dict)
    spans: dict[str, SpanScore] = dataclasses.field(default_factory=dict)
    samples: tuple[Sample, ...] = ()

    @classmethod
    def of(
        cls, scores: Mapping[int | str, DecodingScore], ways: Ways, spans: Mapping[str, SpanScore]
    ) -> "PromptReport":
        """From scores by the names of their ways; those of spans are what ``spans`` has."""
        heads = {str(name): score for name, score in scores.items() if isinstance(name, int)}
        others: dict[str, dict[str, DecodingScore]] = {}
        for name, score in scores.items():
            if not isinstance(name, int) and name != PADDED_PLAIN and name not in spans:
                others.setdefault(ways[name].drafter, {})[str(ways[name].num_drafts)] = score
        return cls(heads, scores.get(PADDED_PLAIN), others, dict(spans))

    @property
    def by_way(self) -> dict[str, DecodingScore]:
        """All scores, by the name of the way: numbers of heads, who else drafts, and spans."""
        others = {f"{who} {length}": one for who, scores in self.others.items() for length, one in scores.items()}
        return {**self.heads, **others, **{name: one.decoding for name, one in self.spans.items()}}

    @property
    def failed(self) -> bool:
        """Whether any greedy text differs from plain decoding's by more than rounding explains."""
        return any(score.failed for score in self.by_way.values())


@dataclasses.dataclass(frozen=True)
class Settings:
    """What was measured, and how.

    Attributes:
      workdir, step: of the run, and its checkpoint.
      sampling: how tokens were chosen.
      strategy, min_confidence: of drafts; ways that fill in masks have their own.
      stop: strings that end a text.
      seed: of what was drawn.
      max_new_tokens: after a prompt, at most.
      batch_size: prompts decoded together, and rows of text scored together.
      turns: times that everything was decoded.
      bit_exact: whether all passes were of one width.
      devices: how many, and of which kind.
    """

    workdir: str
    step: int
    sampling: Sampling
    strategy: str
    min_confidence: float
    stop: tuple[str, ...]
    seed: int
    max_new_tokens: int
    batch_size: int
    turns: int
    bit_exact: bool
    devices: str

    @property
    def of_decoding(self) -> list[str]:
        """How texts were continued, in words; turns, which the tables have, are left out."""
        sampling = self.sampling
        drawn = [f"temperature {sampling.temperature:g}, seed {self.seed}"]
        drawn += [f"top {sampling.top_k}"] if sampling.top_k is not None else []
        drawn += [f"top {sampling.top_p:g} of probability"] if sampling.top_p is not None else []
        drawn += ["greedy drafts"] if sampling.greedy_drafts else []
        limits = [f"at most {self.max_new_tokens:,} new tokens"]
        limits += [f"up to {', '.join(map(repr, self.stop))}"] if self.stop else []
        limits += [f"drafts surer than {self.min_confidence:g}"] if self.min_confidence else []
        limits += ["bit for bit"] if self.bit_exact else []
        return [*(["greedy"] if sampling.greedy else drawn), *limits]


@dataclasses.dataclass(frozen=True)
class Report:
    """What ``evaluate.run`` measured.

    Attributes:
      settings: of the measurement.
      text: by file name, or the split's name.
      decoding: by prompt file.
      teacher: as ``text``, of the model that taught this one, where the run keeps it: how far it has moved.
      slots: of a model that fills in masks, by the same names; see ``evaluation.slots``.
    """

    settings: Settings
    text: dict[str, TextScore]
    decoding: dict[str, PromptReport]
    teacher: dict[str, TextScore] = dataclasses.field(default_factory=dict)
    slots: dict[str, SlotReport] = dataclasses.field(default_factory=dict)

    @property
    def words(self) -> str:
        """The settings in a line: of what was measured, without the folder."""
        settings = self.settings
        how = settings.of_decoding if self.decoding else []
        return ", ".join([f"step {settings.step:,}", *how, f"{settings.batch_size} at a time", settings.devices])

    def to_json(self) -> dict[str, Any]:
        """The report as ``--json`` writes it; a part that was not asked for is left out."""
        return {name: part for name, part in dataclasses.asdict(self).items() if part}
