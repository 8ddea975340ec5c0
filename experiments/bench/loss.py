"""Time, memory and FLOPs of the loss with its gradients, in four forms and for three objectives.

``--heads``, ``--vocabulary`` and ``--top_n`` take lists: each is varied with the others at their first value. Times are
medians over rounds in which every form runs once. ``floor`` is the time of the bare products of the same rows; MB are
temporary memory as compiled. FLOPs (TF) are those of the products with the unembedding, by formula: the compiler's own
count takes the body of a loop once.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import rich.console
import rich.table

from experiments.bench.loss_forms import (
    FORMS,
    OBJECTIVES,
    PRODUCTS,
    compile_form,
    compile_products,
    distillation_of,
    inputs,
)
from experiments.bench.timing import interleaved, median_ratio
from experiments.environment import environment
from experiments.figures import curves
from mtpd_jax import frontdoor
from mtpd_jax.evaluation.report import new_table, number, write_json
from mtpd_jax.training.feasibility import device_memory

# Chunk sizes from which the chunked form with rematerialisation takes its fastest: of a CPU, and of accelerators.
REMAT_CHUNKS = {True: (32, 64, 128), False: (256, 512, 1024)}
# Rows of each head that the bare products are timed on: on an accelerator as many for all heads together, at least,
# since their time is in proportion to the rows only where it is not that of writing the matrix's gradient.
FLOOR_ROWS = 512
_FLOOR_ROWS_OF_ALL = 16_384
# Of a device's memory that a program may ask for: the inputs of others lie there, too.
_SHARE = 0.85
_Made = TypeVar("_Made")


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared, and how large.

    Attributes:
      rows, width: of the hidden states.
      dtype: of theirs, and of the products.
      forms, objectives: names in ``FORMS`` and ``OBJECTIVES``.
      chunk_rows: of the fused form; None: chosen.
      repeats: rounds.
    """

    rows: int
    width: int
    dtype: str
    forms: Sequence[str] = FORMS
    objectives: Sequence[str] = OBJECTIVES
    chunk_rows: int | None = None
    repeats: int = 7


def cases(flags: argparse.Namespace) -> list[dict[str, int]]:
    """The base case, and each list's further values with the rest of it."""
    lists = {"heads": flags.heads, "vocabulary": flags.vocabulary, "top_n": flags.top_n}
    base = {name: values[0] for name, values in lists.items()}
    return [base, *({**base, name: value} for name, values in lists.items() for value in values[1:])]


def tuned_remat(arguments: tuple[jax.Array, ...], distillation: Any, rows: int) -> jax.stages.Compiled:
    """The chunked form at its best chunk size."""
    on_cpu = jax.default_backend() == "cpu"
    sizes = sorted({min(size, rows) for size in REMAT_CHUNKS[on_cpu]})
    candidates = {size: compile_form("chunked_remat", arguments, distillation, size) for size in sizes}
    programs = {size: (lambda c=compiled: c(*arguments)) for size, compiled in candidates.items()}
    seconds = interleaved(programs, 1, "tuning chunked_remat")
    return candidates[min(sizes, key=lambda size: seconds[size])]


def within_memory(attempt: Callable[[], _Made]) -> _Made | None:
    """What an attempt returns, or None if the device has not the memory for it: to compile, which may try kernels, too.

    Raises:
      jax.errors.JaxRuntimeError: it fails otherwise.
    """
    try:
        return attempt()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def fits(program: jax.stages.Compiled, run: Callable[[], Any]) -> bool:
    """Whether the device has the memory that a program needs: by the compiler's figures, and by trying."""
    memory = program.memory_analysis()
    assert memory  # CPUs and accelerators give it
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    if needed > _SHARE * device_memory(jax.devices()[0], 1):
        return False
    return within_memory(lambda: jax.block_until_ready(run())) is not None


def measure(case: dict[str, int], study: Study) -> list[dict[str, Any]]:
    """All forms and objectives of one case, one row each; next token is for no heads, the others for some."""
    heads, vocabulary = case["heads"], case["vocabulary"]
    objectives = [name for name in study.objectives if (name == "ntp") == (heads == 0)]
    if not objectives:
        return []
    arguments = inputs(heads, study.rows, study.width, vocabulary, jnp.dtype(study.dtype))
    compiled, programs = {}, {}
    for objective in objectives:
        distillation = distillation_of(objective, case["top_n"])
        for form in study.forms:
            key, chunked = (form, objective), form == "chunked_remat"
            make = functools.partial(tuned_remat, arguments, distillation, study.rows)
            if not chunked:
                make = functools.partial(compile_form, form, arguments, distillation, study.chunk_rows)
            compiled[key] = program = within_memory(make)
            if program is not None and fits(program, functools.partial(program, *arguments)):
                programs[key] = functools.partial(program, *arguments)
    floor_rows = FLOOR_ROWS if jax.default_backend() == "cpu" else max(FLOOR_ROWS, _FLOOR_ROWS_OF_ALL // (heads + 1))
    floor_rows = min(floor_rows, study.rows)
    products = compile_products(arguments, floor_rows)
    # Not of ones: there are devices that multiply those faster.
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = jax.tree.leaves(products.in_avals)
    drawn = [jax.random.normal(key, a.shape, a.dtype) for key, a in zip(keys, shapes, strict=True)]
    programs["floor"] = lambda: products(*drawn)
    seconds = interleaved(programs, study.repeats, " ".join(f"{name}={value}" for name, value in case.items()))
    floor = statistics.median(seconds.pop("floor")) * study.rows / floor_rows
    base = seconds.get(("fused", "ntp" if heads == 0 else "mtp"))
    return [
        {
            "form": form,
            "objective": objective,
            **case,
            "width": study.width,
            "rows": study.rows,
            "dtype": study.dtype,
            "seconds": statistics.median(times) if times else None,
            "seconds_min": min(times) if times else None,
            "seconds_max": max(times) if times else None,
            "over_plain": median_ratio(times, base) if times and base else None,
            "floor_seconds": floor,
            "temp_bytes": program and program.memory_analysis().temp_size_in_bytes,
            "flops": PRODUCTS[form] * 2 * (heads + 1) * study.rows * vocabulary * study.width,
        }
        for (form, objective), program in compiled.items()
        for times in [seconds.get((form, objective), [])]
    ]


def short(count: int) -> str:
    """A count in thousands, from ten thousand up."""
    return f"{count / 1000:.0f}k" if count >= 10_000 else str(count)


def table_of(rows: list[dict[str, Any]]) -> rich.table.Table:
    """One line per measured program."""
    first = rows[0]
    figures = ("K", "V", "N", "seconds (range)", "x mtp", "x floor", "MB", "TF")
    table = new_table(
        f"loss and gradients, {first['rows']} rows, width {first['width']}, {first['dtype']}",
        ("form", "loss", *figures), left=("form", "loss"), whole=figures,
    )  # fmt: skip
    for row in rows:
        ran = row["seconds"] is not None
        table.add_row(
            row["form"], row["objective"], str(row["heads"]), short(row["vocabulary"]), short(row["top_n"]),
            f"{row['seconds']:.3g} ({row['seconds_min']:.3g}-{row['seconds_max']:.3g})" if ran else "too large",
            number(row["over_plain"]), number(row["seconds"] / row["floor_seconds"]) if ran else "–",
            number(None if row["temp_bytes"] is None else row["temp_bytes"] / 1e6, 0), f"{row['flops'] / 1e12:.2g}",
        )  # fmt: skip
    return table


def draw(path: str, rows: list[dict[str, Any]], flags: argparse.Namespace) -> None:
    """Time and memory against each list that was varied."""
    base = {"heads": flags.heads[0], "vocabulary": flags.vocabulary[0], "top_n": flags.top_n[0]}
    panels = []
    for axis, label in (("heads", "K"), ("vocabulary", "V"), ("top_n", "N")):
        others = [name for name in base if name != axis]
        chosen = [row for row in rows if all(row[name] == base[name] for name in others) and row["seconds"] is not None]
        if len({row[axis] for row in chosen}) < 2:
            continue
        for field, unit, scale in (("seconds", "seconds", 1.0), ("temp_bytes", "temp, MB", 1e6)):
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in chosen:
                name = f"{row['form']}, {'mtp' if row['objective'] == 'ntp' else row['objective']}"
                lines.setdefault(name, []).append((row[axis], row[field] / scale))
            log = "y" if axis == "heads" else "xy"
            panels.append({"title": f"{unit} by {label}", "x": label, "y": unit, "lines": lines, "log": log})
    if panels:
        curves(path, panels)


def main(arguments: list[str]) -> int:
    """Parses flags, measures, prints the table, and writes JSON and picture."""
    backend = jax.default_backend()
    parser = frontdoor.Parser(prog="python -m experiments.bench.loss", description=__doc__)
    parser.add_argument("--vocabulary", type=frontdoor.integers, default=[122_880], help="V (default: 122880)")
    parser.add_argument("--width", type=int, default=512 if backend == "cpu" else 2048, help="D")
    parser.add_argument("--rows", type=int, default=256 if backend == "cpu" else 8192, help="rows of hidden states")
    parser.add_argument("--heads", type=frontdoor.integers, default=[4], help="K (default: 4); 0: next token only")
    parser.add_argument("--top_n", type=frontdoor.integers, default=[10_000], help="N (default: 10000)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--forms", default=",".join(FORMS), help=f"default: {','.join(FORMS)}")
    parser.add_argument("--objectives", default=",".join(OBJECTIVES), help=f"default: {','.join(OBJECTIVES)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, else bfloat16")
    parser.add_argument("--chunk_rows", type=int, help="of the fused form (default: chosen from the shapes)")
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--plot", help="draw time and memory here (.png, .svg)")
    flags = parser.parse_args(arguments)
    flags.dtype = flags.dtype or ("float32" if backend == "cpu" else "bfloat16")
    for name, known in (("forms", FORMS), ("objectives", OBJECTIVES)):
        chosen = getattr(flags, name).split(",")
        unknown = [item for item in chosen if item not in known]
        if unknown:
            raise ValueError(f"--{name}={unknown[0]}: expected some of {', '.join(known)}")
        setattr(flags, name, chosen)
    sizes = {name: getattr(flags, name) for name in ("vocabulary", "width", "rows", "top_n", "repeats", "chunk_rows")}
    for name, value in sizes.items():
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            raise ValueError(f"--{name}={value}: expected positive numbers")
    if min(flags.heads) < 0:
        raise ValueError(f"--heads={flags.heads}: expected numbers from 0 up")
    frontdoor.check_output_path(flags.json)
    study = Study(flags.rows, flags.width, flags.dtype, flags.forms, flags.objectives, flags.chunk_rows, flags.repeats)
    rows = [row for case in cases(flags) for row in measure(case, study)]
    if not rows:
        raise ValueError("nothing to measure: ntp is for --heads=0 and the other objectives for more")
    rich.console.Console().print(table_of(rows))
    if flags.json:
        write_json(flags.json, {"environment": environment(), "rows": rows})
    if flags.plot:
        draw(flags.plot, rows, flags)
    return 0


if __name__ == "__main__":
    frontdoor.guarded(lambda: main(sys.argv[1:]))
