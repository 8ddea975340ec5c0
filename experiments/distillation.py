"""Plain MTP against MTP-D at equal steps (MTP-D, Table 1).

``python -m experiments.distillation --scale=cpu --workdir=DIR``: acceptance in real decoding on held-out texts,
teacher-forced agreement beside it, and what both cost the main head.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments.sweep.arms import Arm, gain, paired, times
from experiments.sweep.experiment import Experiment, main
from experiments.sweep.report import Report, Table, line, per_seed, points, share, verdict, with_interval
from experiments.sweep.runs import Variant
from experiments.sweep.scale import Scale
from experiments.variants import MODES, mtp, mtp_d
from mtpd_jax import frontdoor
from mtpd_jax.evaluation.report import percent
from mtpd_jax.evaluation.statistics import Counts, difference, mean_of

HEADS = (1, 4)

# Published for the dense 2B model: per cent with MTP and with MTP-D (arXiv 2603.23911).
PAPER = {
    "1 head: conditional acceptance of head 1 (AGIEval-en)": (1, "conditional", 85.75, 88.98),
    "4 heads: conditional acceptance of head 4": (4, "conditional", 83.77, 86.46),
    "4 heads: cumulative acceptance of head 4": (4, "cumulative", 45.47, 52.96),
}
# Speed of four heads of MTP-D over four of MTP; whether in wall clock or in tokens per pass is not established.
PAPER_SPEED = 1.23


def variants(scale: Scale) -> list[Variant]:
    """Both objectives, with four heads and with one."""
    return [make(heads) for heads in sorted(HEADS, reverse=True) for make in (mtp, mtp_d)]


def report(arms: Mapping[str, Arm], scale: Scale) -> Report:
    """Agreement, acceptance, costs and speed of both, and the published figures beside them."""
    found = {heads: paired(arms, f"mtp_d_{heads}", f"mtp_{heads}") for heads in HEADS}
    pairs = {heads: pair for heads, pair in found.items() if pair is not None}
    text = (
        "The same model, data, seeds and steps; MTP-D adds the KL from the main head. Intervals in brackets: 95 %, "
        "paired bootstrap over seeds and then held-out texts (2,000 resamples); with so few seeds they tend to be too "
        "narrow, so the difference of every seed stands beside them. Shares in per cent, differences in points."
    )
    tables = [_by_head(pairs), _costs(pairs), _published(pairs)]
    tables += [_decay(*pairs[4])] if 4 in pairs else []
    return Report("Plain MTP against MTP-D", text, tables, _panels(*pairs[4]) if 4 in pairs else [])


def figures_by_head(heads: int) -> Iterator[tuple[str, int, Callable[[Arm], Counts]]]:
    """(what, head, figure) for agreement and for acceptance in both modes of decoding."""
    for k in range(1, heads + 1):
        yield "agreement, teacher-forced", k, lambda arm, k=k: arm.agreement(k)
    for mode, label in MODES.items():
        for k in range(1, heads + 1):
            yield f"conditional, {label}", k, lambda arm, k=k, mode=mode: arm.conditional(mode, heads, k)
        for k in range(2, heads + 1):
            yield f"cumulative, {label}", k, lambda arm, k=k, mode=mode: arm.cumulative(mode, heads, k)


def _by_head(pairs: Mapping[int, tuple[Arm, Arm]]) -> Table:
    rows = []
    for heads, (distilled, plain) in pairs.items():
        for what, k, figure in figures_by_head(heads):
            gained, seeds = gain(distilled, plain, figure)
            before, after = (share(mean_of(figure(arm))) for arm in (plain, distilled))
            found = [points(gained), per_seed(seeds), verdict(gained, len(seeds))]
            rows.append([str(heads), what, str(k), before, after, *found])
    columns = ["K", "figure", "head", "MTP", "MTP-D", "gain", "gain per seed", "better"]
    note = "Cumulative acceptance of head 1 is its conditional one. Texts and prompts are the same in both arms."
    return Table("Agreement and acceptance, head by head", columns, rows, note)


def _costs(pairs: Mapping[int, tuple[Arm, Arm]]) -> Table:
    rows = []
    for heads, (distilled, plain) in pairs.items():
        cost, seeds = gain(distilled, plain, Arm.main_ce)
        values = [with_interval(mean_of(arm.main_ce()), digits=3) for arm in (plain, distilled)]
        found = [with_interval(cost, digits=3, signed=True), per_seed(seeds, 1, 3)]
        rows.append([str(heads), "main head, CE in nats per token", *values, *found])
        for mode, label in MODES.items():
            shares = [percent(arm.distinct_4grams(mode)) for arm in (plain, distilled)]
            rows.append([str(heads), f"distinct 4-grams, {label}", *shares, "–", "–"])
            for what, figure in _decoded(mode, heads):
                values = [with_interval(mean_of(figure(arm))) for arm in (plain, distilled)]
                ratio = f"{with_interval(times(distilled, plain, figure))} times"
                seeds = per_seed(gain(distilled, plain, figure)[1], 1, 2)
                rows.append([str(heads), f"{what}, {label}", *values, ratio, seeds])
    columns = ["K", "figure", "MTP", "MTP-D", "MTP-D against MTP", "difference per seed"]
    note = (
        "Speed is wall clock, prefill included, against plain decoding of the same prompts in turn. Where a model is "
        "small, its heads are a large part of it, and a round with four of them may cost more than it brings. Tokens "
        "per pass do not depend on the machine. Repetitive text is easy to draft: see the share of distinct 4-grams."
    )
    return Table("What it costs, and the speed", columns, rows, note)


def _decoded(mode: str, heads: int) -> list[tuple[str, Callable[[Arm], Counts]]]:
    return [
        ("tokens per pass", lambda arm: arm.tokens_per_pass(mode, heads)),
        ("speed over plain", lambda arm: arm.speed_over(mode, heads, 0)),
        *([("speed over one head", lambda arm: arm.speed_over(mode, heads, 1))] if heads > 1 else []),
    ]


def _published(pairs: Mapping[int, tuple[Arm, Arm]]) -> Table:
    rows = []
    for what, (heads, kind, *published) in PAPER.items():
        if heads in pairs:
            for mode, label in MODES.items():
                distilled, plain = pairs[heads]
                values = [mean_of(getattr(arm, kind)(mode, heads, heads)).mean for arm in (plain, distilled)]
                ours = " → ".join(map(percent, values))
                rows.append([what, " → ".join(f"{value:.1f} %" for value in published), f"{label}: {ours}"])
    if 4 in pairs:
        for mode, label in MODES.items():
            passes, speed = (with_interval(times(*pairs[4], figure)) for _, figure in _decoded(mode, 4)[:2])
            ours = f"{label}: {speed} times in wall clock, {passes} in tokens per pass"
            rows.append(["4 heads: MTP-D's speed over MTP's", f"{PAPER_SPEED:.2f} times", ours])
    arm = pairs[max(pairs)][0] if pairs else None
    size = "" if arm is None else f"{arm.mean('parameters'):,.0f} parameters after {arm.mean('tokens'):,.0f} tokens"
    note = (
        "Published: a dense model of 2B parameters after 350B tokens of FineWeb-Edu, on benchmarks. Ours: a model of "
        f"{size} of Python source, on held-out files. The sizes of gains are not comparable; their signs are."
    )
    return Table("Beside the paper: MTP → MTP-D", ["figure", "paper", "ours"], rows, note)


def _decay(distilled: Arm, plain: Arm) -> Table:
    """How much the first head is ahead of the last."""
    figures: dict[str, Callable[[Arm, int], Counts]] = {
        "agreement, teacher-forced on held-out text": Arm.agreement,
        "agreement, teacher-forced on greedy output": lambda arm, k: arm.agreement_on_output("greedy", k),
        "conditional acceptance, greedy": lambda arm, k: arm.conditional("greedy", 4, k),
        "agreement, teacher-forced on output at temperature 1": lambda arm, k: arm.agreement_on_output("sampled", k),
        "conditional acceptance, temperature 1": lambda arm, k: arm.conditional("sampled", 4, k),
    }
    rows = [
        [what, *(points(difference(figure(arm, 1), figure(arm, 4))[0]) for arm in (plain, distilled))]
        for what, figure in figures.items()
    ]
    return Table("Does a head's index matter? Head 1 minus head 4", ["figure", "MTP", "MTP-D"], rows)


def _panels(distilled: Arm, plain: Arm) -> list[dict[str, Any]]:
    """Agreement, conditional and cumulative acceptance by head, with what is published of them."""
    heads = range(1, 5)
    kinds: dict[str, Callable[[Arm, int], Counts]] = {
        "agreement, teacher-forced, held out": Arm.agreement,
        "conditional acceptance, temperature 1": lambda arm, k: arm.conditional("sampled", 4, k),
        "cumulative acceptance, temperature 1": lambda arm, k: arm.cumulative("sampled", 4, k),
    }
    panels = []
    for title, figure in kinds.items():
        lines: dict[str, Any] = {
            label: line({k: mean_of(figure(arm, k)) for k in heads}, 100)
            for label, arm in (("MTP, ours", plain), ("MTP-D, ours", distilled))
        }
        for published, kind, *values in PAPER.values():
            if title.startswith(kind) and published == 4:
                lines |= {
                    f"{name}, 2B (paper)": [(4, value)] for name, value in zip(("MTP", "MTP-D"), values, strict=True)
                }
        panels.append({"title": title, "x": "head", "y": "%", "lines": lines})
    return panels


EXPERIMENT = Experiment("distillation", variants, report)

if __name__ == "__main__":
    frontdoor.guarded(lambda: main(EXPERIMENT, __doc__))
