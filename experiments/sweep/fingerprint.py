"""The code version of the experiments' rows: a fingerprint of what the code does, not of how it is written.

Every way of training is run for a few steps on a text made here, scored and decoded, and every divergence is taken of
fixed logits. Losses, gradient norms, parameters, scores and decoded tokens are compared with those in
``behaviour.json``: within rounding, which kinds of CPU and optimisation levels do differently, they are of the recorded
version, so that code that changes no result disowns no row. Anything else is a new version, named by a hash of what was
found; record it before a sweep that kinds of machines share, or they may name it differently.
``python -m experiments.sweep.fingerprint`` says which version the code is; ``--record`` makes the present behaviour the
recorded one.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from configs import base
from experiments.sweep.measure import held_out_texts, measure
from experiments.sweep.runs import Run, Variant, digest
from experiments.sweep.scale import MODES, Scale
from mtpd_jax import frontdoor, train
from mtpd_jax.decoding.options import MASKS, Options
from mtpd_jax.evaluation.quality import span_ways
from mtpd_jax.evaluation.slots import score_slots
from mtpd_jax.losses.divergences import DIVERGENCES
from mtpd_jax.losses.terms import Distillation, chunk_loss
from mtpd_jax.run import Run as OpenedRun
from mtpd_jax.run import open_run

RECORDED = pathlib.Path(__file__).with_name("behaviour.json")

# Two float32 results of the same formulas, summed in another order and carried through a few optimizer steps.
_TOLERANCE = 1e-3
_SIGNIFICANT_DIGITS = 3

Numbers = dict[str, float]


def made_up_text(number: int = 60) -> str:
    """Documents with some structure: words that follow each other by a rule, and now and then do not."""
    words = [f"word{number}" for number in range(16)]
    rng = np.random.RandomState(0)  # whose stream NumPy has promised to keep
    documents, place = [], 0
    for _ in range(number):
        chosen = []
        for _ in range(rng.randint(40, 160)):
            place = (3 * place + 1) % len(words) if rng.randint(4) else rng.randint(len(words))
            chosen.append(words[place])
        documents.append(" ".join(chosen))
    return "<|endoftext|>".join(documents)


def _scale(text_file: pathlib.Path) -> Scale:
    def tree() -> Any:
        config: Any = base.get_config()
        config.data.update(source="text", paths=(str(text_file),), validation_fraction=0.3, shuffle_window=8)
        config.model.update(
            vocabulary_size=300, width=32, layers=2, query_heads=4, kv_heads=2, head_size=8, mlp_width=48,
            dtype="float32", remat=True,
        )  # fmt: skip
        config.objective.top_n = 20
        # Where a gradient is nearly zero, Adam turns rounding into whole steps unless epsilon is larger.
        config.optimizer.update(learning_rate=0.02, warmup_steps=2, epsilon=1e-3)
        config.training.update(steps=8, batch_size=4, sequence_length=64, micro_batches=2)
        config.mesh.data = 1
        config.checkpoint.every_steps = 100
        config.logging.update(every_steps=2, tensorboard=False)
        config.evaluation.update(every_steps=100, documents=3)
        return config

    return Scale("fingerprint", tree, loop_steps=4, texts=3, prompt_tokens=8, new_tokens=16)


_JOINT, _NEXT_TOKEN = Variant("joint", {"heads.num_heads": 2}), Variant("next_token", {"heads.num_heads": 0})
_POSTHOC = {"heads.num_heads": 2, "objective.mode": "posthoc"}
_STANDALONE = {
    "heads.num_heads": 0, "objective.mode": "standalone", "objective.k_max": 4, "objective.regions": 8,
    "training.steps": 6,
}  # fmt: skip
_GROUND_TRUTH = {"objective.written": "data", "objective.labels": "data", "objective.k_ramp": 0.5}
_SHARED = {"heads.kind": "recurrent", "heads.cache": "shared", "objective.alpha": 0.1}
# Every way of training, and whether its decoding is looked at, too.
TRAINED = {
    "joint": (_JOINT, True),
    "plain": (Variant("plain", {"heads.num_heads": 2, "objective.beta": 0.0}), False),
    "next_token": (_NEXT_TOKEN, False),
    "recurrent": (Variant("recurrent", {"heads.num_heads": 2, "heads.kind": "recurrent"}), False),
    "extension": (Variant("extension", {"heads.num_heads": 3, "training.steps": 4}, start=_JOINT), False),
    "posthoc": (Variant("posthoc", {**_POSTHOC, "objective.initial_heads": "last_block"}, start=_NEXT_TOKEN), False),
    "shared": (Variant("shared", {**_POSTHOC, **_SHARED}, start=_NEXT_TOKEN), True),
    "online": (Variant("online", {**_STANDALONE, "objective.prefix_weight": 0.5}, start=_NEXT_TOKEN), False),
    "soft": (Variant("soft", {**_STANDALONE, "objective.labels": "distribution"}, start=_NEXT_TOKEN), False),
    "offline": (Variant("offline", {**_STANDALONE, "objective.written": "data"}, start=_NEXT_TOKEN), False),
    "ground_truth": (Variant("ground_truth", {**_STANDALONE, **_GROUND_TRUTH}, start=_NEXT_TOKEN), False),
}
# The parts that rows of an experiment are known by.
FAMILIES = {
    "heads": ("joint", "plain", "next_token", "recurrent", "extension", "divergences"),
    "posthoc": ("posthoc", "shared", "divergences"),
    "standalone": ("online", "soft", "offline", "ground_truth", "divergences"),
}


def trained(name: str, folder: pathlib.Path) -> Numbers:
    """What one of ``TRAINED`` learns in a few steps: metrics, norms of its parameters, scores, decoding.

    Args:
      name: which.
      folder: where the runs of one behaviour lie.
    """
    variant, decoded = TRAINED[name]
    text_file = folder / "text.txt"
    text_file.write_text(made_up_text())
    run = Run(variant, 0, _scale(text_file))

    def train_in(run: Run) -> pathlib.Path:
        workdir = folder / run.variant.name
        with contextlib.redirect_stderr(None):
            result = train.run(run.config(train_in(run.start) if run.start else None), str(workdir))
        if not result.finished or result.signal is not None:  # asked to stop: what it did is not what the code does
            raise SystemExit(128 + (result.signal or 0))
        return workdir

    workdir = train_in(run)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    opened = open_run(str(workdir))
    parameters = jax.tree_util.tree_leaves_with_path(jax.device_get(opened.parameters))
    found = {
        "metrics": [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines],
        "parameters": {jax.tree_util.keystr(path): _sketch(leaf) for path, leaf in parameters},
    }
    if decoded:
        found["measured"] = measure(str(workdir), run.heads(), run.scale).to_json()
        found["decoded"] = _decoded(opened, run)
    if name == "online":
        found |= {"spans": _spans(opened, run), "slots": _slots(opened, run)}
    return dict(_flat(found))


def _sketch(leaf: np.ndarray) -> list[float]:
    """The norm of an array, and its product with a fixed random direction, which knows signs and places."""
    direction = np.random.RandomState(0).standard_normal(leaf.shape)
    size = float(np.linalg.norm(leaf))
    # Beside the norm, so that a product near zero is not compared with zero.
    return [size, size + float(np.vdot(leaf, direction))]


def _decoded(opened: OpenedRun, run: Run) -> dict[str, list[list[int]]]:
    """The ids that all heads write after a prompt, greedily and at temperature 1."""
    scale = run.scale
    texts = held_out_texts(opened, scale.texts, scale.prompt_tokens + scale.new_tokens)
    prompts, most = [text[: scale.prompt_tokens] for text in texts], run.heads()[-1]
    return {
        mode: [list(one.tokens) for one in opened.decoder.run(prompts, Options(most, scale.new_tokens, sampling))]
        for mode, sampling in MODES.items()
    }


def _spans(opened: OpenedRun, run: Run) -> dict[str, list[list[int]]]:
    """What is written in a way of each kind that fills in masks, and how many passes it takes.

    By the student with noise added to its parameters: after so few steps it writes one token again and again, and is
    as sure of all of them.
    """
    rng = np.random.RandomState(0)
    noisy = jax.tree.map(
        lambda leaf: leaf + 0.4 * rng.standard_normal(leaf.shape).astype(leaf.dtype), opened.parameters
    )
    opened = OpenedRun(dataclasses.replace(opened.trained, parameters=noisy))
    texts = held_out_texts(opened, run.scale.texts, run.scale.prompt_tokens + run.scale.new_tokens)
    prompts = [text[: run.scale.prompt_tokens] for text in texts]
    options = Options(0, run.scale.new_tokens, drafter=MASKS)
    ways = {**span_ways(options, ["confident", "verified"], [4], [0.2, 0.4]), **span_ways(options, ["static"], [2], [])}
    return {
        str(way): [[one.passes, *one.tokens] for one in opened.decoder.run(prompts, options)]
        for way, options in ways.items()
    }


def _slots(opened: OpenedRun, run: Run) -> dict[str, Any]:
    """What the student guesses in held-out texts, beside its teacher."""
    assert opened.teacher is not None  # it was trained by one
    texts = held_out_texts(opened, run.scale.texts, run.scale.prompt_tokens + run.scale.new_tokens)
    rows, parameters = ((text, None) for text in texts), (opened.parameters, opened.teacher.parameters)
    report = dataclasses.asdict(score_slots(opened.config, opened.mesh, *parameters, rows, batch_size=2))
    return {part: list(scores) for part, scores in report.items()}


def divergences(_: pathlib.Path) -> Numbers:
    """Values and gradients of every divergence on fixed logits, with and without the teacher detached."""
    rng = np.random.RandomState(0)
    logits, targets = jnp.asarray(3 * rng.standard_normal((3, 8, 60)), jnp.float32), jnp.arange(8)
    arguments = logits[:1], targets, jnp.ones((3, 8), bool), jnp.array([1.0, 0.3, 0.2]), jnp.array([0.5, 0.4])
    found = {}
    for kind in DIVERGENCES:
        for detach in (True, False):
            sums, gradient = chunk_loss(logits, *arguments, Distillation(12, 1.5, kind, detach))
            found[f"{kind}, {'detached' if detach else 'not detached'}"] = {
                **{name: getattr(sums, name).tolist() for name in ("ce", "kl", "agreement")},
                "gradient": [float(jnp.linalg.norm(of_head)) for of_head in gradient],
            }
    return dict(_flat(found))


PARTS: Mapping[str, Callable[[pathlib.Path], Numbers]] = {
    **{name: functools.partial(trained, name) for name in TRAINED},
    "divergences": divergences,
}


def behaviour(parts: Collection[str]) -> dict[str, Numbers]:
    """What is compared, by part."""
    with tempfile.TemporaryDirectory() as folder, jax.default_matmul_precision("highest"):
        return {name: PARTS[name](pathlib.Path(folder)) for name in parts}


def recorded(family: str = "heads") -> dict[str, Numbers]:
    """The behaviour that the recorded version of a family of experiments is known by."""
    found = json.loads(RECORDED.read_text())
    return {name: found[name] for name in FAMILIES[family]}


def changes(found: Numbers, expected: Numbers) -> list[str]:
    """What differs between two parts of behaviour by more than rounding: names, with both values."""
    return [
        f"{name}: {expected.get(name)} -> {found.get(name)}"
        for name in sorted(found.keys() | expected.keys())
        if name not in found
        or name not in expected
        or not math.isclose(found[name], expected[name], rel_tol=_TOLERANCE, abs_tol=1e-6)
    ]


def version_of(found: Mapping[str, Numbers]) -> str:
    """The name of a behaviour: a hash of it, rounded."""
    rounded = {
        part: {name: float(f"{value:.{_SIGNIFICANT_DIGITS}g}") for name, value in numbers.items()}
        for part, numbers in found.items()
    }
    return digest(rounded)


def known_as(found: Mapping[str, Numbers], family: str = "heads") -> str:
    """The recorded version if a behaviour is the recorded one up to rounding, else one of its own."""
    expected = recorded(family)
    same = found.keys() == expected.keys() and not any(changes(found[name], expected[name]) for name in found)
    return version_of(expected if same else found)


@functools.cache
def code_version(family: str = "heads") -> str:
    """What this code is known as. Takes up to a minute, once."""
    with rich.console.Console(stderr=True).status("what the code does, for the name of its version"):
        return known_as(behaviour(FAMILIES[family]), family)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Numbers by their place in nested dictionaries and lists; what clocks and other machines decide is left out."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in ("seconds", "mfu"):
                yield from _flat(part, f"{name}/{key}" if name else key)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _flat(part, f"{name}/{index}")
    elif value is not None:
        yield name, value


def main(arguments: list[str]) -> int:
    """Parses the flag; says the version, or records it."""
    parser = frontdoor.Parser(prog="python -m experiments.sweep.fingerprint", description=__doc__)
    parser.add_argument("--record", action="store_true", help="make the present behaviour the recorded one")
    console = rich.console.Console(highlight=False)
    if parser.parse_args(arguments).record:
        RECORDED.write_text(json.dumps(behaviour(PARTS), indent=1) + "\n")
        names = ", ".join(f"{family} {version_of(recorded(family))}" for family in FAMILIES)
        console.print(f"recorded as {names} in {RECORDED}", soft_wrap=True)
        return 0
    for family in FAMILIES:
        found, known = code_version(family), version_of(recorded(family))
        console.print(f"{family}: {found}" + (f", not the recorded {known}" if found != known else ""))
    return 0


if __name__ == "__main__":
    frontdoor.guarded(lambda: main(sys.argv[1:]))
