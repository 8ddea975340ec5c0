"""A sweep's results as a document: Markdown tables, the same in the terminal, and a figure beside them."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.markdown

from experiments.figures import curves
from experiments.sweep.arms import Arm
from experiments.sweep.rows import Row
from mtpd_jax.evaluation.quality import PLAIN
from mtpd_jax.evaluation.report import number
from mtpd_jax.evaluation.statistics import Interval


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with what has to be said of it.

    Attributes:
      title: above it.
      columns: their names.
      rows: one cell per column.
      note: below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        return f"## {self.title}\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")


@dataclasses.dataclass(frozen=True)
class Report:
    """What an experiment found.

    Attributes:
      title, text: heading, and what stands below it.
      tables: in order; those without rows, for want of runs, are left out.
      panels: of the figure, likewise; see ``figures.curves``.
    """

    title: str
    text: str
    tables: Sequence[Table]
    panels: Sequence[Mapping[str, Any]]


def share(interval: Interval) -> str:
    """A share in per cent with its interval: 67.3 (65.1 to 69.4)."""
    return with_interval(interval, 100, 1)


def points(interval: Interval) -> str:
    """A difference of shares in points, with its sign and interval."""
    return with_interval(interval, 100, 1, signed=True)


def with_interval(interval: Interval, factor: float = 1.0, digits: int = 2, signed: bool = False) -> str:
    """A figure and its interval in brackets."""

    def text(value: float | None) -> str:
        shown = number(None if value is None else factor * value, digits)
        return f"+{shown}" if signed and value is not None and value >= 0 else shown

    if interval.low is None or interval.mean is None:
        return text(interval.mean)
    return f"{text(interval.mean)} ({text(interval.low)} to {text(interval.high)})"


def verdict(gained: Interval, seeds: int) -> str:
    """Whether a claimed gain is there: its interval lies above zero, below it, or does not decide.

    With one seed the interval knows nothing of how much another would differ, and the verdict says so.
    """
    if gained.low is None or gained.high is None or gained.low <= 0 <= gained.high:
        return "undecided"
    return ("yes" if gained.low > 0 else "no") + (" (one seed)" if seeds == 1 else "")


def line(points: Mapping[Any, Interval], factor: float = 1.0) -> list[tuple[float, ...]]:
    """A line of a figure with its interval, from x -> figure; what is not defined is left out."""
    return [
        (x, *(factor * end for end in (found.mean, found.low, found.high)))
        for x, found in points.items()
        if found.mean is not None and found.low is not None and found.high is not None
    ]


def per_seed(values: Sequence[float], factor: float = 100, digits: int = 1) -> str:
    """One signed number per seed."""
    return ", ".join("–" if math.isnan(value) else f"{factor * value:+.{digits}f}" for value in values)


def write(report: Report, arms: Mapping[str, Arm], path: pathlib.Path, command: str, version: str) -> None:
    """Prints the report and writes it to ``path``, with the figure as a .png of the same name.

    Args:
      report: what was found.
      arms: what it was found from; the provenance table is made of their rows.
      path: the Markdown file.
      command: that makes it.
      version: of the code that writes it.
    """
    parts = [f"# {report.title}", f"`{command}` wrote this page from `{path.stem}.jsonl` beside it.", report.text]
    parts += [table.markdown() for table in report.tables if table.rows]
    lines = [{name: points for name, points in panel["lines"].items() if points} for panel in report.panels]
    drawn = [{**panel, "lines": found} for panel, found in zip(report.panels, lines, strict=True) if found]
    if drawn:
        curves(str(path.with_suffix(".png")), drawn)
        parts.append(f"![{report.title}]({path.stem}.png)")
    parts.append(_provenance(arms, version).markdown())
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    path.write_text(text)
    rich.console.Console().print(rich.markdown.Markdown(text))


def _provenance(arms: Mapping[str, Arm], version: str) -> Table:
    """Seeds, steps, tokens and time of every variant, and versions below."""
    rows = [
        [
            name, " ".join(map(str, arm.seeds)), f"{arm.mean('steps'):,.0f}", f"{arm.mean('tokens'):,.0f}",
            f"{arm.mean('parameters'):,.0f}", f"{arm.mean('seconds') / 60:.1f}", str(len(arm.rows[0].text.bytes)),
            " ".join(sorted({row.code for row in arm.rows})),
        ]
        for name, arm in arms.items()
    ]  # fmt: skip
    found = [row for arm in arms.values() for row in arm.rows]
    machines = sorted({machine(row.environment) for row in found})
    note = f"{differences(found)} The code version now is {version}. {'; '.join(machines)}."
    columns = ["variant", "seeds", "steps", "tokens", "parameters", "minutes per run", "texts", "code version"]
    return Table("Runs", columns, rows, note)


def differences(rows: Sequence[Row]) -> str:
    """How many greedy texts are not plain decoding's, of those that have to be: with heads, and what was verified."""
    drafted = [way for row in rows for heads, way in row.decoding["greedy"].by_heads.items() if heads]
    different, ties = sum(way.different or 0 for way in drafted), sum(way.ties or 0 for way in drafted)
    decoded = sum(len(way.tokens) for way in drafted)
    for spans in (row.spans.ways["greedy"] for row in rows if row.spans is not None):
        verified = [way for name, way in spans.items() if way.lossless and name != PLAIN]
        decoded += sum(len(way.tokens) for way in verified)
        different += sum(
            kept != tokens or tokens != of_plain
            for way in verified
            for kept, tokens, of_plain in zip(way.kept, way.tokens, spans[PLAIN].tokens, strict=True)
        )
    return f"Greedy texts that differ from plain decoding's: {different + ties} of {decoded}, {ties} of them by a tie."


def machine(environment: Mapping[str, Any]) -> str:
    """What figures were measured on, from their ``environment``."""
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    device = f"{environment['devices']} x {environment['device']}, {environment['cpu_cores']} CPU cores"
    return f"{device}, Python {environment['python']}, {packages}"
