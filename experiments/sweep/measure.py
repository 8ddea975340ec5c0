"""What is measured of a finished run: counts per held-out text, so that every interval can be taken later."""

import itertools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.sweep.rows import HeadCounts, Measured, ModeCounts, TextCounts, WayCounts
from experiments.sweep.scale import MODES, Scale
from experiments.sweep.spans import measure_spans
from mtpd_jax.decoding.options import Options
from mtpd_jax.evaluation.comparison import distinct_ngrams
from mtpd_jax.evaluation.decoding import Decoded, compare_ways, decode_prompts, ways_of
from mtpd_jax.evaluation.scoring import Scorer
from mtpd_jax.methods.method import method_of
from mtpd_jax.model.backbone import count_parameters
from mtpd_jax.run import Run, open_run
from mtpd_jax.runs.workdir import open_workdir


def held_out_texts(opened: Run, number: int, tokens: int) -> list[np.ndarray]:
    """The middle of each of the first held-out documents of some length: code rather than the licence at the top.

    Args:
      opened: whose held-out documents.
      number: how many at most.
      tokens: of each; documents of less than twice as many are left out.
    """
    texts = []
    for text in opened.trained.held_out_documents():
        ids = opened.tokenizer.encode(text) if isinstance(text, str) else text.ids
        if len(ids) >= 2 * tokens and len(texts) < number:
            texts.append(ids[len(ids) // 2 :][:tokens])
    return texts


def beginnings(opened: Run, path: str, number: int, tokens: int) -> list[np.ndarray]:
    """The beginnings of the first documents of a text file that are long enough, as documents begin."""
    documents = pathlib.Path(path).read_text().split(opened.config.tokenizer.end_token)
    if len(documents) == 1:
        documents = documents[0].split("<|endoftext|>")
    encoded = (opened.tokenizer.encode_prompt(document.strip("\n")) for document in documents)
    return list(itertools.islice((ids[:tokens] for ids in encoded if len(ids) >= tokens), number))


def measure(workdir: str, heads: Sequence[int], scale: Scale) -> Measured:
    """Scores and decodes with a finished run.

    Args:
      workdir: of the run.
      heads: numbers of heads to decode with.
      scale: says how many texts, and how much is decoded.
    """
    opened = open_run(workdir)
    config = opened.config
    wanted = scale.texts, scale.prompt_tokens + scale.new_tokens
    texts = beginnings(opened, scale.held_out, *wanted) if scale.held_out else held_out_texts(opened, *wanted)
    prompts = [text[: scale.prompt_tokens] for text in texts]
    parameters, tokens = opened.parameters, config.training.batch_size * config.training.sequence_length
    return Measured(
        steps=config.training.steps,
        tokens=tokens * config.training.steps,
        parameters=count_parameters(parameters),
        head_parameters=count_parameters(parameters.get("heads", {})),
        training_flops=method_of(config, opened.mesh).costs().flops_per_token * tokens * config.training.steps,
        curve=_curve(workdir),
        text=_score(opened, texts),
        decoding={mode: _decode(opened, prompts, heads, mode, scale) for mode in MODES},
        spans=measure_spans(opened, texts, scale) if config.model.mask_embedding and opened.teacher else None,
    )


def _curve(workdir: str) -> list[dict[str, Any]]:
    """Held-out agreement and cross entropy during training, and what decoding came to.

    How often slots agreed with the teacher, which a line has of a single step, is the mean of the lines since the
    evaluation before.
    """
    lines = map(json.loads, (open_workdir(workdir).path / "metrics.jsonl").read_text().splitlines())
    wanted = ("main/ce", "agreement")

    def is_kept(name: str) -> bool:
        return name == "step" or (name.endswith(wanted) and "eval/" in name) or name.startswith("decoded/")

    found: list[dict[str, Any]] = []
    agreed: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("slot_") and value is not None:
                agreed.setdefault(name, []).append(value)
        if "eval/main/ce" in line:
            means = {name: float(np.mean(values)) for name, values in agreed.items()}
            found.append({name: value for name, value in line.items() if is_kept(name)} | means)
            agreed = {}
    return found


def _score(opened: Run, texts: Sequence[np.ndarray]) -> TextCounts:
    """Every head on every text, teacher-forced."""
    scorer = Scorer(opened.trained.model, opened.tokenizer, opened.mesh, len(texts[0]), batch_size=1)
    scored = scorer.score(opened.parameters, ((text, np.zeros_like(text)) for text in texts))
    found = [text.sums() for text in scored]
    weights, ce, kl, agreed = (
        np.array([getattr(sums, name) for sums in found]) for name in ("weight", "ce", "kl", "agreed")
    )
    return TextCounts(
        bytes=[len(opened.tokenizer.decode(text[1:]).encode()) for text in texts],
        nats=_rounded(ce[:, 0]),
        weight=_rounded(weights[:, 0]),
        heads=[
            HeadCounts(*(_rounded(counts[:, k]) for counts in (weights, ce, kl, agreed)))
            for k in range(1, weights.shape[1])
        ],
    )


def _decode(opened: Run, prompts: Sequence[np.ndarray], heads: Sequence[int], mode: str, scale: Scale) -> ModeCounts:
    """Real decoding, one prompt at a time, the numbers of heads in turn."""
    decoder, ways = opened.decoder, ways_of(Options(0, scale.new_tokens, MODES[mode]), heads)
    decoded = decode_prompts(decoder, prompts, ways, batch_size=1, seed=0, turns=scale.turns)
    compared = compare_ways(decoder, prompts, ways, decoded)
    most = compared[max(heads)]
    return ModeCounts(
        agreed=most.agreed.astype(int).tolist(),
        counted=most.counted.astype(int).tolist(),
        by_heads={number: _counts_of(compared[number], number) for number in heads},
    )


def _counts_of(found: Decoded, heads: int) -> WayCounts:
    continuations, greedy = found.continuations, found.options.sampling.greedy
    parted = [divergence.tie for divergence in found.divergences if divergence is not None]
    return WayCounts(
        tokens=[len(one.tokens) for one in continuations],
        passes=[one.passes for one in continuations],
        seconds=[round(one.seconds, 6) for one in continuations],
        tried=[[one.tried[k] for one in continuations] for k in range(heads)],
        accepted=[[one.accepted[k] for one in continuations] for k in range(heads)],
        distinct_4grams=distinct_ngrams([one.tokens for one in continuations]),
        ties=parted.count(True) if greedy else None,
        different=parted.count(False) if greedy else None,
    )


def _rounded(values: np.ndarray) -> list[float]:
    return [int(value) if math.isclose(value, round(value)) else round(float(value), 3) for value in values]
