"""Standalone MTP (arXiv 2602.06019): a model that learns to write several tokens per pass, and what it loses by that.

``python -m experiments.standalone --scale=stories_656k --backbone=DIR --text=FILE --held_out=FILE --workdir=DIR``:
online self-distillation by the teacher's choice and by its distribution, against what it would be without the student's
own writing (offline), and without a teacher (ground truth); random against fixed lengths of spans; with the cross
entropy of the text beside it; with spans that grow. ``--scale=stories_19m`` is a larger model, for fewer steps.

Every arm starts from the same model, which is also its teacher. Figures are of held-out stories: how many tokens a pass
writes, what the teacher says of them, and the same with everything verified, when nothing is lost.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from configs import standalone as config_file
from experiments import pretrained
from experiments.pretrained import Given
from experiments.standalone_report import LONGER, SEEDS, TWICE, UNTRAINED, report
from experiments.sweep.experiment import Experiment, run
from experiments.sweep.runner import RESULTS
from experiments.sweep.runs import Variant
from experiments.sweep.scale import Scale
from mtpd_jax import frontdoor

_ONCE = (0,)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is trained at a scale.

    Attributes:
      learning_rate: after warm-up, to the tail.
      steps: optimizer steps.
      longer: of the main arm's longer runs, by name.
      thrice: arms that are run with three seeds; None: all.
      batch: rows per step.
      turns: times that everything is decoded.
    """

    learning_rate: float
    steps: int
    longer: Mapping[str, int]
    thrice: tuple[str, ...] | None = None
    batch: int = 4
    turns: int = 1


SIZES = {
    "stories_656k": Sizes(learning_rate=5e-4, steps=1600, longer={LONGER: 6400}, turns=3),
    "stories_19m": Sizes(
        learning_rate=5e-4, steps=400, longer={TWICE: 800, LONGER: 1600}, thrice=("online hard", "ground truth")
    ),
}
# What every arm starts from: a step that is too small to move anything.
_UNTRAINED = {"training.steps": 1, "optimizer.warmup_steps": 0, "optimizer.learning_rate": 1e-12}
ARMS: dict[str, dict[str, Any]] = {
    "online hard": {},
    "online soft": {"objective.labels": "distribution"},
    "offline": {"objective.written": "data"},
    "ground truth": {"objective.written": "data", "objective.labels": "data"},
    "fixed k=5": {"objective.k_min": 5, "objective.k_max": 5},
    "fixed k=8": {"objective.k_min": 8},
    "prefix loss": {"objective.prefix_weight": 1.0},
    "growing spans": {"objective.k_ramp": 0.4},
}


def variants_of(sizes: Sizes) -> list[Variant]:
    """What all start from, the arms, and longer runs of the first."""
    arms = [
        Variant(name, diff, seeds=None if sizes.thrice is None or name in sizes.thrice else _ONCE)
        for name, diff in ARMS.items()
    ]
    longer = [Variant(name, {"training.steps": steps}, seeds=_ONCE) for name, steps in sizes.longer.items()]
    return [Variant(UNTRAINED, _UNTRAINED, seeds=_ONCE), *arms, *longer]


def scale_of(name: str, given: Given) -> Scale:
    """The scale of a name."""
    sizes = SIZES[name]
    diff = {
        "training.batch_size": sizes.batch, "training.steps": sizes.steps, "checkpoint.every_steps": sizes.steps,
        "optimizer.learning_rate": sizes.learning_rate, "evaluation.every_steps": sizes.steps // 8,
        "logging.every_steps": 25,
    }  # fmt: skip
    return dataclasses.replace(pretrained.scale_of(name, given, config_file.get_config, diff), turns=sizes.turns)


def main() -> int:
    """Parses the flags, runs."""
    flags = pretrained.flags_of("standalone", __doc__, SIZES)
    given, sizes = pretrained.given_of(flags, RESULTS), SIZES[flags.scale]

    def variants(_: Scale) -> list[Variant]:
        return variants_of(sizes)

    page = functools.partial(report, sizes=dataclasses.asdict(sizes), wanted=variants, folder=RESULTS / flags.scale)
    experiment = Experiment("standalone", variants, page, SEEDS)
    run(experiment, scale_of(flags.scale, given), given.root, flags.only, flags.seeds, RESULTS)
    return 0


if __name__ == "__main__":
    frontdoor.guarded(main)
