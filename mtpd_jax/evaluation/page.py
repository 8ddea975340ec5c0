"""A report as a page of HTML that needs nothing else: text in colours, acceptance by head, the speed model's curve."""

import importlib.resources
import io
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import matplotlib
import matplotlib.axes
import matplotlib.figure
import numpy as np

from mtpd_jax.decoding.drafters.drafter import COPIED
from mtpd_jax.evaluation.decoding import DecodingScore
from mtpd_jax.evaluation.quality import PLAIN
from mtpd_jax.evaluation.report import bounded, number, percent, what_was_timed
from mtpd_jax.evaluation.results import PromptReport, Report
from mtpd_jax.evaluation.span_report import lengths_of
from mtpd_jax.evaluation.speed import RoundCosts
from mtpd_jax.evaluation.statistics import Interval
from mtpd_jax.evaluation.transcript import proposer_name

# Okabe and Ito's palette, which people who see colours differently tell apart; the main head is not coloured.
_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2")
_COPIED = "#999999"


def model_of(by_heads: Mapping[str, DecodingScore]) -> list[tuple[int, float]]:
    """The speed model's curve: number of heads, and speed-up over plain decoding.

    A round costs what it cost here, prefill shared out among the rounds, and between measured numbers of heads what
    lies between; it brings what the acceptance of all heads says.
    """
    costs = {
        int(heads) + 1: (score.tokens_per_pass.mean or 1.0) / (score.tokens_per_second.mean or 1.0)
        for heads, score in by_heads.items()
    }
    rounds = RoundCosts(1, costs, {}, {0: 0.0})
    most = max(map(int, by_heads))
    cumulative = [rate.mean or 0.0 for rate in by_heads[str(most)].acceptance.cumulative]
    plain = rounds.tokens_per_second(0, [])
    return [(heads, rounds.tokens_per_second(heads, cumulative) / plain) for heads in range(most + 1)]


def page(report: Report) -> str:
    """The page: what the tables say, texts in colours, and charts."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {
        "bounded": bounded, "number": number, "percent": percent, "colour": colour_of, "proposer": proposer_name,
        "named": lambda way: "plain decoding" if way == "0" else f"{way} drafts per round" if way.isdigit() else way,
        "shares": lambda rates: " ".join(number(None if rate.mean is None else 100 * rate.mean, 0) for rate in rates),
        "lengths": lengths_of,
    }  # fmt: skip
    template = importlib.resources.files("mtpd_jax.evaluation").joinpath("page.html").read_text(encoding="utf-8")
    parts = [_part(name, one) for name, one in report.decoding.items()]
    return environment.from_string(template).render(report=report, parts=parts)


def _part(name: str, decoded: PromptReport) -> dict[str, Any]:
    """What the template shows of a file of prompts."""
    ways = {way: score for way, score in decoded.by_way.items() if way != PLAIN}
    if decoded.padded_plain is not None:
        ways = {"0": ways.pop("0"), "plain decoding, padded": decoded.padded_plain, **ways}
    drafted = max(map(int, decoded.heads), default=0) > 0
    charts = [_acceptance_chart(decoded.heads), _speed_chart(decoded.heads)] if drafted else []
    lossless, lossy = (_fastest(ways, lossless=kind) for kind in (True, False))
    spans = {"0" if way == PLAIN else way: one for way, one in decoded.spans.items()}
    return {
        "name": name, "timed": what_was_timed(next(iter(ways.values()))), "best": lossless, "lossy": lossy,
        "charts": list(map(_svg, charts)), "ways": ways, "samples": decoded.samples, "spans": spans,
        "places": ways[max(decoded.heads, key=int)].by_place if drafted else (),
    }  # fmt: skip


def _fastest(ways: Mapping[str, DecodingScore], lossless: bool) -> str | None:
    """The way that is fastest of those that lose nothing, or of those that may write another text; None: there is
    none."""
    own = [way for way, score in ways.items() if score.lossless is lossless]
    return max(own, key=lambda way: ways[way].speedup_over_plain.mean or 0.0, default=None)


def colour_of(proposer: int) -> str:
    """What stands behind a token of a proposer; nothing for the main head's."""
    return "" if proposer == 0 else _COPIED if proposer == COPIED else _COLOURS[(proposer - 1) % len(_COLOURS)]


def _svg(figure: matplotlib.figure.Figure) -> str:
    written = io.StringIO()
    # Letters stay letters: smaller, and in the page's own font; identifiers do not depend on the day.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "page", "font.family": "sans-serif"}):
        figure.savefig(
            written, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return written.getvalue().partition("<svg")[1] + written.getvalue().partition("<svg")[2]


def _axes(title: str, x: str, y: str) -> tuple[matplotlib.figure.Figure, matplotlib.axes.Axes]:
    figure = matplotlib.figure.Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _error(intervals: Sequence[Interval], factor: float) -> Any:
    """Distances from the means to both ends of their intervals; none where there is no interval."""
    ends = [
        (
            0.0 if one.mean is None or one.low is None else one.mean - one.low,
            0.0 if one.mean is None or one.high is None else one.high - one.mean,
        )
        for one in intervals
    ]
    return factor * np.abs(np.array(ends).T)


def _acceptance_chart(by_heads: Mapping[str, DecodingScore]) -> matplotlib.figure.Figure:
    score = by_heads[max(by_heads, key=int)]
    figure, axes = _axes("how often a draft stands", "draft of a round", "%")
    rates = {"accepted, if all before it were": score.acceptance.conditional, "cumulative": score.acceptance.cumulative}
    if score.agreement:
        rates["agreement, teacher-forced"] = score.agreement
    for place, (label, intervals) in enumerate(rates.items()):
        x = np.arange(1, len(intervals) + 1) + 0.27 * (place - (len(rates) - 1) / 2)
        height = [100 * (one.mean or 0.0) for one in intervals]
        axes.bar(x, height, 0.25, yerr=_error(intervals, 100), label=label, color=_COLOURS[place], ecolor="#777777")
    axes.set_xticks(range(1, len(score.acceptance.conditional) + 1))
    axes.set_ylim(0, 100)
    figure.legend(fontsize=7, loc="outside lower center", ncols=3)
    return figure


def _speed_chart(by_heads: Mapping[str, DecodingScore]) -> matplotlib.figure.Figure:
    figure, axes = _axes("speed-up over plain decoding", "drafts per round", "x plain")
    curve = model_of(by_heads)
    axes.plot(*zip(*curve, strict=True), color=_COLOURS[0], label="speed model")
    measured = {int(heads): score.speedup_over_plain for heads, score in by_heads.items()}
    heights = [one.mean or 0.0 for one in measured.values()]
    error = _error(list(measured.values()), 1.0)
    axes.errorbar(list(measured), heights, yerr=error, fmt="o", color=_COLOURS[5], label="measured")
    axes.axhline(1.0, color="#777777", linewidth=1)
    axes.set_xticks([heads for heads, _ in curve])
    axes.set_ylim(bottom=0)
    figure.legend(fontsize=7, loc="outside lower center", ncols=2)
    return figure
