"""How many heads: what joint training costs the main head, the throughput and the memory (the "seesaw").

``python -m experiments.head_count --scale=cpu --workdir=DIR``: MTP-D with 0, 1, 2, 4 and 8 heads at equal steps, and
what a training step of each costs, measured in turn (``experiments.bench.training``).
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.sweep.arms import Arm, gain, paired
from experiments.sweep.experiment import Experiment, main
from experiments.sweep.report import Report, Table, line, per_seed, share, with_interval
from experiments.sweep.runner import RESULTS
from experiments.sweep.runs import Variant
from experiments.sweep.scale import Scale
from experiments.variants import mtp_d, next_token
from mtpd_jax import frontdoor
from mtpd_jax.evaluation.statistics import mean_of

NUMBERS = (0, 1, 2, 4, 8)


def variants(scale: Scale) -> list[Variant]:
    """Next-token prediction, and MTP-D with every number of heads."""
    return [next_token() if number == 0 else mtp_d(number) for number in NUMBERS]


def report(arms: Mapping[str, Arm], scale: Scale) -> Report:
    """The main head's loss, what decoding gains, and costs, by number of heads."""
    text = (
        "Equal steps, tokens and data for every number of heads. Intervals in brackets: 95 %, paired bootstrap over "
        "seeds and then held-out texts."
    )
    by_heads = {arm.heads: arm for arm in arms.values()}
    against = {heads: paired(arms, arm.name, "ntp") for heads, arm in by_heads.items() if heads}
    tables = [
        _table(by_heads, against),
        _training_costs(by_heads),
        _step_costs(RESULTS / "bench" / f"training_{scale.name}.json"),
    ]
    return Report("How many heads", text, tables, _panels(by_heads))


def _table(by_heads: Mapping[int, Arm], against: Mapping[int, tuple[Arm, Arm] | None]) -> Table:
    rows = []
    for heads, arm in sorted(by_heads.items()):
        pair = against.get(heads)
        cost, seeds = (None, []) if pair is None else gain(*pair, Arm.main_ce)
        decoded = ["–"] * 4
        if heads:
            decoded = [
                share(mean_of(arm.agreement(1))),
                share(mean_of(arm.agreement(heads))),
                with_interval(mean_of(arm.tokens_per_pass("sampled", heads))),
                with_interval(mean_of(arm.speed_over("sampled", heads, 0))),
            ]
        rows.append([
            str(heads), with_interval(mean_of(arm.main_ce()), digits=3),
            "–" if cost is None else with_interval(cost, digits=3, signed=True),
            "–" if cost is None else per_seed(seeds, 1, 3), *decoded,
        ])  # fmt: skip
    columns = ["K", "main CE, nats", "against K = 0", "per seed", "agreement, head 1, %", "agreement, head K, %",
               "tokens per pass, temperature 1", "speed over plain"]  # fmt: skip
    return Table("The main head, and what decoding gains", columns, rows)


def _training_costs(by_heads: Mapping[int, Arm]) -> Table:
    plain = by_heads.get(0)
    rows = [
        [
            str(heads), f"{arm.mean('parameters'):,.0f}", f"{arm.mean('head_parameters'):,.0f}",
            f"{arm.mean('training_flops'):.3g}",
            "–" if plain is None else f"{arm.mean('training_flops') / plain.mean('training_flops'):.2f}",
        ]
        for heads, arm in sorted(by_heads.items())
    ]  # fmt: skip
    columns = ["K", "parameters", "of them in heads", "model FLOPs of the run", "times K = 0"]
    return Table("What the runs cost", columns, rows)


def _step_costs(measured: pathlib.Path) -> Table:
    """Throughput and memory of a step, from the benchmark's JSON; no rows where it has not been run."""
    found = json.loads(measured.read_text())["rows"] if measured.exists() else []
    rows = [
        [
            row["case"], f"{row['tokens'] / row['seconds']:,.0f}", f"{row['over_first']:.2f}",
            f"{row['model_flops'] / found[0]['model_flops']:.2f}", f"{row['temp_bytes'] / 1e6:,.0f}",
            f"{row['state_bytes'] / 1e6:,.0f}",
        ]
        for row in found
    ]  # fmt: skip
    first = found[0]["case"] if found else ""
    columns = ["heads", "tokens per second", f"time, times {first}", f"model FLOPs, times {first}", "temporary MB",
               "state MB"]  # fmt: skip
    note = (
        "Medians of steps taken in turn, in one process: `python -m experiments.bench.training` "
        f"([{measured.name}](../bench/{measured.name}))."
    )
    return Table("What a training step costs", columns, rows, note)


def _panels(by_heads: Mapping[int, Arm]) -> list[dict[str, Any]]:
    figures = {
        "main head": ("CE, nats", Arm.main_ce),
        "decoding at temperature 1": ("tokens per pass", lambda arm: arm.tokens_per_pass("sampled", arm.heads)),
        "decoding at temperature 1, wall clock": ("times plain", lambda arm: arm.speed_over("sampled", arm.heads, 0)),
    }
    return [
        {"title": title, "x": "heads", "y": unit,
         "lines": {"MTP-D": line({heads: mean_of(figure(arm)) for heads, arm in by_heads.items()})}}
        for title, (unit, figure) in figures.items()
    ]  # fmt: skip


EXPERIMENT = Experiment("head_count", variants, report, seeds=(0, 1))

if __name__ == "__main__":
    frontdoor.guarded(lambda: main(EXPERIMENT, __doc__))
