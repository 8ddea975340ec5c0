"""Models that are trained and decoded for real: plain MTP and MTP-D with four heads, extended to 8 and 16.

Trained at ``--scale=gpu`` on the source code that lies beside this Python. Training goes on where it was stopped; the
models stay on the machine, and rows as of every experiment (``experiments.sweep``) leave it.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from configs import base, gpu
from experiments.accelerator.battery import Case, Piece, Place, Result
from experiments.sweep.arms import Arm
from experiments.sweep.fingerprint import recorded, version_of
from experiments.sweep.rows import read_rows
from experiments.sweep.runner import Code, Sweep
from experiments.sweep.runs import Run, Variant
from experiments.sweep.scale import SCALES, Scale
from experiments.variants import MODES, mtp, mtp_d
from mtpd_jax.data.sources import open_source, split
from mtpd_jax.evaluation.statistics import mean_of

NAME = "trained"


def _tiny_config() -> Any:
    """On the standard library; everything but the model as at ``--scale=gpu``."""
    config = base.get_config()
    config.data.update(packages=False, shuffle_window=8)
    config.tokenizer.train_bytes = 20_000
    config.model.update(vocabulary_size=300, width=32, layers=2, query_heads=4, kv_heads=2, head_size=8, mlp_width=48)
    config.objective.top_n = 20
    config.optimizer.update(learning_rate=0.02, warmup_steps=1)
    config.training.update(steps=6, batch_size=4, sequence_length=64)
    config.mesh.data = 1
    config.checkpoint.update(every_steps=3, keep=1)
    config.logging.update(every_steps=3, tensorboard=False)
    config.evaluation.update(every_steps=6, documents=1)
    return config


_TINY = Scale("tiny", _tiny_config, loop_steps=3, texts=2, prompt_tokens=8, new_tokens=12, turns=1)


def _gpu_config() -> Any:
    """That of ``--scale=gpu``, with less text for its tokenizer."""
    config = gpu.get_config()
    config.tokenizer.train_bytes = 50_000_000
    return config


# The models of ``--scale=gpu``, and fewer texts, each decoded once: the machine is there for minutes.
_FULL = dataclasses.replace(SCALES["gpu"], base=_gpu_config, texts=32, turns=1)


def scale_of(place: Place) -> Scale:
    """How large the models are."""
    return _TINY if place.tiny else _FULL


def variants(place: Place) -> list[Variant]:
    """MTP, MTP-D, and what its heads are extended to; decoded without the training of new heads as well."""
    scale, first = scale_of(place), 1 if place.tiny else 4
    loop = {"training.steps": scale.loop_steps, "evaluation.every_steps": scale.loop_steps}
    start = dataclasses.replace(mtp_d(first), decode=(2 * first,))
    double = Variant(f"loop_{2 * first}", {**loop, "heads.num_heads": 2 * first}, start=start)
    fourfold = Variant(f"loop_{4 * first}", {**loop, "heads.num_heads": 4 * first}, start=double, decode=(2 * first,))
    return [start, mtp(first), double, fourfold]


def trained(place: Place, run: Run) -> Result:
    """Trains and decodes one of them; what another one starts from is trained first.

    Rows are of the recorded version of the code (``sweep.fingerprint``), to which the tests hold it.
    """
    code = Code(lambda family: "tiny" if place.tiny else version_of(recorded(family)))
    diverged = Sweep(NAME, [run], code, place.work / NAME, place.out).run()
    if diverged:
        raise ValueError("; ".join(diverged))
    rows = [row for row in read_rows(rows_file(place)) if (row.config, row.seed) == (run.key(), run.seed)]
    arm = Arm(run.variant.name, rows[-1:])
    greedy = [way for row in arm.rows for way in row.decoding["greedy"].by_heads.values()]
    data, scored = scale_of(place).config.data, arm.rows[0].text
    text_bytes = sum(
        len(str(text).encode(errors="replace"))
        for text in split(open_source(data), data.validation_fraction, validation=False)
    )
    return {
        "variant": run.variant.name,
        "seed": run.seed,
        "heads": arm.heads,
        "train_seconds": arm.mean("seconds"),
        "steps": arm.mean("steps"),
        "tokens": arm.mean("tokens"),
        "text_bytes": text_bytes,
        "times_text": arm.mean("tokens") * sum(scored.bytes) / sum(scored.weight) / text_bytes,
        "main_ce": mean_of(arm.main_ce()).mean,
        "texts_that_differ": sum(way.different or 0 for way in greedy),
        "decoding": {
            mode: {
                str(heads): {
                    "tokens_per_pass": dataclasses.asdict(mean_of(arm.tokens_per_pass(mode, heads))),
                    "speedup": dataclasses.asdict(mean_of(arm.speed_over(mode, heads, 0))),
                }
                for heads in run.heads()
                if heads
            }
            for mode in MODES
        },
    }


def rows_file(place: Place) -> pathlib.Path:
    """Where the rows stand."""
    return place.out / scale_of(place).name / f"{NAME}.jsonl"


def cases(place: Place) -> Sequence[Case]:
    """One per variant, in the order in which they start from each other."""
    runs = [Run(variant, place.seed, scale_of(place)) for variant in variants(place)]
    return [
        Case(f"{run.variant.name}, seed {run.seed}", 300, functools.partial(trained, place, run), resumable=True)
        for run in runs
    ]


def summary(result: Result) -> str:
    """A result in a line: with all heads."""
    found = {mode: ways[str(result["heads"])] for mode, ways in result["decoding"].items()}
    shown = [
        f"{mode} {way['tokens_per_pass']['mean']:.2f} tokens per pass, {way['speedup']['mean']:.2f} x plain"
        for mode, way in found.items()
    ]
    return f"main CE {result['main_ce']:.3f}; " + "; ".join(shown)


PIECE = Piece("trained", "a trained model", cases, summary, grace=30.0)
