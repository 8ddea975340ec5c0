"""Post-hoc heads on a frozen backbone (Electronics 15(7):1533): what they learn from, on what, in how many stages.

``python -m experiments.posthoc --scale=stories_656k --backbone=DIR --text=FILE --held_out=FILE --workdir=DIR``: KL on
the backbone's distribution against LM loss on the data; text against the backbone's own generations; a long first stage
alone, a short one alone, or both; a cascade, a recurrent head, and one with a shared cache. ``--scale=stories_19m``
varies one thing at a time around a main arm, on a larger backbone.

The backbone is a workdir (``mtpd_jax.convert`` makes one of a pretrained model). Its own generations are written first:
how it goes on after beginnings of stories of the text. Figures are of other stories, those of ``--held_out``. Without
``--workdir`` the page is written anew, from the rows that are there.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from configs import posthoc as config_file
from experiments import pretrained
from experiments.posthoc_report import SEEDS, report
from experiments.pretrained import Given, write_beginnings
from experiments.sweep.experiment import Experiment, run
from experiments.sweep.runner import RESULTS, locked
from experiments.sweep.runs import Variant
from experiments.sweep.scale import Scale
from mtpd_jax import corpus, frontdoor
from mtpd_jax.decoding.sampling import Sampling

KINDS = {
    "recurrent": {"heads.kind": "recurrent", "heads.cache": "per_depth"},
    "shared": {"heads.kind": "recurrent", "heads.cache": "shared"},
    "cascade": {"heads.kind": "cascade", "heads.cache": "per_depth"},
}
LOSSES = {"kl": {}, "lm": {"objective.alpha": 1 / 3, "objective.beta": 0.0}}
# Beginnings of held-out stories that are written for measuring. Our choice.
_HELD_OUT = 64
# The other seeds are of what is compared; these of what is only shown.
_ONCE = (0,)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is trained at a scale.

    Attributes:
      learning_rate: at the peak; a tenth of it in a second stage.
      generations: beginnings of stories that the backbone goes on with.
      pre, fine: optimizer steps of a first, and of a short stage.
      batch: rows per step.
      characters: of a beginning.
      written: tokens that the backbone goes on with, at most, at temperature 1.
    """

    learning_rate: float
    generations: int
    pre: int = 400
    fine: int = 100
    batch: int = 4
    characters: int = 100
    written: int = 192


SIZES = {
    "stories_656k": Sizes(learning_rate=1e-2, generations=3000),
    "stories_19m": Sizes(learning_rate=4e-3, generations=1500),
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the arms read: backbone, text, and the folder of the backbone's own generations."""

    backbone: str
    text: str
    generations: str

    def of(self, data: str) -> dict[str, Any]:
        """The fields of a config that name the data of an arm."""
        if data == "text":
            return {"data.source": "text", "data.paths": (self.text,)}
        return {"data.source": "generations", "data.path": self.generations}


def arm(
    inputs: Inputs, sizes: Sizes, kind: str, loss: str, stage: str, data: str, seeds: Sequence[int] | None = None
) -> Variant:
    """One arm.

    Args:
      inputs, sizes: of the scale.
      kind: of ``KINDS``.
      loss: of ``LOSSES``.
      stage: ``pre``, a long first stage; ``fine``, a short one; ``both``, one on text and then the other.
      data: ``text`` or ``own``: of the only stage, or of the second.
      seeds: see ``Variant``.
    """
    name, of_seeds = f"{kind} {loss} {stage} {data}", None if seeds is None else tuple(seeds)
    diff = {**KINDS[kind], **LOSSES[loss], **inputs.of(data), "heads.num_heads": 3}
    if stage == "pre":
        steps = {"training.steps": sizes.pre, "optimizer.learning_rate": sizes.learning_rate}
        return Variant(name, {**diff, **steps, "objective.source": inputs.backbone}, seeds=of_seeds)
    rate = sizes.learning_rate * (0.1 if stage == "both" else 1.0)
    short = {"training.steps": sizes.fine, "optimizer.learning_rate": rate, "optimizer.warmup_steps": sizes.fine // 10}
    short["evaluation.every_steps"] = sizes.fine
    if stage == "fine":
        return Variant(name, {**diff, **short, "objective.source": inputs.backbone}, seeds=of_seeds)
    first = arm(inputs, sizes, kind, loss, "pre", "text")
    second = {"objective.mode": "posthoc", "objective.initial_heads": "source"}
    return Variant(name, {**diff, **short, **second}, start=first, seeds=of_seeds)


def whole_matrix(inputs: Inputs, sizes: Sizes) -> list[Variant]:
    """Every kind with every loss, stage and kind of data."""
    return [
        arm(inputs, sizes, kind, loss, stage, data)
        for kind in KINDS
        for loss in LOSSES
        for stage in ("pre", "fine", "both")
        for data in ("text", "own")
    ]


def one_at_a_time(inputs: Inputs, sizes: Sizes) -> list[Variant]:
    """The main arm, a shared cache that learns the backbone's distribution on text, and one thing changed at a time."""
    make = functools.partial(arm, inputs, sizes)
    return [
        make("shared", "kl", "pre", "text"),
        make("shared", "lm", "pre", "text"),
        make("shared", "kl", "pre", "own"),
        make("recurrent", "kl", "pre", "text", _ONCE),
        make("cascade", "kl", "pre", "text", _ONCE),
        make("shared", "kl", "fine", "text", _ONCE),
        make("shared", "kl", "both", "text", _ONCE),
        make("shared", "kl", "both", "own", _ONCE),
    ]


MATRICES: dict[str, Callable[[Inputs, Sizes], list[Variant]]] = {
    "stories_656k": whole_matrix,
    "stories_19m": one_at_a_time,
}


def write_generations(backbone: str, text: str, root: pathlib.Path, sizes: Sizes) -> str:
    """Has the backbone go on with beginnings of the text, or with those that it has not yet.

    Returns:
      The folder of what it wrote.
    """
    folder, prompts = root / "generations", root / "beginnings.jsonl"
    with locked(root / "generations.lock"):
        write_beginnings(text, prompts, sizes.characters, sizes.generations)
        corpus.run(
            backbone, str(prompts), str(folder), max_new_tokens=sizes.written, sampling=Sampling(1.0), batch_size=32
        )
    return str(folder)


def scale_of(name: str, given: Given) -> Scale:
    """The scale of a name."""
    sizes = SIZES[name]
    diff = {
        "training.batch_size": sizes.batch, "training.steps": sizes.pre, "checkpoint.every_steps": sizes.pre,
        "evaluation.every_steps": sizes.pre // 4,
    }  # fmt: skip
    of_generations = f"{sizes.generations} x {sizes.characters} characters, {sizes.written} tokens"
    return pretrained.scale_of(name, given, config_file.get_config, diff, generations=of_generations)


def main() -> int:
    """Parses the flags, runs."""
    flags = pretrained.flags_of("posthoc", __doc__, SIZES)
    given, sizes, generations = pretrained.given_of(flags, RESULTS), SIZES[flags.scale], "-"
    if given.root is not None:
        generations = write_generations(given.backbone, given.text, given.root, sizes)
        # For ``mtpd_jax.evaluate``, which measures a run with all the cores that there are.
        write_beginnings(given.held_out, given.root / "held_out.jsonl", sizes.characters, _HELD_OUT)
    inputs = Inputs(given.backbone, given.text, generations)

    def variants(_: Scale) -> list[Variant]:
        return MATRICES[flags.scale](inputs, sizes)

    page = functools.partial(report, sizes=dataclasses.asdict(sizes), wanted=variants)
    experiment = Experiment("posthoc", variants, page, SEEDS)
    run(experiment, scale_of(flags.scale, given), given.root, flags.only, flags.seeds, RESULTS)
    return 0


if __name__ == "__main__":
    frontdoor.guarded(main)
