"""What text that was written several tokens at a time is worth: by the model that taught, and beside plain decoding's.

Speed alone says nothing of a strategy that may write another text; what it wrote stands beside it.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from mtpd_jax.decoding.decoder import Continuation
from mtpd_jax.decoding.options import Options
from mtpd_jax.evaluation.comparison import common
from mtpd_jax.evaluation.decoding import PADDED_PLAIN, Decoded, DecodingScore
from mtpd_jax.evaluation.scoring import Scorer
from mtpd_jax.evaluation.statistics import Counts, Interval, mean_of
from mtpd_jax.shapes import Parameters

# Plain decoding among the ways that write spans.
PLAIN = "plain"


@dataclasses.dataclass(frozen=True)
class Reader:
    """Who judges: the model that taught, and what it wrote itself after the same prompts, greedily.

    Attributes:
      scorer, parameters: of the teacher.
      prompts: token ids.
      texts: the teacher's own, by prompt.
      nats: of those, by prompt, by the teacher itself.
    """

    scorer: Scorer
    parameters: Parameters
    prompts: Sequence[np.ndarray]
    texts: Sequence[Continuation]
    nats: np.ndarray

    @classmethod
    def of(
        cls, scorer: Scorer, parameters: Parameters, prompts: Sequence[np.ndarray], texts: Sequence[Continuation]
    ) -> "Reader":
        """A reader, from what the teacher wrote."""
        return cls(scorer, parameters, prompts, texts, nats_of(scorer, parameters, prompts, texts))


def nats_of(
    scorer: Scorer, parameters: Parameters, prompts: Sequence[np.ndarray], texts: Sequence[Continuation]
) -> np.ndarray:
    """Nats of texts that follow prompts, [P], each given all before it: no window of the scorer is shorter."""

    def whole(prompt: np.ndarray, text: Continuation) -> tuple[np.ndarray, ...]:
        ids = np.concatenate([prompt, np.asarray(text.tokens, np.int32)])
        assert len(ids) <= scorer.length  # or it would be cut
        return ids, np.zeros_like(ids), np.arange(len(ids)) >= len(prompt)

    found = scorer.score(parameters, (whole(*pair) for pair in zip(prompts, texts, strict=True)))
    return np.array([scored.ce[0].sum(dtype=np.float64) for scored in found])


@dataclasses.dataclass(frozen=True)
class Quality:
    """What a set of texts is worth; means with 95 % intervals over prompts.

    Attributes:
      teacher_ce: nats per token by the teacher, less those of its own greedy text. Text that repeats itself has few:
        read it beside the share of distinct 4-grams.
      same_as_own: share of texts that are what the same model writes one token at a time, whole; no figure under
        sampling, where that is another draw.
      kept: share of its tokens before the first that is not; likewise.
      same_as_teacher: share of texts that are the teacher's greedy ones, whole.
    """

    teacher_ce: Interval
    same_as_own: Interval
    kept: Interval
    same_as_teacher: Interval


@dataclasses.dataclass(frozen=True)
class SpanScore:
    """A way of writing spans: speed and quality, always together.

    Attributes:
      strategy, slots, min_confidence: the way; k, and tau.
      decoding: as of any way; ``tokens_per_pass`` is the effective k, pooled over prompts.
      effective_k_mean_of_means: the mean over prompts of theirs (as arXiv 2602.06019 reports it).
      lengths: passes in which 0, 1, …, k-1 guesses stood, those after a span's first token; a pass of ``verified``
        whose last guess ends the text writes no token of its own beside them.
      tokens_read: query positions per token that was written.
      quality: None without a teacher.
    """

    strategy: str
    slots: int
    min_confidence: float
    decoding: DecodingScore
    effective_k_mean_of_means: Interval
    lengths: tuple[int, ...]
    tokens_read: float
    quality: Quality | None


def span_ways(
    options: Options, strategies: Sequence[str], slots: Sequence[int], confidences: Sequence[float]
) -> dict[int | str, Options]:
    """Ways to write spans, by name: every strategy with every length, and with every confidence where it has one.

    Args:
      options: of all of them, with the drafter of masks.
      strategies: some of ``static``, ``confident`` and ``verified``; the last without confidence, too.
      slots: k.
      confidences: tau.
    """
    ways: dict[int | str, Options] = {}
    for strategy in strategies:
        taus = {"static": [0.0], "verified": [0.0, *confidences]}.get(strategy, list(confidences))
        for k in slots:
            for tau in taus:
                name = f"{strategy} {k}" + (f" at {tau:g}" if tau else "")
                ways[name] = dataclasses.replace(options.with_drafts(k - 1), strategy=strategy, min_confidence=tau)
    return ways


def score_spans(
    ways: Mapping[int | str, Options],
    scores: Mapping[int | str, DecodingScore],
    compared: Mapping[int | str, Decoded],
    reader: Reader | None,
) -> dict[str, SpanScore]:
    """The scores of the ways that write spans, plain decoding among them.

    Args:
      ways: of ``span_ways``.
      scores, compared: of all ways, those and plain decoding (0, and padded where passes share a width).
      reader: None without a teacher.
    """
    own = compared.get(PADDED_PLAIN, compared[0]).continuations
    plain: dict[int | str, Options] = {0: compared[0].options}
    return {
        PLAIN if name == 0 else str(name): _span_score(options, scores[name], compared[name], own, reader)
        for name, options in (plain | dict(ways)).items()
    }


def _span_score(
    options: Options,
    score: DecodingScore,
    found: Decoded,
    own: Sequence[Continuation],
    reader: Reader | None,
) -> SpanScore:
    written = found.continuations
    passes = sum(one.passes for one in written)
    at_least = [passes, *np.sum([one.accepted for one in written], axis=0, dtype=int).tolist(), 0]
    lengths = tuple(more - fewer for more, fewer in itertools.pairwise(at_least))
    going = [one for one in written if one.passes]
    means = [(len(one.tokens) - 1) / one.passes for one in going]
    return SpanScore(
        PLAIN if not options.num_drafts else options.strategy, options.num_drafts + 1, options.min_confidence, score,
        mean_of(Counts.of_prompts([means], [[1.0] * len(means)])), lengths,
        passes * options.width / max(1, sum(len(one.tokens) - 1 for one in written)),
        None if reader is None else _quality(written, own if options.sampling.greedy else None, reader),
    )  # fmt: skip


def _quality(written: Sequence[Continuation], own: Sequence[Continuation] | None, reader: Reader) -> Quality:
    ones = [1.0] * len(written)
    nats = nats_of(reader.scorer, reader.parameters, reader.prompts, written)
    sizes, theirs = ([len(one.tokens) for one in texts] for texts in (written, reader.texts))
    by_prompt = nats / sizes - reader.nats / theirs

    def same(texts: Sequence[Continuation]) -> Interval:
        equal = [float(one.tokens == other.tokens) for one, other in zip(written, texts, strict=True)]
        return mean_of(Counts.of_prompts([equal], [ones]))

    same_as_own = kept = Interval(None, None, None)
    if own is not None:
        shared = [common(one.tokens, other.tokens) for one, other in zip(written, own, strict=True)]
        same_as_own, kept = same(own), mean_of(Counts.of_prompts([shared], [[len(one.tokens) for one in own]]))
    return Quality(mean_of(Counts.of_prompts([by_prompt.tolist()], [ones])), same_as_own, kept, same(reader.texts))
