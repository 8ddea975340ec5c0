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
    # Narrow enough for a terminal of 80 columns.
    columns = ("way", "", "tok/pass", "x plain", "same %", "CE +", "4-grams")
    table = new_table(
        f"filling in masks: {name} ({what_was_timed(plain)}, ± 95 % interval)", columns, left=("way",), whole=columns,
        padding=(0, 1, 0, 0), caption=f"plain: {number(plain.tokens_per_second.mean, 0)} tokens/s; LOSSY: not equal to "
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
