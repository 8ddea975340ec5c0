"""What a decoding round costs, part by part, and the speed model made of it.

Without ``--workdir``, models of ``--sizes`` with parameters drawn at random: costs do not depend on them. ``floor`` is
the bare products of a round, written out one after the other; ``x plain`` is what a round costs in plain steps, and so
the tokens per pass from which drafting pays.

With ``--workdir`` and ``--prompts``, a trained run: the same costs, the acceptance of its heads on these prompts, the
tokens per second that both predict, and those measured, for every number of heads and every batch size.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import rich.console
import rich.table

from experiments.bench.decode_costs import LAYOUTS, Study, Subject, measure, random_subject
from experiments.environment import environment
from experiments.figures import curves
from mtpd_jax import frontdoor
from mtpd_jax.data.chat import Prompt
from mtpd_jax.data.prompts import prompts_of
from mtpd_jax.decoding.drafters.drafter import heads_that_draft
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.sampling import GREEDY, Sampling
from mtpd_jax.evaluation.acceptance import acceptance_of, tokens_per_pass
from mtpd_jax.evaluation.decoding import decode_prompts, prompts_per_call, ways_of
from mtpd_jax.evaluation.report import new_table, number, write_json
from mtpd_jax.evaluation.speed import RoundCosts, best_heads, rounds_of_queue, unprofitable_batch
from mtpd_jax.run import Run
from mtpd_jax.runs.opening import load_run
from mtpd_jax.sharding import data_mesh


def rounds_table(name: str, rows: Sequence[dict[str, Any]]) -> rich.table.Table:
    """Whole rounds beside their parts, in microseconds."""
    columns = ("batch", "heads", "round", "x plain", "verify", "draft", "loop etc.", "floor", "x floor")
    table = new_table(f"{name}: microseconds per round", columns)
    cost = {(row["batch"], row["part"], row.get("heads", row.get("width"))): row["seconds"] for row in rows}
    for row in rows:
        if row["part"] != "round":
            continue
        batch, heads, seconds = row["batch"], row["heads"], row["seconds"]
        verify, floor = cost.get((batch, "verify", heads + 1)), cost.get((batch, "products", heads))
        draft, loop = cost.get((batch, "draft", heads), 0.0), cost[batch, "bookkeeping", heads]
        micro = (None if part is None else 1e6 * part for part in (verify, draft, loop, floor))
        table.add_row(
            str(batch), str(heads), number(1e6 * seconds, 0), number(row["over_plain"]),
            *(number(part, 0) for part in micro), number(None if floor is None else seconds / floor),
        )  # fmt: skip
    return table


def verify_table(name: str, rows: Sequence[dict[str, Any]], widths: Sequence[int]) -> rich.table.Table:
    """Passes of the backbone by width and batch, in microseconds."""
    verify = {(row["batch"], row["width"]): row["seconds"] for row in rows if row["part"] == "verify"}
    batches = sorted({batch for batch, _ in verify})
    table = new_table(f"{name}: microseconds per verify pass", ("width", *(f"batch {batch}" for batch in batches)))
    for width in widths:
        table.add_row(str(width), *(number(1e6 * verify[batch, width], 0) for batch in batches))
    return table


def predict(
    opened: Run, costs: Sequence[RoundCosts], prompts: Sequence[Prompt], sampling: Sampling, flags: Any
) -> tuple[list[dict[str, Any]], list[float]]:
    """Decodes the prompts in every way at every batch size, and puts the prediction beside it.

    Measured tokens per second leave prefill out: its time, from runs that write one token, is subtracted. Predicted
    are the rounds that the prompts take behind each other, from their own passes, at what a round costs.

    Returns:
      One row per batch size and way, and the cumulative acceptance of all heads.
    """
    decoder = opened.decoder
    ids = [opened.encode(prompt) for prompt in prompts]
    numbers, cumulative, found = (0, *flags.heads), [], []
    for cost in costs:
        batch = cost.rows
        taken = ids[: max(batch, flags.limit)]
        full, first = (
            ways_of(Options(0, tokens, sampling), numbers, flags.drafters) for tokens in (flags.max_new_tokens, 1)
        )
        decode_prompts(decoder, taken[: prompts_per_call(batch)], full, batch_size=batch, seed=0)  # compiles
        decoded, prefilled = (decode_prompts(decoder, taken, ways, batch_size=batch, seed=0) for ways in (full, first))
        if not cumulative and max(numbers) in decoded:
            cumulative = [rate or 0.0 for rate in acceptance_of(decoded[max(numbers)]).cumulative]
        for name, options in full.items():
            tokens = sum(len(continuation.tokens) - 1 for continuation in decoded[name])
            seconds = sum(a.seconds - b.seconds for a, b in zip(decoded[name], prefilled[name], strict=True))
            rounds = rounds_of([one.passes for one in decoded[name]], batch)
            found.append(
                {
                    "batch": batch,
                    "part": "decoding",
                    "temperature": sampling.temperature,
                    "drafter": options.drafter,
                    "heads": options.num_drafts,
                    "prompts": len(taken),
                    "tokens_per_pass": tokens_per_pass(decoded[name]).mean,
                    "predicted": tokens / (rounds * cost.seconds(options.num_drafts, heads_that_draft(options))),
                    "measured": tokens / seconds,
                }
            )
    return found, cumulative


def rounds_of(passes: Sequence[int], batch: int) -> int:
    """Rounds of all calls together, from the passes of each prompt."""
    step = prompts_per_call(batch)
    return sum(rounds_of_queue(passes[start : start + step], batch) for start in range(0, len(passes), step))


def kind_of(temperature: float) -> str:
    """How decoding at this temperature is called."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def prediction_table(rows: Sequence[dict[str, Any]]) -> rich.table.Table:
    """Predicted beside measured tokens per second."""
    kind = kind_of(rows[0]["temperature"])
    columns = "batch", "drafts", "tokens/pass", "predicted", "measured", "x plain, predicted", "x plain, measured"
    table = new_table(f"tokens per second, {kind}, prefill left out", columns)
    plain = {row["batch"]: row for row in rows if row["heads"] == 0}
    for row in rows:
        beside = plain[row["batch"]]
        table.add_row(
            str(row["batch"]), f"{row['drafter']} {row['heads']}", number(row["tokens_per_pass"]),
            number(row["predicted"], 0), number(row["measured"], 0),
            number(row["predicted"] / beside["predicted"]), number(row["measured"] / beside["measured"]),
        )  # fmt: skip
    return table


def draw(path: str, rows: Sequence[dict[str, Any]], predictions: Sequence[dict[str, Any]]) -> None:
    """Cost by width, break-even by heads, and speed-up predicted and measured."""
    names = sorted({(row["model"], row["batch"]) for row in rows})

    def lines(part: str, count: str, value: str, scale: float) -> dict[str, list[tuple[float, float]]]:
        return {
            f"{name}, batch {batch}": [
                (row[count], scale * row[value])
                for row in rows
                if (row["model"], row["batch"], row["part"]) == (name, batch, part)
            ]
            for name, batch in names
        }

    panels: list[dict[str, Any]] = [
        {"title": "verify pass", "x": "tokens per pass", "y": "microseconds", "log": "xy",
         "lines": lines("verify", "width", "seconds", 1e6)},
        {"title": "tokens per pass to break even", "x": "heads", "y": "round / plain step",
         "lines": lines("round", "heads", "over_plain", 1.0)},
    ]  # fmt: skip
    plain = {(row["temperature"], row["batch"]): row for row in predictions if row["heads"] == 0}
    for temperature in sorted({row["temperature"] for row in predictions}):
        chosen = [row for row in predictions if row["temperature"] == temperature]
        panels.append(
            {
                "title": kind_of(temperature),
                "x": "drafts",
                "y": "speed-up over plain",
                "lines": {
                    f"{kind}, {drafter}, batch {batch}": [
                        (row["heads"], row[kind] / plain[temperature, batch][kind])
                        for row in chosen
                        if (row["batch"], row["drafter"]) == (batch, drafter)
                    ]
                    for drafter, batch in sorted({(row["drafter"], row["batch"]) for row in chosen})
                    for kind in ("predicted", "measured")
                },
            }
        )
    curves(path, panels)


def trained_run(flags: argparse.Namespace) -> tuple[Run | None, Sequence[Prompt]]:
    """The run to measure, on one device, as all costs here are of one; and its prompts. None without ``--workdir``.

    Raises:
      ValueError: one flag without the other, or fewer prompts than a batch holds.
    """
    if (flags.workdir is None) != (flags.prompts is None):
        raise ValueError("--workdir and --prompts belong together")
    if flags.workdir is None:
        return None, []
    prompts = prompts_of(flags.prompts)
    if max(flags.batches) > len(prompts):
        raise ValueError(f"--batches={max(flags.batches)}: expected at most the {len(prompts)} prompts of --prompts")
    return on_one_device(flags.workdir), prompts


def on_one_device(workdir: str) -> Run:
    """Opens a run on one device."""
    trained, mesh = load_run(workdir), data_mesh(jax.devices()[:1])
    parameters = jax.device_put(trained.parameters, mesh.devices.flat[0])
    return Run(dataclasses.replace(trained, parameters=parameters, mesh=mesh))


def main(arguments: list[str]) -> int:
    """Parses flags, measures, prints tables, and writes JSON and picture."""
    parser = frontdoor.Parser(prog="python -m experiments.bench.decode", description=__doc__)
    parser.add_argument("--sizes", default="256x24,256x12,128x12", help="WIDTHxLAYERS of models (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=2048, help="V, with --sizes (default: 2048)")
    parser.add_argument("--heads", type=frontdoor.integers, default=[1, 2, 4], help="numbers of heads (default: 1,2,4)")
    parser.add_argument("--widths", type=frontdoor.integers, default=[1, 2, 3, 5, 9, 17], help="tokens per verify pass")
    parser.add_argument("--batches", type=frontdoor.integers, default=[1], help="prompts together (default: 1)")
    parser.add_argument("--new_tokens", type=int, default=128, help="room after a prompt of 64 tokens (default: 128)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of measuring (default: 9)")
    parser.add_argument("--workdir", help="a trained run, measured instead of --sizes")
    parser.add_argument("--prompts", help='with --workdir: JSON lines with a field "prompt" to decode')
    parser.add_argument("--drafters", type=frontdoor.names, default=["heads"], help="with --workdir: who drafts")
    parser.add_argument("--limit", type=int, default=24, help="prompts, but at least one batch (default: 24)")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="of the prompts' decoding (default: 128)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampled decoding (default: 1)")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="chosen", help="of the layers (default: chosen)")
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--plot", help="draw costs and speed-ups here (.png, .svg)")
    flags = parser.parse_args(arguments)
    for name in ("heads", "widths", "batches"):
        if min(getattr(flags, name)) < 1:
            raise ValueError(f"--{name}={getattr(flags, name)}: expected numbers from 1 up")
    frontdoor.check_output_path(flags.json)
    opened, prompts = trained_run(flags)
    if opened:
        subjects = [Subject(pathlib.Path(flags.workdir).name, opened.trained.model, opened.parameters)]
    else:
        most = max(flags.heads)
        subjects = [random_subject(size, flags.vocabulary, most) for size in flags.sizes.split(",")]
    study = Study(flags.heads, flags.widths, new_tokens=flags.new_tokens, layout=flags.layout, repeats=flags.repeats)
    console = rich.console.Console()
    rows, predictions, summary = [], [], {}
    for subject in subjects:
        measured = [measure(subject, batch, study) for batch in flags.batches]
        found = [row for part, _ in measured for row in part]
        rows += found
        console.print(rounds_table(subject.name, found))
        console.print(verify_table(subject.name, found, flags.widths))
        if opened:
            costs = [cost for _, cost in measured]
            for sampling in (GREEDY, Sampling(flags.temperature)):
                beside, cumulative = predict(opened, costs, prompts, sampling, flags)
                predictions += beside
                console.print(prediction_table(beside))
                best = {cost.rows: best_heads(cost, cumulative) for cost in costs}
                stops = unprofitable_batch(costs, cumulative)
                kind = kind_of(sampling.temperature)
                console.print(f"{kind}: fastest number of heads by batch: {best}; drafting stops paying at {stops}")
                summary[kind] = {"best_heads": best, "unprofitable_batch": stops}
    if flags.json:
        write_json(
            flags.json,
            {"environment": environment(), "rows": rows, "decoding": predictions, "summary": summary},
        )
    if flags.plot:
        draw(flags.plot, rows, predictions)
    return 0


if __name__ == "__main__":
    frontdoor.guarded(lambda: main(sys.argv[1:]))
