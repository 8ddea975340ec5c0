"""What it costs that a backbone does not learn with its heads: post-hoc heads against joint MTP-D.

``python -m experiments.freezing --scale=cpu --workdir=DIR``: four heads trained with their backbone, and four of the
same kind on a frozen backbone of the same size, which was trained before on as many tokens. The heads of both see the
same number of tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

from experiments.sweep.arms import Arm, gain, paired
from experiments.sweep.experiment import Experiment, main
from experiments.sweep.report import Report, Table, line, per_seed, verdict, with_interval
from experiments.sweep.runs import Variant
from experiments.sweep.scale import Scale
from experiments.variants import MODES, mtp_d, next_token
from mtpd_jax import frontdoor
from mtpd_jax.evaluation.statistics import Counts, mean_of

_HEADS = 4
# What is compared, with the factor and the digits that it is written with.
_FIGURES: dict[str, tuple[Callable[[Arm, str], Counts], int, int]] = {
    "cumulative acceptance, head 1": (lambda arm, mode: arm.cumulative(mode, _HEADS, 1), 100, 1),
    f"cumulative acceptance, head {_HEADS}": (lambda arm, mode: arm.cumulative(mode, _HEADS, _HEADS), 100, 1),
    "tokens per pass": (lambda arm, mode: arm.tokens_per_pass(mode, _HEADS), 1, 2),
}


def variants(scale: Scale) -> list[Variant]:
    """Heads that are trained with their backbone; a backbone; and heads on it, by its distribution or by labels."""
    frozen = {"heads.num_heads": _HEADS, "objective.mode": "posthoc"}
    lm = {"objective.alpha": 1 / _HEADS, "objective.beta": 0.0}
    return [
        mtp_d(_HEADS),
        next_token(),
        Variant("frozen_kl", frozen, start=next_token()),
        Variant("frozen_lm", {**frozen, **lm}, start=next_token()),
    ]


def report(arms: Mapping[str, Arm], scale: Scale) -> Report:
    """Both by what their heads are worth, and what they cost."""
    text = (
        f"`mtp_d_{_HEADS}`: a backbone and {_HEADS} heads that learn together (MTP-D). `ntp`: a backbone of the same "
        "size, trained without heads on as many tokens. `frozen_kl` and `frozen_lm`: as many heads on that one, which "
        "stays as it is; they learn its distribution, or the labels of the data. All heads see the same number of "
        "tokens, and a pass costs the same with all of them. Intervals in brackets: 95 %, paired bootstrap over seeds "
        "and then held-out texts."
    )
    tables = [_main_head(arms), *(_decoding(arms, mode) for mode in MODES)]
    return Report("What freezing the backbone costs", text, tables, _panels(arms))


def _main_head(arms: Mapping[str, Arm]) -> Table:
    rows = []
    for name, arm in arms.items():
        pair = paired(arms, name, f"mtp_d_{_HEADS}")
        cost, seeds = (None, []) if pair is None or name == pair[1].name else gain(*pair, Arm.main_ce)
        rows.append([
            name, with_interval(mean_of(arm.main_ce()), digits=3), "–" if cost is None else
            with_interval(cost, digits=3, signed=True), per_seed(seeds, 1, 3), f"{arm.mean('training_flops'):.3g}",
        ])  # fmt: skip
    columns = ["", "main CE, nats", "against joint", "per seed", "training FLOPs"]
    note = "FLOPs of a frozen backbone's heads are theirs alone: it was there before, and cost what `ntp` did."
    return Table("The main head, and what training costs", columns, rows, note)


def _decoding(arms: Mapping[str, Arm], mode: str) -> Table:
    rows = []
    for name in arms:
        pair = paired(arms, name, f"mtp_d_{_HEADS}")
        if pair is None or not pair[0].heads or name == pair[1].name:
            continue
        for what, (figure, factor, digits) in _FIGURES.items():
            gained, seeds = gain(*pair, lambda arm, figure=figure: figure(arm, mode))
            before, after = (with_interval(mean_of(figure(arm, mode)), factor, digits) for arm in reversed(pair))
            more = with_interval(gained, factor, digits, signed=True), per_seed(seeds, factor, digits)
            rows.append([name, what, before, after, *more, verdict(gained, len(seeds))])
    columns = ["", "figure", "joint", "frozen", "gain by freezing", "per seed", "better"]
    return Table(f"Decoding, {MODES[mode]}", columns, rows, "Acceptance in per cent.")


def _panels(arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    return [
        {
            "title": f"conditional acceptance, {MODES[mode]}", "x": "head", "y": "%",
            "lines": {
                name: line({k: mean_of(arm.conditional(mode, _HEADS, k)) for k in range(1, _HEADS + 1)}, 100)
                for name, arm in arms.items()
                if arm.heads
            },
        }
        for mode in MODES
    ]  # fmt: skip


EXPERIMENT = Experiment("freezing", variants, report)

if __name__ == "__main__":
    frontdoor.guarded(lambda: main(EXPERIMENT, __doc__))
