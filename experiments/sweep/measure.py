"""What is measured of a finished run: counts per held-out text, so that every interval can be taken later."""

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.sweep.scale import Scale
from mtpd_jax.data.pipeline import put_on_devices
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.sampling import GREEDY, Sampling
from mtpd_jax.evaluation.agreement import count_agreement
from mtpd_jax.evaluation.comparison import distinct_ngrams, first_divergence
from mtpd_jax.evaluation.decoding import decode_prompts, ways_of
from mtpd_jax.evaluation.generation import decoder_of
from mtpd_jax.evaluation.scoring import batches, make_scorer
from mtpd_jax.losses.objective import scoring_objective
from mtpd_jax.methods.method import method_of
from mtpd_jax.model.backbone import count_parameters
from mtpd_jax.sharding import batch_sharding
from mtpd_jax.training.restore import TrainedRun, open_run
from mtpd_jax.training.workdir import open_workdir

# Times that everything is decoded: the same tokens, and the median of the times.
_TURNS = 3

MODES = {"greedy": GREEDY, "sampled": Sampling(temperature=1.0)}


def held_out_texts(trained: TrainedRun, number: int, tokens: int) -> list[np.ndarray]:
    """The middle of each of the first held-out documents of some length: code rather than the licence at the top.

    Args:
      trained: whose held-out documents.
      number: how many at most.
      tokens: of each; documents of less than twice as many are left out.
    """
    texts = []
    for text in trained.held_out_documents():
        ids = trained.tokenizer.encode(text)
        if len(ids) >= 2 * tokens and len(texts) < number:
            texts.append(ids[len(ids) // 2 :][:tokens])
    return texts


def measure(workdir: str, heads: Sequence[int], scale: Scale) -> dict[str, Any]:
    """Scores and decodes with a finished run.

    Args:
      workdir: of the run.
      heads: numbers of heads to decode with.
      scale: says how many texts, and how much is decoded.

    Returns:
      A part of a row, ready for JSON: sizes and costs of training; ``text``, teacher-forced, and ``decoding``, by mode
      and number of heads, as lists with one number per text.
    """
    trained = open_run(workdir)
    config = trained.config
    texts = held_out_texts(trained, scale.texts, scale.prompt_tokens + scale.new_tokens)
    prompts = [text[: scale.prompt_tokens] for text in texts]
    parameters, tokens = trained.parameters, config.training.batch_size * config.training.sequence_length
    return {
        "steps": config.training.steps,
        "tokens": tokens * config.training.steps,
        "parameters": count_parameters(parameters),
        "head_parameters": count_parameters(parameters.get("heads", {})),
        "training_flops": method_of(config, trained.mesh).costs().flops_per_token * tokens * config.training.steps,
        "curve": _curve(workdir),
        "text": _score(trained, texts),
        "decoding": {mode: _decode(trained, prompts, heads, mode, scale.new_tokens) for mode in MODES},
    }


def _curve(workdir: str) -> list[dict[str, Any]]:
    """Held-out agreement and cross entropy during training."""
    lines = map(json.loads, (open_workdir(workdir).path / "metrics.jsonl").read_text().splitlines())
    wanted = ("main/ce", "agreement")
    return [
        {name: value for name, value in line.items() if name == "step" or (name.endswith(wanted) and "eval/" in name)}
        for line in lines
        if "eval/main/ce" in line
    ]


def _score(trained: TrainedRun, texts: Sequence[np.ndarray]) -> dict[str, Any]:
    """Every head on every text, teacher-forced: supervised tokens, nats and agreements, one number per text."""
    mesh = trained.mesh
    scorer = make_scorer(trained.model, scoring_objective(trained.config), mesh)
    sharding = batch_sharding(mesh, leading=0)
    found = []
    for text in texts:
        for batch in batches([text], mesh.devices.size, len(text)):
            found.append(jax.device_get(scorer(trained.parameters, put_on_devices(batch, sharding))))
    weights = np.array([weight for weight, _ in found])
    ce, kl, agreed = (np.array([getattr(sums, name) for _, sums in found]) for name in ("ce", "kl", "agreement"))
    sizes = [len(trained.tokenizer.decode(text[1:].tolist()).encode()) for text in texts]
    return {
        "bytes": sizes,
        "nats": _rounded(ce[:, 0]),
        "weight": _rounded(weights[:, 0]),
        "heads": [
            {
                "weight": _rounded(weights[:, k]),
                "nats": _rounded(ce[:, k]),
                "kl": _rounded(kl[:, k - 1]),
                "agreed": _rounded(agreed[:, k - 1]),
            }
            for k in range(1, weights.shape[1])
        ],
    }


def _decode(
    trained: TrainedRun, prompts: Sequence[np.ndarray], heads: Sequence[int], mode: str, new_tokens: int
) -> dict[str, Any]:
    """Real decoding, one prompt at a time, the numbers of heads in turn."""
    decoder, options = decoder_of(trained), Options(0, new_tokens, MODES[mode])
    ways = ways_of(options, heads)
    turns = [decode_prompts(decoder, prompts, ways, batch_size=1, seed=0) for _ in range(_TURNS)]
    found = turns[0]
    agreed, counted = count_agreement(decoder, prompts, found[0], max(heads))
    result: dict[str, Any] = {"agreed": agreed.astype(int).tolist(), "counted": counted.astype(int).tolist()}
    for number in heads:
        continuations = found[number]
        result[str(number)] = {
            "tokens": [len(one.tokens) for one in continuations],
            "passes": [one.passes for one in continuations],
            "seconds": [
                round(statistics.median(one.seconds for one in turn), 6)
                for turn in zip(*(turn[number] for turn in turns), strict=True)
            ],
            "tried": [[one.tried[k] for one in continuations] for k in range(number)],
            "accepted": [[one.accepted[k] for one in continuations] for k in range(number)],
            "distinct_4grams": distinct_ngrams([one.tokens for one in continuations]),
        }
        if MODES[mode].greedy:
            pairs = zip(prompts, found[0], continuations, strict=True)
            parted = [first_divergence(decoder, prompt.tolist(), plain, one) for prompt, plain, one in pairs]
            result[str(number)]["ties"] = sum(one is not None and one.tie for one in parted)
            result[str(number)]["different"] = sum(one is not None and not one.tie for one in parted)
    return result


def _rounded(values: np.ndarray) -> list[float]:
    return [int(value) if math.isclose(value, round(value)) else round(float(value), 3) for value in values]
