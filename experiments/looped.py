"""Looped extension: 1 to 8 and 4 to 8 to 16 heads (MTP-D §3.3, Table 8), and what else the same steps could buy.

``python -m experiments.looped --scale=cpu --workdir=DIR``: the training-free loop against the trained one, the steps
that it takes, acceptance by head index, and speed. Beside it at equal total steps: sixteen heads trained jointly (the
same parameters), and one recurrent head applied sixteen times (a sixteenth of the heads' parameters).
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from experiments.sweep.arms import Arm, gain, paired, times
from experiments.sweep.experiment import Experiment, main
from experiments.sweep.report import Report, Table, line, per_seed, points, share, verdict, with_interval
from experiments.sweep.runs import Variant
from experiments.sweep.scale import Scale
from experiments.variants import MODES, mtp, mtp_d
from mtpd_jax import frontdoor
from mtpd_jax.evaluation.report import percent
from mtpd_jax.evaluation.statistics import Counts, Interval, mean_of

COUNTS = (1, 2, 4, 8, 16)

# What is published for the dense 2B model (arXiv 2603.23911): cumulative acceptance of head 3 in the training-free loop
# of one head, and speed of four heads, and of 8 and 16 looped ones, over one plain MTP head.
PAPER_PILOT = {"mtp_1": 0.006, "mtp_d_1": 0.267}
PAPER_SPEED = {4: 2.07, 8: 3.05, 16: 3.20}

PAIRS = {  # trained loop -> its training-free copy, and the heads that are new
    "loop_1_8": ("mtp_d_1", range(2, 9)),
    "loop_4_8": ("mtp_d_4", range(5, 9)),
    "loop_8_16": ("loop_4_8", range(9, 17)),
}
SIXTEEN = ("loop_8_16", "joint_16", "recurrent_16")


def variants(scale: Scale) -> list[Variant]:
    """The trained runs, which the training-free loops are decoded from, the loops, and their rivals."""
    one, four = mtp_d(1), mtp_d(4)
    loop = {"training.steps": scale.loop_steps, "evaluation.every_steps": max(1, scale.loop_steps // 6)}
    total = {"training.steps": scale.config.training.steps + 2 * scale.loop_steps, "heads.num_heads": 16}
    eight = Variant("loop_4_8", {**loop, "heads.num_heads": 8}, start=four, decode=(2, 4, 16))
    return [
        dataclasses.replace(mtp(1), decode=(8,)),
        dataclasses.replace(one, decode=(8,)),
        dataclasses.replace(four, decode=(2, 8, 16)),
        Variant("loop_1_8", {**loop, "heads.num_heads": 8}, start=one, decode=(2, 4)),
        eight,
        Variant("loop_8_16", {**loop, "heads.num_heads": 16}, start=eight, decode=COUNTS),
        Variant("joint_16", total, decode=COUNTS, seeds=(0,)),
        Variant("recurrent_16", {**total, "heads.kind": "recurrent"}, decode=COUNTS, seeds=(0,)),
    ]


def report(arms: Mapping[str, Arm], scale: Scale) -> Report:
    """Training-free against trained, the paper's pilot, the rivals, and speed by number of heads."""
    text = (
        "A training-free loop decodes with more heads than there are: depth j runs head ((j-1) mod m)+1. A trained one "
        "starts from these copies and trains them alone; all that was there stays bitwise as it is. Intervals in "
        "brackets: 95 %, paired bootstrap over seeds and then held-out texts."
    )
    parts = (_trained_against_free, _steps, _pilot, _rivals, _speed, _published_speed)
    return Report("Looped extension", text, [part(arms) for part in parts], _panels(arms))


def _trained_against_free(arms: Mapping[str, Arm]) -> Table:
    rows = []
    for name, (base, heads) in PAIRS.items():
        pair = paired(arms, name, base)
        if pair is not None:
            trained, free = pair
            for mode, label in MODES.items():
                for label_of_heads, of in {f"{heads[0]} to {heads[-1]}": heads, **{str(k): [k] for k in heads}}.items():
                    figure = _conditional(mode, trained.heads, of)
                    gained, seeds = gain(trained, free, figure)
                    before, after = (share(mean_of(figure(arm))) for arm in (free, trained))
                    cells = [points(gained), per_seed(seeds), verdict(gained, len(seeds))]
                    rows.append([name, label, label_of_heads, before, after, *cells])
                for what, figure in _totals(mode, trained.heads).items():
                    gained, seeds = gain(trained, free, figure)
                    before, after = (with_interval(mean_of(figure(arm))) for arm in (free, trained))
                    cells = [with_interval(gained, signed=True), per_seed(seeds, 1, 2), verdict(gained, len(seeds))]
                    rows.append([name, label, what, before, after, *cells])
    columns = ["loop", "decoding", "head", "training-free", "trained", "gain", "gain per seed", "better"]
    note = (
        "By head, and of the new heads together: conditional acceptance in per cent, gains in points. Few rounds come "
        "as far as the last heads, which makes their intervals wide."
    )
    return Table("Training the new heads", columns, rows, note)


def _conditional(mode: str, heads: int, of: Collection[int]) -> Callable[[Arm], Counts]:
    return lambda arm: arm.conditional_of(mode, heads, of)


def _totals(mode: str, heads: int) -> dict[str, Callable[[Arm], Counts]]:
    return {
        "tokens per pass": lambda arm: arm.tokens_per_pass(mode, heads),
        "speed over plain": lambda arm: arm.speed_over(mode, heads, 0),
    }


def _steps(arms: Mapping[str, Arm]) -> Table:
    """Held-out agreement of the new heads while they are trained."""
    rows = []
    for name, (_, heads) in PAIRS.items():
        for point in arms[name].rows[0].curve if name in arms else []:
            new = [point[f"eval/head_{k}/agreement"] for k in heads]
            old = [point[f"eval/head_{k}/agreement"] for k in range(1, heads.start)]
            cells = [percent(sum(values) / len(values)) for values in (new, old)]
            rows.append([name, str(point["step"]), *cells])
    columns = ["loop", "steps", "new heads, mean", "frozen heads, mean"]
    note = "Teacher-forced agreement on a few held-out documents, of the first seed."
    return Table("Steps needed", columns, rows, note)


def _pilot(arms: Mapping[str, Arm]) -> Table:
    rows = []
    for name, published in PAPER_PILOT.items():
        if name in arms:
            ours = [share(mean_of(arms[name].cumulative(mode, 8, 3))) for mode in ("greedy", "sampled")]
            rows.append([name, percent(published), *ours])
    columns = ["one head, looped to 8 without training", "paper", "ours, greedy, %", "ours, temperature 1, %"]
    return Table("The paper's pilot: cumulative acceptance of head 3", columns, rows)


def _rivals(arms: Mapping[str, Arm]) -> Table:
    rows = []
    present = [arms[name] for name in SIXTEEN if name in arms]
    seeds = set.intersection(*(set(arm.seeds) for arm in present)) if present else set()
    for arm in present if seeds else []:
        arm = arm.of(seeds)
        rows.append([
            arm.name, f"{arm.mean('head_parameters'):,.0f}", _flops(arms, arm.name),
            with_interval(mean_of(arm.main_ce()), digits=3),
            *(share(mean_of(arm.agreement(k))) for k in (1, 4, 16)),
            *(with_interval(mean_of(arm.tokens_per_pass(mode, 16))) for mode in ("greedy", "sampled")),
            with_interval(mean_of(arm.tokens_per_pass("sampled", 4))),
            with_interval(mean_of(arm.speed_over("sampled", 16, 0))),
        ])  # fmt: skip
    columns = ["variant", "parameters in heads", "model FLOPs", "main CE, nats", "agreement, head 1, %", "head 4, %",
               "head 16, %", "tokens per pass, greedy", "temperature 1", "with 4 heads, temperature 1",
               "speed over plain, temperature 1"]  # fmt: skip
    note = (
        f"Equal total steps, seeds {' '.join(map(str, sorted(seeds)))}. The loop's FLOPs include the run with four "
        "heads and the first loop; its trunk has been trained for fewer steps, and for four heads only."
    )
    return Table("Sixteen heads at equal total steps", columns, rows, note)


def _flops(arms: Mapping[str, Arm], name: str) -> str:
    """Model FLOPs of a run and of all that it started from; a dash where a row of these is missing."""
    chain = ["mtp_d_4", "loop_4_8", "loop_8_16"] if name == "loop_8_16" else [name]
    if not all(each in arms for each in chain):
        return "–"
    return f"{sum(arms[each].mean('training_flops') for each in chain):.3g}"


def _speed(arms: Mapping[str, Arm]) -> Table:
    rows = []
    for name in SIXTEEN:
        for count in COUNTS:
            if name in arms and arms[name].decodes(count):
                arm = arms[name]
                cells = [
                    with_interval(mean_of(figure))
                    for mode in ("greedy", "sampled")
                    for figure in (arm.tokens_per_pass(mode, count), arm.speed_over(mode, count, 0),
                                   arm.speed_over(mode, count, 1))
                ]  # fmt: skip
                rows.append([name, str(count), *cells])
    columns = ["variant", "heads", "tokens per pass, greedy", "speed over plain", "over one head",
               "tokens per pass, temperature 1", "speed over plain", "over one head"]  # fmt: skip
    note = "Wall clock, prefill included, on the device at the end of this page; one head is the variant's own first."
    return Table("Speed by number of heads", columns, rows, note)


def _published_speed(arms: Mapping[str, Arm]) -> Table:
    rows = []
    for name, count in (("mtp_d_4", 4), ("loop_4_8", 8), ("loop_8_16", 16)):
        pair = paired(arms, name, "mtp_1")
        if pair is not None and arms[name].decodes(count):
            ratios = [
                with_interval(times(*pair, figure, of_one))
                for mode in MODES
                for figure, of_one in zip(_totals(mode, count).values(), _totals(mode, 1).values(), strict=True)
            ]
            rows.append([f"{count} heads ({name})", f"{PAPER_SPEED[count]:.2f}", *ratios])
    columns = ["", "paper", "tokens per pass, greedy", "wall clock, greedy", "tokens per pass, temperature 1",
               "wall clock, temperature 1"]  # fmt: skip
    note = (
        "The paper's figure is a seven-task mean of its 2B model; whether it is wall clock or tokens per pass is not "
        "established. Our wall clock over one MTP head is the quotient of both models' speed over plain decoding."
    )
    return Table("Beside the paper: speed over one plain MTP head", columns, rows, note)


def _panels(arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    """Speed and acceptance from 1 to 16 heads."""
    shown = [name for name in SIXTEEN if name in arms]

    def by_count(figure: Callable[[Arm, int], Counts]) -> dict[str, Any]:
        return {name: line({count: mean_of(figure(arms[name], count)) for count in COUNTS}) for name in shown}

    acceptance: dict[str, dict[int, Interval]] = {
        name: {k: mean_of(arms[name].conditional("sampled", 16, k)) for k in range(1, 17)} for name in shown
    }
    for name in ("mtp_d_4", "loop_4_8"):
        if name in arms:
            looped = {k: mean_of(arms[name].conditional("sampled", 16, k)) for k in range(1, 17)}
            acceptance[f"{name}, looped without training"] = looped
    panels = {
        "tokens per pass, temperature 1": by_count(lambda arm, count: arm.tokens_per_pass("sampled", count)),
        "speed, temperature 1, wall clock": by_count(lambda arm, count: arm.speed_over("sampled", count, 0)),
    }
    units = {"tokens per pass, temperature 1": "tokens", "speed, temperature 1, wall clock": "times plain"}
    drawn = [
        {"title": title, "x": "heads", "y": units[title], "lines": lines, "log": "x"} for title, lines in panels.items()
    ]
    lines = {name: line(points, 100) for name, points in acceptance.items()}
    title = "conditional acceptance, temperature 1"
    return [*drawn, {"title": title, "x": "head", "y": "%", "lines": lines}]


EXPERIMENT = Experiment("looped", variants, report)

if __name__ == "__main__":
    frontdoor.guarded(lambda: main(EXPERIMENT, __doc__))
