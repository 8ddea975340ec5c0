"""Tables for the terminal and JSON for other tools, from the same results."""

import json
import math
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import rich.box
import rich.console
import rich.measure
import rich.table
from etils import epath

from mtpd_jax.evaluation.decoding import DecodingScore
from mtpd_jax.evaluation.scoring import TextScore
from mtpd_jax.evaluation.statistics import Interval
from mtpd_jax.runs.workdir import write_atomically


def percent(share: float | None) -> str:
    """A share as a percentage, or a dash."""
    return "–" if share is None else f"{100 * share:.1f} %"


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def bounded(interval: Interval, factor: float = 1.0, digits: int = 2) -> str:
    """The mean and half the width of its interval, or the mean alone where there is none; JSON has both ends."""
    mean = number(None if interval.mean is None else factor * interval.mean, digits)
    if interval.low is None or interval.high is None or interval.high - interval.low < 1e-9:
        return mean
    return f"{mean} ±{number(factor * (interval.high - interval.low) / 2, digits)}"


class _Table(rich.table.Table):
    """A table that gives every column the room of its longest word first, and then shares out what is left.

    rich makes wide columns narrower until all fit, be it in the middle of a word.

    Attributes:
      whole: names of columns whose cells stay on one line if the words of all have room.
    """

    whole: Collection[str] = ()

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> rich.console.RenderResult:
        words, lines = [], []
        for column in self.columns:
            cells = [rich.measure.Measurement.get(console, options, cell) for cell in (column.header, *column.cells)]
            words.append(max(1, *(cell.minimum for cell in cells)))
            lines.append(max(1, *(cell.maximum for cell in cells)))
        whole = [column.header in self.whole for column in self.columns]
        least = [line if one else word for one, word, line in zip(whole, words, lines, strict=True)]
        for padding in ((0, 1, 0, 1), (0, 1, 0, 0)):
            self.padding = padding
            # Beside cells and padding there is the box, between columns and at both ends.
            room = options.max_width - len(least) * (sum(padding) + 1) - 1
            if sum(least) <= room:
                break
        else:
            least = words  # cells that were to stay on one line give way before words do
        for column, width, line in zip(self.columns, _shared_out(room, least, lines), lines, strict=True):
            column.width, column.no_wrap = width, width >= line
        yield from super().__rich_console__(console, options)


def _shared_out(room: int, least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Widths of columns that together have so much room: what they need at least, and more for those that want most."""
    widths = list(least)
    while sum(widths) > room and max(widths) > 1:  # no room even for the words: the longest are broken
        widths[widths.index(max(widths))] -= 1
    while sum(widths) < min(room, sum(most)):
        wanted = [wish / width for wish, width in zip(most, widths, strict=True)]
        widths[wanted.index(max(wanted))] += 1
    return widths


def new_table(
    title: str, columns: Iterable[str], *, left: Collection[str] = (), whole: Collection[str] = (), **options: Any
) -> rich.table.Table:
    """A table without rows, for terminals of 80 columns and of more: what has no room takes several lines.

    Nothing is ever cut off, nor broken within a word that has room, for a figure that has lost its last digits reads as
    another one.

    Args:
      title: above it.
      columns: their names.
      left: those that hold words, and begin at the left; figures end at the right.
      whole: those whose cells stay on one line, while others can give way.
      options: what ``rich.table.Table`` takes.
    """
    made = _Table(title=title, box=rich.box.SIMPLE_HEAD, **options)
    made.whole = whole
    for column in columns:
        side = "left" if column in left else "right"
        made.add_column(column, justify=side, overflow="fold")
    return made


def text_table(scores: dict[str, TextScore]) -> rich.table.Table:
    """One row per head of each text: cross entropy, KL and agreement, teacher-forced."""
    columns = ("text", "head", "CE, nats", "bits/byte", "KL, nats", "agreement")
    table = new_table("text, teacher-forced", columns, left=("text",))
    for name, score in scores.items():
        table.add_row(
            f"{name}\n{score.tokens:,} tokens", "main", number(score.main.ce, 3), number(score.main.bits_per_byte, 3),
            "", "", end_section=not score.heads,
        )  # fmt: skip
        for k, head in enumerate(score.heads, 1):
            last = k == len(score.heads)
            table.add_row(
                "", str(k), number(head.ce, 3), "", number(head.kl, 3), percent(head.agreement), end_section=last
            )
    return table


def decoding_table(
    name: str,
    by_heads: dict[str, DecodingScore],
    padded_plain: DecodingScore | None = None,
    others: Mapping[str, Mapping[str, DecodingScore]] = MappingProxyType({}),
) -> rich.table.Table:
    """One row per number of heads: acceptance per head, tokens per pass and speed, with 95 % intervals.

    With ``padded_plain``, plain decoding at the width of all passes has a row and a column, in place of one head's.
    Who else drafts has a row per length of a draft, below.
    """
    second = "x K=1" if padded_plain is None else "x padded"
    whole = ("tok/pass", "tok/s", "x plain", second, "same")
    title = f"decoding: {name} ({what_was_timed(next(iter(by_heads.values())))}, ± 95 % interval)"
    columns = ("heads", "accepted %", "cumulative", *whole)
    table = new_table(title, columns, whole=("heads", *whole))
    # Plain decoding first, then heads, then who else drafts.
    rows = list(by_heads.items())
    if padded_plain is not None:
        rows.insert(1, ("0 padded", padded_plain))
    rows += [(f"{drafter} {number}", score) for drafter, scores in others.items() for number, score in scores.items()]
    for heads, score in rows:
        conditional, cumulative = (
            " ".join(number(None if rate.mean is None else 100 * rate.mean, 0) for rate in rates)
            for rates in (score.acceptance.conditional, score.acceptance.cumulative)
        )
        over = score.speedup_over_one_head if padded_plain is None else score.speedup_over_padded_plain
        table.add_row(
            heads,
            conditional or "–",
            cumulative or "–",
            bounded(score.tokens_per_pass),
            number(score.tokens_per_second.mean, 0),
            bounded(score.speedup_over_plain),
            number(None if over is None else over.mean),
            "–" if score.identical is None else "yes" if score.identical else "NO" if score.failed else "tie",
        )
    return table


def what_was_timed(score: DecodingScore) -> str:
    """How many prompts, and how often each if that is more than once, as titles say it."""
    return f"{score.prompts} prompts" + (f", {score.turns} turns" if score.turns > 1 else "")


def acceptance_table(name: str, by_heads: dict[str, DecodingScore]) -> rich.table.Table:
    """Real decoding with all heads beside teacher forcing, head by head, with 95 % intervals over prompts."""
    # Of all drafts; what fewer of them did is a part of it.
    score = by_heads[max(by_heads, key=int)]
    title = f"heads, %: {name} ({score.prompts} prompts, ± 95 % interval)"
    table = new_table(title, ("head", "accepted", "cumulative", "teacher-forced agreement", "accepted - agreement"))
    columns = zip(score.acceptance.conditional, score.acceptance.cumulative, score.agreement, strict=True)
    for k, (conditional, cumulative, agreement) in enumerate(columns, 1):
        if conditional.mean is None or agreement.mean is None:
            gap = "–"
        else:
            gap = number(100 * (conditional.mean - agreement.mean), 1)
        table.add_row(str(k), *(bounded(rate, 100, 1) for rate in (conditional, cumulative, agreement)), gap)
    return table


def place_table(name: str, by_heads: dict[str, DecodingScore]) -> rich.table.Table | None:
    """Acceptance by the place in the text, with all heads; None where all rounds began at one place."""
    score = by_heads[max(by_heads, key=int)]
    if len(score.by_place) < 2:
        return None
    title = f"by place in the text: {name} ({score.prompts} prompts, ± 95 % interval)"
    table = new_table(title, ("tokens of text before", "passes", "accepted per pass", "accepted %"))
    for place in score.by_place:
        rates = " ".join(number(None if rate.mean is None else 100 * rate.mean, 0) for rate in place.conditional)
        places = (
            f"{place.begin:,} to {place.end - 1:,}" if place is not score.by_place[-1] else f"from {place.begin:,} on"
        )
        table.add_row(places, f"{place.passes:,}", bounded(place.tokens_per_pass_without_bonus), rates)
    return table


def write_json(path: str, value: Any) -> None:
    """Writes indented JSON, whole or not at all; a number that is not finite, which JSON has none for, becomes null.

    What is there and is no file, such as a pipe, is written to as it is.

    Raises:
      ValueError: the file cannot be written.
    """
    write_file(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: str, values: Sequence[Any]) -> None:
    """Writes one line of JSON per value; for the rest see ``write_json``."""
    write_file(path, "".join(json.dumps(_finite(one), ensure_ascii=False, allow_nan=False) + "\n" for one in values))


def write_file(path: str, text: str, flag: str = "--json") -> None:
    """Writes a text, whole or not at all; for the rest see ``write_json``. ``flag`` is what names the file."""
    try:
        if "://" in path:
            write_atomically(epath.Path(path), text)
            return
        target = pathlib.Path(path).resolve()  # where a link leads
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
        else:
            write_atomically(epath.Path(target), text)
    except OSError as error:
        raise ValueError(f"{flag}={path}: cannot be written ({error.strerror or error})") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
