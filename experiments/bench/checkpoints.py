"""How much training it takes until drafting pays: every checkpoint that a run has kept, decoded in wall clock.

``python -m experiments.bench.checkpoints --workdir=DIR --prompts=FILE`` decodes the same prompts with the model of
every checkpoint, with all its heads and plainly in turn, one prompt at a time. A run keeps as many checkpoints as
``checkpoint.keep`` says.
"""

import sys
from collections.abc import Mapping
from typing import Any

import rich.console
import rich.table

from experiments.environment import environment
from experiments.figures import curves
from mtpd_jax import evaluate, frontdoor
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.evaluation.decoding import DecodingScore
from mtpd_jax.evaluation.report import bounded, new_table, write_json
from mtpd_jax.runs.choice import steps_of
from mtpd_jax.runs.workdir import open_workdir

_MODES = {"greedy": Sampling(), "sampled": Sampling(1.0)}


def measure(workdir: str, prompts: str, limit: int | None, new_tokens: int) -> list[dict[str, Any]]:
    """One row per checkpoint and mode of decoding, oldest first.

    Args:
      workdir: of the run.
      prompts, limit, new_tokens: see ``evaluate.run``.

    Raises:
      ValueError: bad workdir or prompts; or no checkpoint is there.
    """
    folder = open_workdir(workdir)
    config, rows = folder.read_config(), []
    steps, per_step = sorted(steps_of(folder)), config.training.batch_size * config.training.sequence_length
    if not steps:
        raise ValueError(f"{folder.checkpoints}: holds no complete checkpoint")
    heads = config.heads.num_heads
    for step in steps:
        for mode, sampling in _MODES.items():
            report = evaluate.run(
                workdir, prompts=prompts, limit=limit, heads=[heads], max_new_tokens=new_tokens, sampling=sampling,
                checkpoint=step,
            )  # fmt: skip
            score = report.decoding[prompts].heads[str(heads)]
            rows.append({"step": step, "tokens": step * per_step, "mode": mode, "heads": heads, **_figures(score)})
    return rows


def _figures(score: DecodingScore) -> Mapping[str, Any]:
    return {
        "tokens_per_pass": score.tokens_per_pass,
        "speedup_over_plain": score.speedup_over_plain,
        "identical": score.identical,
        "prompts": score.prompts,
    }


def table(rows: list[dict[str, Any]]) -> rich.table.Table:
    """The rows, for people."""
    columns = ("step", "tokens", "decoding", "tokens/pass", "x plain", "same")
    made = new_table(f"{rows[0]['prompts']} prompts, all heads, ± 95 %", columns)
    for row in rows:
        same = {None: "–", True: "yes", False: "NO"}[row["identical"]]
        figures = bounded(row["tokens_per_pass"]), bounded(row["speedup_over_plain"])
        made.add_row(str(row["step"]), f"{row['tokens']:,}", row["mode"], *figures, same)
    return made


def panels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both figures over the tokens of training."""
    return [
        {
            "title": title, "x": "tokens of training", "y": title, "log": "x",
            "lines": {
                mode: [(row["tokens"], row[name].mean, row[name].low, row[name].high) for row in rows
                       if row["mode"] == mode and row["tokens"]]
                for mode in _MODES
            },
        }
        for name, title in (("tokens_per_pass", "tokens per pass"), ("speedup_over_plain", "times plain, wall clock"))
    ]  # fmt: skip


def main(arguments: list[str]) -> int:
    """Parses flags, measures, prints the table, draws the curve, and writes JSON."""
    parser = frontdoor.Parser(prog="python -m experiments.bench.checkpoints", description=__doc__)
    parser.add_argument("--workdir", required=True, help="a trained run, with its checkpoints")
    parser.add_argument("--prompts", required=True, help='JSON lines with a field "prompt"')
    parser.add_argument("--limit", type=int, help="of prompts")
    parser.add_argument("--max_new_tokens", type=int, default=96, help="per prompt (default: 96)")
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--figure", help="draw the curve here")
    flags = parser.parse_args(arguments)
    frontdoor.check_output_path(flags.json)
    rows = measure(flags.workdir, flags.prompts, flags.limit, flags.max_new_tokens)
    rich.console.Console().print(table(rows))
    if flags.figure:
        curves(flags.figure, panels(rows))
    if flags.json:
        plain = [
            {**row, **{name: vars(row[name]) for name in ("tokens_per_pass", "speedup_over_plain")}} for row in rows
        ]
        write_json(flags.json, {"environment": environment(), "rows": plain})
    return 0


if __name__ == "__main__":
    frontdoor.guarded(lambda: main(sys.argv[1:]))
