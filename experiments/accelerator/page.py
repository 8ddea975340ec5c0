"""docs/accelerators.md and its figure, from a folder of results: nothing stands there that is not in it."""

import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import rich.console
import rich.markdown

from experiments.accelerator.battery import Place, Result, Results
from experiments.accelerator.piece import PIECES
from experiments.figures import curves
from experiments.sweep.report import Table, machine, with_interval
from mtpd_jax.evaluation.report import number
from mtpd_jax.evaluation.statistics import Interval

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "accelerators.md"

_INTRODUCTION = """
Everything in this project that wants an accelerator is measured by one command, in pieces that are known by name. It
begins with the most valuable, writes each result when it has it, stops when time is up, and does what is missing when
it is started again; another kind of device needs another folder.

```
python -m experiments.accelerator --out=DIR                 # nine minutes of it; again for the rest
python -m experiments.accelerator --out=DIR --only=loss     # one piece
python -m experiments.accelerator --out=OTHER --tiny        # all of it, in tiny sizes, on a CPU: two minutes
python -m experiments.accelerator --out=DIR --page          # writes this page
```

Models in training and compiled programs stay on the machine (`--workdir`), results are a few megabytes. A machine
without a network, with Python and jax, flax, optax and orbax-checkpoint on it, lacks a few packages:
`scripts/offline_bundle.sh OUT 3.12` fetches them elsewhere, and there

```
python -m pip install --no-index --no-deps --target=DIR OUT/*.whl && export PYTHONPATH=DIR
```

installs them.
"""


def _milliseconds(seconds: float | None) -> str:
    return number(None if seconds is None else 1e3 * seconds, 2)


def _times(value: float | None, base: float | None) -> str:
    return number(value / base) if value is not None and base else "–"


def _device(found: Mapping[str, Result]) -> list[Table]:
    piece = PIECES["device"]
    rows = [[case, piece.summary(result)] for case, result in found.items()]
    notes = []
    if "product" in found:
        notes.append(f"The product is of square bfloat16 matrices, {found['product']['size']:,} wide.")
    if "copy" in found:
        notes.append(f"The copy reads and writes {found['copy']['bytes'] / 2**30:.3g} GiB together.")
    return [Table("The device", ["", "measured"], rows, " ".join(notes))]


def _exactness(found: Mapping[str, Result]) -> list[Table]:
    piece = PIECES["exactness"]
    rows = [[case, piece.summary(result)] for case, result in found.items() if "skipped" not in result]
    note = (
        "Errors are distances as a share of the reference's norm, parity differences a share of the largest logit. The "
        "run that decodes was trained here, on a made-up text, with deterministic operations."
    )
    return [Table("What holds", ["", "found"], rows, note)]


def _loss(found: Mapping[str, Result]) -> list[Table]:
    rows = [
        [
            str(row["heads"]), row["objective"], row["form"], _milliseconds(row["seconds"]), number(row["over_plain"]),
            _times(row["seconds"], row["floor_seconds"]), _times(row["seconds"], row["products_seconds"]),
            number(None if row["temp_bytes"] is None else row["temp_bytes"] / 2**20, 0),
        ]
        for result in found.values()
        for row in sorted(result["rows"], key=lambda row: (row["objective"], row["form"]))
    ]  # fmt: skip
    first = next((row for result in found.values() for row in result["rows"]), None)
    columns = ["heads", "objective", "form", "ms", "x plain MTP", "x its products, timed", "at the peak", "temp MiB"]
    note = first and (
        f"V = {first['vocabulary']:,}, D = {first['width']:,}, N = {first['top_n']:,}, {first['rows']:,} rows, "
        f"{first['dtype']}, with gradients. A dash: it does not fit. The goal for MTP-D over plain MTP is 1.1."
    )
    return [Table("The loss", columns, rows, note or "")]


def _training(found: Mapping[str, Result]) -> list[Table]:
    steps = [result for result in found.values() if "size" in result]
    kernels = [result for result in found.values() if "size" not in result and "skipped" not in result]

    def speed(row: Result) -> list[str]:
        return [
            f"{row['rows']} x {row['tokens'] // row['rows']:,}", _milliseconds(row["seconds"]),
            f"{row['tokens_per_second']:,.0f}", number(row["mfu"], 3), number(row["of_measured_product"], 3),
            number(row["bytes"] / 2**30, 1),
        ]  # fmt: skip

    shared = ["batch", "ms", "tokens/s", "MFU", "of the measured product", "GiB"]
    sizes = [
        [row["size"], str(row["heads"]), f"{row['parameters']:,}", row["dtype"], row["attention"], *speed(one)]
        for row in steps
        for one in row["batches"]
    ]
    note = (
        "At the largest batch that fits, and at half of it, on one device. MFU is of the data sheet's peak; attention "
        "is counted whole, as PaLM does, and nothing that is recomputed. The goal for the 2B config is 0.45."
    )
    return [
        Table("Training steps", ["size", "heads", "parameters", "dtype", "attention", *shared], sizes, note),
        Table("Attention kernels", ["kernel", *shared], [[row["attention"], *speed(row)] for row in kernels],
              "A step of the 1b size without heads."),
    ]  # fmt: skip


def _profile(found: Mapping[str, Result]) -> list[Table]:
    tables = []
    for case, result in found.items():
        total = sum(result["by_place"].values()) or 1.0
        rows = [
            [place, _milliseconds(seconds), f"{100 * seconds / total:.1f} %"]
            for place, seconds in list(result["by_place"].items())[:12]
        ]
        note = (
            f"{1e3 * result['seconds']:.3g} ms by the clock, {result['kernels']:,} kernels, launched one by one, and "
            f"nothing running in {100 * result['idle']:.0f} % of the time."
        )
        tables.append(Table(f"Where the time goes: {case}", ["in the model", "ms", "share"], rows, note))
    return tables


def _trained(found: Mapping[str, Result]) -> list[Table]:
    rows = []
    for result in found.values():
        for heads in result["decoding"]["greedy"]:
            cells = [
                with_interval(Interval(**ways[heads][figure]))
                for ways in result["decoding"].values()
                for figure in ("tokens_per_pass", "speedup")
            ]
            train = f"{result['train_seconds'] / 60:.1f}"
            tokens = f"{result['tokens'] / 1e6:.3g} M, {result['times_text']:.2g} times"
            about = [result["variant"], str(result["seed"]), tokens, train, number(result["main_ce"], 3)]
            rows.append([*about, heads, *cells])
    columns = ["model", "seed", "tokens, the text", "minutes of training", "main CE", "heads that draft",
               "tokens per pass, greedy", "x plain", "tokens per pass, temperature 1", "x plain"]  # fmt: skip
    different = sum(result["texts_that_differ"] for result in found.values())
    sizes = sorted({f"{result['text_bytes'] / 1e6:,.3g} MB" for result in found.values()})
    note = (
        f"Trained at `--scale=gpu` on the source code of the installed packages ({', '.join(sizes)}). One prompt at a "
        "time, wall clock, prefill included, over the fastest plain decoding. More heads than a model has are looped, "
        f"untrained. Greedy texts that differ from plain decoding's by more than a tie: {different}. The goal is 2.5 "
        "times plain."
    )
    return [Table("A trained model", columns, rows, note)]


def _decoding(found: Mapping[str, Result]) -> list[Table]:
    rows = [
        [
            result["size"], str(result["prompt"]), str(result["batch"]), str(row["heads"]),
            _milliseconds(row["seconds"]), number(row["break_even"]), _milliseconds(row["predicted_seconds"]),
            _milliseconds(row["floor_seconds"]), number(row["over_floor"]),
        ]
        for result in found.values()
        for row in result["rounds"]
    ]  # fmt: skip
    columns = ["size", "prompt", "batch", "heads", "ms per round", "break-even", "speed model, ms", "floor, ms",
               "x floor"]  # fmt: skip
    note = (
        "Break-even: a round in plain steps, and so the tokens per pass from which drafting pays. The speed model adds "
        "up parts that were timed for some numbers of heads. The floor is the longer of bytes and FLOPs, at the rates "
        "above."
    )
    return [Table("Rounds of decoding", columns, rows, note)]


_TABLES: Mapping[str, Callable[[Mapping[str, Result]], list[Table]]] = {
    "device": _device, "exactness": _exactness, "loss": _loss, "training": _training, "profile": _profile,
    "trained": _trained, "decoding": _decoding,
}  # fmt: skip


def _panels(loss: Iterable[Result], decoding: Iterable[Result]) -> list[dict[str, Any]]:
    """The loss by heads, and break-even by heads; panels without lines are left out."""
    times: dict[str, list[tuple[float, float]]] = {}
    for row in (row for result in loss for row in result["rows"] if row["seconds"] is not None):
        for objective in ("mtp", "mtp_d") if row["objective"] == "ntp" else (row["objective"],):
            times.setdefault(f"{row['form']}, {objective}", []).append((row["heads"], 1e3 * row["seconds"]))
    even = {
        f"{result['size']}, prompt {result['prompt']}, batch {result['batch']}": [
            (row["heads"], row["break_even"]) for row in result["rounds"] if row["break_even"] is not None
        ]
        for result in decoding
    }
    panels = [
        {"title": "loss and gradients", "x": "heads", "y": "ms", "lines": times, "log": "y"},
        {"title": "tokens per pass to break even", "x": "heads", "y": "round / plain step", "lines": even},
    ]
    return [panel for panel in panels if panel["lines"]]


def _missing(place: Place, rows: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """What is not there, and why."""
    lines = []
    for piece in PIECES.values():
        cases = piece.cases(place)
        if not any((piece.name, case.name) in rows for case in cases):
            minutes = math.ceil(sum(case.seconds for case in cases) / 60)
            lines.append(f"- {piece.name}: none of its {len(cases)} cases; about {minutes} min")
            continue
        for case in cases:
            row = rows.get((piece.name, case.name))
            if row is None or "error" in row:
                why = "not measured yet" if row is None else row["error"].splitlines()[0]
                lines.append(f"- {piece.name}, {case.name}: {why}")
    return lines


def write_page(place: Place, path: pathlib.Path = PAGE) -> None:
    """Writes the page and, beside it, its figure; and prints the page.

    Args:
      place: whose results.
      path: the Markdown file.
    """
    results = Results(place.out, place.tiny)
    rows = results.rows()
    parts = ["# On an accelerator", _INTRODUCTION]
    environments = {machine(row["environment"]) for row in rows.values() if row["environment"]}
    if environments:
        shown = place.out.relative_to(ROOT) if place.out.is_relative_to(ROOT) else place.out.name
        parts.append(f"The figures below are those in `{shown}`: {'; '.join(sorted(environments))}.")
    else:
        parts.append("**Nothing has been measured on an accelerator yet.**")
    found = {name: results.of(name) for name in PIECES}
    tables: Sequence[Table] = [table for name, of in _TABLES.items() if found[name] for table in of(found[name])]
    parts += [table.markdown() for table in tables if table.rows]
    panels = _panels(found["loss"].values(), found["decoding"].values())
    if panels:
        curves(str(path.with_suffix(".png")), panels)
        parts.append(f"![the loss, and break-even]({path.stem}.png)")
    missing = _missing(place, rows)
    parts.append("\n".join(["## What is missing", "", *(missing or ["Nothing."])]))
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    path.write_text(text)
    rich.console.Console().print(rich.markdown.Markdown(text))
