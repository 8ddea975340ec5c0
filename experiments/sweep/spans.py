"""What is measured of a model that fills in masks: every way of it, and its teacher's opinion of what was written."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.sweep.rows import SpanCounts, SpanMeasures
from experiments.sweep.scale import MODES, Scale
from mtpd_jax.decoding.decoder import Continuation
from mtpd_jax.decoding.options import MASKS, Options
from mtpd_jax.decoding.strategies import is_lossless
from mtpd_jax.evaluation.comparison import common, distinct_ngrams
from mtpd_jax.evaluation.decoding import decode_prompts
from mtpd_jax.evaluation.quality import PLAIN, nats_of, span_ways
from mtpd_jax.evaluation.scoring import Scorer
from mtpd_jax.evaluation.slots import score_slots
from mtpd_jax.run import Run

# tau, and k of spans that are believed whole. Our choice: the frontier of each from slow to fast.
CONFIDENCES, LENGTHS = (0.6, 0.8, 0.9, 0.95, 0.99), (2, 3, 4, 5)
# k of spans that are verified, beside the longest: a pass over fewer places costs less.
SHORT = (2, 3)


def ways(mode: str, longest: int, new_tokens: int) -> dict[int | str, Options]:
    """All that is decoded in a mode. What is believed is greedy here: ``static`` cannot be sampled."""
    options = Options(0, new_tokens, MODES[mode], drafter=MASKS)
    verified = [*(length for length in SHORT if length < longest), longest]
    found: dict[int | str, Options] = {PLAIN: options.fastest_plain, **span_ways(options, ["verified"], verified, [])}
    if mode == "greedy":
        found |= span_ways(options, ["verified"], [longest], CONFIDENCES)
        found |= span_ways(options, ["static"], [length for length in LENGTHS if length <= longest], [])
        found |= span_ways(options, ["confident"], [longest], CONFIDENCES)
    return found


def measure_spans(opened: Run, texts: Sequence[np.ndarray], scale: Scale) -> SpanMeasures:
    """Decodes beginnings of texts in every way, one at a time, and has the teacher read what came of it.

    Args:
      opened: a run that keeps its teacher.
      texts: token ids, all of one length.
      scale: how much of them is a prompt, and how much is decoded after it.
    """
    teacher, prompts = opened.teacher, [text[: scale.prompt_tokens] for text in texts]
    assert teacher is not None  # see above
    longest, length = opened.config.objective.longest_span, scale.prompt_tokens + scale.new_tokens
    reader = teacher.scorer(1, length)
    own = teacher.decoder.run(prompts, Options(0, scale.new_tokens), rows=1)
    found: dict[str, dict[str, SpanCounts]] = {}
    for mode in MODES:
        wanted = ways(mode, longest, scale.new_tokens)
        decoded = decode_prompts(opened.decoder, prompts, wanted, batch_size=1, seed=0, turns=scale.turns)
        written = {str(name): of_way for name, of_way in decoded.items()}
        options = {str(name): one for name, one in wanted.items()}
        found[mode] = _counts(written, options, prompts, own, reader, teacher)
    read = reader.score(teacher.parameters, ((text, np.zeros_like(text)) for text in texts))
    whole = ((text, None) for text in texts)
    slots = score_slots(opened.config, opened.mesh, opened.parameters, teacher.parameters, whole, batch_size=8)
    return SpanMeasures(
        ways=found,
        teacher_tokens=[len(one.tokens) for one in own],
        teacher_nats=_rounded(nats_of(reader, teacher.parameters, prompts, own)),
        teacher_text=_rounded(np.array([float(one.ce[0].sum()) for one in read])),
        slots=dataclasses.asdict(slots),
    )


def _counts(
    written: Mapping[str, Sequence[Continuation]],
    options: Mapping[str, Options],
    prompts: Sequence[np.ndarray],
    own: Sequence[Continuation],
    reader: Scorer,
    teacher: Run,
) -> dict[str, SpanCounts]:
    return {
        name: SpanCounts(
            tokens=[len(one.tokens) for one in texts],
            passes=[one.passes for one in texts],
            seconds=[round(one.seconds, 6) for one in texts],
            accepted=[[one.accepted[k] for one in texts] for k in range(options[name].num_drafts)],
            nats=_rounded(nats_of(reader, teacher.parameters, prompts, texts)),
            kept=[common(one.tokens, other.tokens) for one, other in zip(texts, written[PLAIN], strict=True)],
            as_teacher=[common(one.tokens, other.tokens) for one, other in zip(texts, own, strict=True)],
            distinct_4grams=distinct_ngrams([one.tokens for one in texts]),
            lossless=is_lossless(options[name]),
        )
        for name, texts in written.items()
    }


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 3) for value in values]
