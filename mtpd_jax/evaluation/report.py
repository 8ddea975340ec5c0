"""Tables for the terminal and JSON for other tools, from the same results."""

import json
import math
from typing import Any

import rich.table
from etils import epath

from mtpd_jax.evaluation.acceptance import Interval
from mtpd_jax.evaluation.decoding import DecodingScore
from mtpd_jax.evaluation.scoring import TextScore


def percent(share: float | None) -> str:
    """A share as a percentage, or a dash."""
    return "–" if share is None else f"{100 * share:.1f} %"


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def bounded(interval: Interval, digits: int = 2) -> str:
    """``mean [low, high]``, or the mean alone where there is no interval."""
    if interval.low is None or interval.high is None:
        return number(interval.mean, digits)
    return f"{number(interval.mean, digits)} [{number(interval.low, digits)}, {number(interval.high, digits)}]"


def text_table(scores: dict[str, TextScore]) -> rich.table.Table:
    """One row per head of each text: cross entropy, KL and agreement, teacher-forced."""
    table = rich.table.Table(title="text, teacher-forced")
    for column in ("text", "head", "CE (nats)", "bits per byte", "KL from main (nats)", "agreement with main"):
        table.add_column(column, justify="left" if column == "text" else "right", overflow="fold")
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


def decoding_table(name: str, by_heads: dict[str, DecodingScore]) -> rich.table.Table:
    """One row per number of heads: acceptance, tokens per pass and speed, with 95 % intervals over prompts."""
    prompts = next(iter(by_heads.values())).prompts
    table = rich.table.Table(title=f"decoding: {name} ({prompts} prompts)")
    for column in ("heads", "conditional acceptance", "cumulative acceptance", "tokens per pass", "tokens/s",
                   "speed-up over plain", "over 1 head", "identical"):  # fmt: skip
        table.add_column(column, justify="right")
    for heads, score in by_heads.items():
        conditional, cumulative = (
            "\n".join(percent(rate.mean) for rate in rates)
            for rates in (score.acceptance.conditional, score.acceptance.cumulative)
        )
        one_head = "–" if score.speedup_over_one_head is None else bounded(score.speedup_over_one_head)
        table.add_row(
            heads, conditional or "–", cumulative or "–", bounded(score.tokens_per_pass),
            bounded(score.tokens_per_second, 0), bounded(score.speedup_over_plain), one_head,
            {True: "yes", False: "NO", None: "–"}[score.identical], end_section=True,
        )  # fmt: skip
    return table


def write_json(path: str, value: Any) -> None:
    """Writes indented JSON.

    Raises:
      ValueError: the file cannot be written.
    """
    try:
        epath.Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ValueError(f"--json={path}: cannot be written ({error})") from error
