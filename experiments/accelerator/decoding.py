"""Rounds of decoding by size, prompt, batch and number of heads: break-even, floor, and what the speed model says."""

import functools
from collections.abc import Sequence

from experiments.accelerator.battery import Case, Piece, Place, Result
from experiments.accelerator.device import Ceilings
from experiments.bench.decode_costs import Study, Subject, measure, random_subject
from mtpd_jax.config import HeadsConfig, ModelConfig
from mtpd_jax.evaluation.report import number
from mtpd_jax.model import costs
from mtpd_jax.model.layers import compute_dtype

# WIDTHxLAYERS in the quickstart's proportions: 131 million and a billion parameters, without the heads.
SIZES = {"130m": "768x15", "1b": "2048x19"}
_TINY_SIZE = "64x2"
_VOCABULARY = 32_768
# What the rounds of a call with sixteen heads may write: the same room for all numbers of heads.
_ROOM = 416


def subject_of(size: str, place: Place, heads: int) -> Subject:
    """A model with random parameters: what rounds cost does not depend on them. One of ``SIZES``, or the tiny one."""
    return random_subject(_TINY_SIZE, 300, heads) if place.tiny else random_subject(SIZES[size], _VOCABULARY, heads)


def floor_of(model: ModelConfig, config: HeadsConfig, heads: int, batch: int, slots: int) -> tuple[float, float]:
    """What a round needs at least: FLOPs, and bytes read.

    Every product reads its weights once: backbone, unembedding for the verify pass, and per head its block and the
    unembedding again, since each waits for the one before. Caches are read once over the slots that are in use.

    Args:
      model, config: of the model.
      heads: drafts per round; 0 for a plain step.
      batch: rows.
      slots: tokens of each text.
    """
    backbone, width = model.layers * costs.block(model, 0).weights, heads + 1
    head, logits = costs.head(model, config, 0).weights, costs.unembedding(model)
    # In a window of K+1 positions each, logits of the last one only.
    products = width * (backbone + logits) + heads * (width * head + logits)
    scores = 2 * width * slots * model.query_heads * model.head_size * (model.layers + heads)
    cache = batch * 2 * slots * model.kv_heads * model.head_size * (model.layers + heads)
    read = backbone + logits + heads * (head + logits) + cache
    return 2.0 * batch * (products + scores), float(compute_dtype(model).itemsize * read)


def rounds(place: Place, size: str, prompt: int, batch: int) -> Result:
    """Rounds with several numbers of heads, timed whole; for some of them their parts, which predict all of them."""
    numbers = (1, 2) if place.tiny else (1, 2, 4, 8, 16)
    if place.tiny:
        study = Study(numbers, (1, 2, 3), parts=(1,), products=False, prompt=prompt, new_tokens=16, repeats=2)
    else:
        study = Study(
            numbers, (1, 2, 5, 17), parts=(1, 4, 16), products=False, prompt=prompt, new_tokens=_ROOM, repeats=5,
            in_turn=False,
        )  # fmt: skip
    subject = subject_of(size, place, max(numbers))
    parts, predicted = measure(subject, batch, study)
    ceilings, found = Ceilings.of(place), []
    for row in parts:
        if row["part"] == "round":
            heads, seconds = row["heads"], row["seconds"]
            model = subject.model
            flops, read = floor_of(model.config, model.heads_config, heads, batch, prompt)
            floor = ceilings and ceilings.seconds(flops, read)
            found.append(
                {
                    "heads": heads,
                    "seconds": seconds,
                    "break_even": row["over_plain"],
                    "predicted_seconds": predicted.seconds(heads),
                    "flops": flops,
                    "bytes": read,
                    "floor_seconds": floor,
                    "over_floor": floor and seconds / floor,
                }
            )
    return {"size": size, "prompt": prompt, "batch": batch, "rounds": found, "parts": parts}


def cases(place: Place) -> Sequence[Case]:
    """By size, prompt and batch: what one user sees first, what a server sees last."""
    if place.tiny:
        return [Case("tiny, prompt 64, batch 2", 10, functools.partial(rounds, place, "tiny", 64, 2))]
    return [
        Case(f"{size}, prompt {prompt}, batch {batch}", 300, functools.partial(rounds, place, size, prompt, batch))
        for prompt, batch in ((64, 1), (64, 8), (2048, 1), (64, 64), (2048, 8), (2048, 64))
        for size in SIZES
    ]


def summary(result: Result) -> str:
    """A result in a line: what a round costs in plain steps, by heads, and plain steps beside their floor."""
    plain, *drafting = result["rounds"]
    floor = f" ({plain['over_floor']:.2f} x floor)" if plain["over_floor"] else ""
    shown = [f"{row['heads']}: {number(row['break_even'])}" for row in drafting]
    return f"plain {1e3 * plain['seconds']:.3g} ms{floor}; break-even by heads {', '.join(shown)}"


PIECE = Piece("decoding", "rounds of decoding", cases, summary)
