"""Does a head's index matter? What the loss of agreement from the first head to the fourth depends on.

``python -m experiments.decay --scale=cpu --workdir=DIR``: plain MTP and MTP-D at three sizes of model and during
training, teacher-forced and in real decoding. Not in the paper, which reports a decay for its 2B model.
"""

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from experiments.sweep.arms import Arm
from experiments.sweep.experiment import Experiment, main
from experiments.sweep.report import Report, Table, line, points, share, with_interval
from experiments.sweep.runs import Variant
from experiments.sweep.scale import Scale
from experiments.variants import mtp, mtp_d
from mtpd_jax import frontdoor
from mtpd_jax.config import ModelConfig
from mtpd_jax.evaluation.statistics import Counts, difference, mean_of

HEADS = 4

FIGURES: dict[str, Callable[[Arm, int], Counts]] = {
    "agreement, held out": Arm.agreement,
    "agreement, output at temperature 1": lambda arm, k: arm.agreement_on_output("sampled", k),
    "conditional acceptance, temperature 1": lambda arm, k: arm.conditional("sampled", HEADS, k),
}


def variants(scale: Scale) -> list[Variant]:
    """Half the width and layers, as they are, and half as much again."""
    model = scale.config.model
    changes: dict[str, Mapping[str, Any]] = {
        "small": _sized(model, Fraction(1, 2)),
        "": {},
        "large": _sized(model, Fraction(3, 2)),
    }
    return [
        Variant("_".join(filter(None, [base.name, label])), {**base.diff, **change})
        for label, change in changes.items()
        for base in (mtp(HEADS), mtp_d(HEADS))
    ]


def _sized(model: ModelConfig, factor: Fraction) -> dict[str, Any]:
    """All but the vocabulary and the size of an attention head times a factor; kv heads as far as they divide."""
    query_heads, most = int(model.query_heads * factor), max(1, int(model.kv_heads * factor))
    return {
        "model.width": int(model.width * factor),
        "model.layers": int(model.layers * factor),
        "model.mlp_width": int(model.mlp_width * factor),
        "model.query_heads": query_heads,
        "model.kv_heads": max(heads for heads in range(1, most + 1) if query_heads % heads == 0),
    }


def report(arms: Mapping[str, Arm], scale: Scale) -> Report:
    """Head 1 against head 4, variant by variant, and over training."""
    text = (
        "What head 1 has over head 4, in points. Conditional acceptance counts a head only where the heads before it "
        "were right, which are the easier places; agreement counts it everywhere. Intervals in brackets: 95 %, "
        "bootstrap over seeds, if there are several, and then held-out texts."
    )
    return Report("Does a head's index matter?", text, [_table(arms), _over_training(arms)], _panels(arms))


def _table(arms: Mapping[str, Arm]) -> Table:
    rows = []
    for name, arm in arms.items():
        cells = [with_interval(mean_of(arm.main_ce())), *(share(mean_of(arm.agreement(k))) for k in (1, HEADS))]
        lost = [points(difference(figure(arm, 1), figure(arm, HEADS))[0]) for figure in FIGURES.values()]
        rows.append([name, *cells, *lost])
    columns = ["variant", "main CE, nats", "agreement, head 1, %", f"head {HEADS}, %",
               *(f"head 1 - head {HEADS}: {name}" for name in FIGURES)]  # fmt: skip
    return Table("By size of the model", columns, rows)


def _over_training(arms: Mapping[str, Arm]) -> Table:
    rows = []
    for name, arm in arms.items():
        for found in arm.rows[0].curve:
            first, last = (found[f"eval/head_{k}/agreement"] for k in (1, HEADS))
            cells = [f"{100 * first:.1f}", f"{100 * last:.1f}", f"{100 * (first - last):+.1f}"]
            rows.append([name, str(found["step"]), f"{found['eval/main/ce']:.3f}", *cells])
    columns = ["variant", "steps", "main CE, nats", "agreement, head 1, %", f"head {HEADS}, %", "difference"]
    return Table("During training (a few held-out documents, first seed)", columns, rows)


def _panels(arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    return [
        {
            "title": title,
            "x": "head",
            "y": "%",
            "lines": {
                name: line({k: mean_of(figure(arm, k)) for k in range(1, HEADS + 1)}, 100) for name, arm in arms.items()
            },
        }
        for title, figure in FIGURES.items()
    ]


EXPERIMENT = Experiment("decay", variants, report, seeds=(0,))

if __name__ == "__main__":
    frontdoor.guarded(lambda: main(EXPERIMENT, __doc__))
