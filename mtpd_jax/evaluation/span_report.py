"""Tables of models that fill in masks: what each way is worth, speed beside quality, and what slots come to."""

from collections.abc import Mapping

import rich.table

from mtpd_jax.evaluation.quality import SpanScore
from mtpd_jax.evaluation.report import bounded, new_table, number, percent, what_was_timed
from mtpd_jax.evaluation.scoring import TextScore
from mtpd_jax.evaluation.slots import SlotReport


def span_table(name: str, spans: Mapping[str, SpanScore]) -> rich.table.Table:
    """One row per way: speed, and what was written for it. Ways that may write another text than plain say so."""
    plain = next(iter(spans.values())).decoding
    columns = ("way", "", "tok/pass", "x plain", "same %", "CE +", "4-grams")
    table = new_table(
        f"filling in masks: {name} ({what_was_timed(plain)}, ± 95 % interval)", columns, left=("way",), whole=columns,
        caption=f"plain: {number(plain.tokens_per_second.mean, 0)} tokens/s; LOSSY: not equal to "
        "plain decoding's text; same: texts that are all the same; CE +: nats per token by the teacher, over its own",
    )  # fmt: skip
    for way, score in spans.items():
        decoding, quality = score.decoding, score.quality
        same = None if quality is None or quality.same_as_own.mean is None else 100 * quality.same_as_own.mean
        table.add_row(
            way,
            "" if decoding.lossless else "LOSSY",
            bounded(decoding.tokens_per_pass),
            number(decoding.speedup_over_plain.mean),
            number(same, 0),
            "–" if quality is None else bounded(quality.teacher_ce),
            number(decoding.distinct_4grams),
        )
    return table


def length_table(name: str, spans: Mapping[str, SpanScore]) -> rich.table.Table:
    """How long the spans were that were written, and what they cost in places."""
    columns = ("way", "mean over texts", "places per token", "passes, %, with 0, 1, 2 and more guesses")
    caption = "mean over texts: of their tokens per pass; places: that passes read; guesses: that stood"
    table = new_table(f"accepted lengths: {name}", columns, left=("way",), caption=caption)
    for way, score in spans.items():
        mean = bounded(score.effective_k_mean_of_means)
        table.add_row(way, mean, number(score.tokens_read, 1), lengths_of(score))
    return table


def lengths_of(score: SpanScore) -> str:
    """Shares of passes in which 0, 1, 2 … guesses stood, in per cent."""
    return " ".join(number(100 * passes / max(1, sum(score.lengths)), 0) for passes in score.lengths)


def slot_table(name: str, report: SlotReport, own: TextScore, teacher: TextScore) -> rich.table.Table:
    """Slot by slot: agreement with the teacher, and how sure the student was; what the text is to both."""
    table = new_table(
        f"masks, teacher-forced: {name}", ("slot", "agrees with the teacher", "and all before it", "sure", "tokens"),
        caption=f"the text: {number(own.main.ce, 3)} nats per token, by the teacher {number(teacher.main.ce, 3)}",
    )  # fmt: skip
    for place, slot in enumerate(report.slots, 1):
        shares = map(percent, (slot.agreement, slot.chain, slot.confidence))
        table.add_row(str(place), *shares, f"{slot.tokens:,}")
    return table


def reliability_table(name: str, report: SlotReport) -> rich.table.Table:
    """How often guesses were right of which the student was so sure: whether tau says what it seems to."""
    table = new_table(f"is confidence worth its name? {name}", ("sure", "on average", "right", "guesses"))
    for one in report.reliability:
        table.add_row(
            f"{one.low:.1f} to {one.high:.1f}", percent(one.confidence), percent(one.agreement), f"{one.tokens:,}"
        )
    return table
