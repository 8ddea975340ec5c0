"""Many prompts of unequal length, a few at a time: batches that wait for their longest, or rows that are refilled.

``python -m experiments.bench.throughput --workdir=DIR --prompts=FILE`` decodes prompts cut to 8 to 96 tokens, both ways
in turn, and puts beside it what the speed model says: prefill as measured, and the rounds that the prompts' passes come
to (``evaluation/speed.py``), each at what a round costs.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.progress
import rich.table

from experiments.bench.decode import on_one_device
from experiments.bench.decode_costs import Study, Subject
from experiments.bench.decode_costs import measure as measure_costs
from experiments.environment import environment
from mtpd_jax import frontdoor
from mtpd_jax.data.prompts import prompts_of
from mtpd_jax.decoding.decoder import Continuation, Decoder
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.sampling import GREEDY, Sampling
from mtpd_jax.evaluation.report import new_table, number, write_json
from mtpd_jax.evaluation.speed import RoundCosts, rounds_of_batches, rounds_of_queue
from mtpd_jax.run import Run

_SHORTEST, _LONGEST = 8, 96
# How rounds add up, by the name of the way.
_ROUNDS: dict[str, Callable[[Sequence[int], int], int]] = {"batches": rounds_of_batches, "refilled": rounds_of_queue}


def unequal_prompts(opened: Run, path: str, count: int) -> list[np.ndarray]:
    """The beginnings of the first prompts of a file that are long enough, of lengths drawn from a seed.

    Raises:
      ValueError: there are too few.
    """
    texts = [opened.encode(prompt) for prompt in prompts_of(path)]
    whole = [ids for ids in texts if len(ids) >= _LONGEST][:count]
    if len(whole) < count:
        raise ValueError(f"--prompts={path}: {len(whole)} prompts of at least {_LONGEST} tokens; expected {count}")
    lengths = np.random.default_rng(0).integers(_SHORTEST, _LONGEST + 1, count)
    return [ids[:length] for ids, length in zip(whole, lengths, strict=True)]


def decode(decoder: Decoder, prompts: Sequence[np.ndarray], options: Options, batch: int, way: str) -> Any:
    """Decodes all prompts one of the ways: continuations, and seconds without compilation."""
    if way == "refilled":
        found = decoder.run(prompts, options, rows=batch)
    else:
        found = []
        for start in range(0, len(prompts), batch):
            found += decoder.run(prompts[start : start + batch], options, first_row=start)
    return found, sum(one.seconds for one in found)


def measure(opened: Run, prompts: Sequence[np.ndarray], costs: RoundCosts, flags: argparse.Namespace) -> list[Any]:
    """Every number of heads, both ways in turn, beside the prediction."""
    sampling = GREEDY if flags.temperature == 0 else Sampling(flags.temperature)
    cases = [(heads, way) for heads in (0, *flags.heads) for way in _ROUNDS]
    whole: dict[Any, list[float]] = {case: [] for case in cases}
    prefill: dict[Any, list[float]] = {case: [] for case in cases}
    texts: dict[Any, list[Continuation]] = {}
    turns = [(turn, case) for turn in range(-1, flags.repeats) for case in cases]  # the first compiles
    for turn, (heads, way) in rich.progress.track(turns, "decoding", console=rich.console.Console(stderr=True)):
        for taken, tokens in ((whole, flags.max_new_tokens), (prefill, 1)):
            options = Options(heads, tokens, sampling)
            found, seconds = decode(opened.decoder, prompts, options, flags.batch, way)
            if turn >= 0:
                taken[heads, way].append(seconds)
            if tokens > 1:
                texts[heads, way] = found
    rows = []
    for heads, way in cases:
        found = texts[heads, way]
        rounds = _ROUNDS[way]([one.passes for one in found], flags.batch)
        seconds, reading = (statistics.median(taken[heads, way]) for taken in (whole, prefill))
        rows.append(
            {
                "heads": heads,
                "way": way,
                "batch": flags.batch,
                "prompts": len(prompts),
                "temperature": flags.temperature,
                "tokens": sum(len(one.tokens) for one in found),
                "passes": sum(one.passes for one in found),
                "rounds": rounds,
                "seconds": seconds,
                "seconds_min": min(whole[heads, way]),
                "seconds_max": max(whole[heads, way]),
                "prefill_seconds": reading,
                "predicted_seconds": reading + rounds * costs.seconds(heads),
                "same_text": [one.tokens for one in found] == [one.tokens for one in texts[heads, "batches"]],
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> rich.table.Table:
    """Both ways beside each other."""
    first = rows[0]
    title = f"{first['prompts']} prompts, {first['batch']} at a time, temperature {first['temperature']:g}"
    columns = ("heads", "way", "rounds", "s", "expected s", "tokens/s", "x batches", "expected", "x plain")
    made = new_table(title, columns)
    by_case = {(row["heads"], row["way"]): row for row in rows}
    for row in rows:
        beside, plain = by_case[row["heads"], "batches"], by_case[0, row["way"]]
        made.add_row(
            str(row["heads"]), row["way"], str(row["rounds"]), number(row["seconds"], 1),
            number(row["predicted_seconds"], 1), number(row["tokens"] / row["seconds"], 0),
            number(beside["seconds"] / row["seconds"]),
            number(beside["predicted_seconds"] / row["predicted_seconds"]),
            number(plain["seconds"] / row["seconds"]),
        )  # fmt: skip
    return made


def main(arguments: list[str]) -> int:
    """Parses flags, measures, prints the table, and writes JSON."""
    parser = frontdoor.Parser(prog="python -m experiments.bench.throughput", description=__doc__)
    parser.add_argument("--workdir", required=True, help="a trained run")
    parser.add_argument("--prompts", required=True, help='JSON lines with a field "prompt"')
    parser.add_argument("--number", type=int, default=256, help="of prompts (default: 256)")
    parser.add_argument("--batch", type=int, default=16, help="decoded together (default: 16)")
    parser.add_argument("--heads", type=frontdoor.integers, default=[2, 4], help="beside none (default: 2,4)")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="per prompt (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="(default: 0)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of measuring (default: 3)")
    parser.add_argument("--json", help="write the rows here")
    flags = parser.parse_args(arguments)
    for name in ("number", "batch", "repeats"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name}={getattr(flags, name)}: expected at least one")
    frontdoor.check_output_path(flags.json)
    opened = on_one_device(flags.workdir)
    prompts = unequal_prompts(opened, flags.prompts, flags.number)
    # Room for the longest prompt, as it is padded, beside what the costs are measured with.
    widths = [1, *(heads + 1 for heads in flags.heads)]
    study = Study(flags.heads, widths, new_tokens=64 + flags.max_new_tokens, repeats=flags.repeats)
    _, costs = measure_costs(Subject("run", opened.trained.model, opened.parameters), flags.batch, study)
    rows = measure(opened, prompts, costs, flags)
    rich.console.Console().print(table(rows))
    if flags.json:
        write_json(flags.json, {"environment": environment(), "rows": rows})
    return 0


if __name__ == "__main__":
    frontdoor.guarded(lambda: main(sys.argv[1:]))
