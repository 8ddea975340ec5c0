"""The page of ``experiments.standalone``: every arm and way, speed beside quality, and what one change is worth."""

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.posthoc_report import left_out
from experiments.pretrained import INPUTS
from experiments.sweep.arms import Arm, gain, paired
from experiments.sweep.report import Report, Table, line, per_seed, verdict, with_interval
from experiments.sweep.rows import SpanCounts, SpanMeasures, read_rows
from experiments.sweep.runs import Variant
from experiments.sweep.scale import Scale
from experiments.sweep.spans import PLAIN
from mtpd_jax.data.files import read_json
from mtpd_jax.evaluation.report import number, percent
from mtpd_jax.evaluation.statistics import Counts, Interval, mean_of

SEEDS = (0, 1, 2)
_LONGER = "longer online hard"
# What claims about text are read at: spans that are believed whole, where arms are equally fast, and a loose threshold,
# each arm with its own longest spans.
_READ_AT = ("static 2", "static 4", "confident at 0.6")
# The paper's claims as pairs of arms: what is said to be better, and than what.
_CLAIMS = (
    ("hard labels in place of soft ones", "online soft", "online hard"),
    ("the student's own writing in place of the text's", "offline", "online hard"),
    ("a teacher in place of the text", "ground truth", "online hard"),
    ("random lengths in place of k = 5", "fixed k=5", "online hard"),
    ("random lengths in place of k = 8", "fixed k=8", "online hard"),
    ("the text's cross entropy beside it", "online hard", "prefix loss"),
    ("spans that grow", "online hard", "growing spans"),
)
# Heads on the same backbone, of ``experiments.posthoc``: their name there, and here.
_HEADS = {"cascade kl pre text": "MTP-D's heads, frozen backbone", "shared kl pre text": "post-hoc head"}
_CAVEATS = {
    "stories_656k": "TinyStories-656K is somebody else's: whether it was trained on our held-out stories is not known.",
}


def report(
    arms: Mapping[str, Arm],
    scale: Scale,
    sizes: Mapping[str, Any],
    wanted: Callable[[Scale], Sequence[Variant]],
    folder: pathlib.Path,
) -> Report:
    """Every arm, the claims, verified beside believed, and the frontier.

    Args:
      arms: that have rows.
      scale: of them.
      sizes: how much was trained, by name; see ``standalone.Sizes``.
      wanted: the arms that there are to be.
      folder: where heads on the same backbone may have rows.
    """
    digests = ", ".join(f"{name} `{digest[:16]}`" for name, digest in scale.inputs)
    text = (
        f"A model that learns to fill in masks ({scale.name}; {digests}), taught by what it was, for {sizes['steps']} "
        f"steps of {sizes['batch']} rows, at a learning rate of {sizes['learning_rate']:g}. {scale.texts} beginnings "
        f"of held-out stories of {scale.prompt_tokens} tokens are continued by {scale.new_tokens}, one at a time. "
        "`static k` believes all k tokens of a span, `confident k at tau` those before the first whose probability is "
        "below tau: both are lossy, and their text is **not** that of plain decoding. `verified` confirms its guesses "
        "in the next pass: its text is what the same model writes one token at a time; without tau, all of them. "
        f"{'Times are of one turn' if scale.turns == 1 else f'Of {scale.turns} turns the median time of each text'}. "
        "Teacher CE: nats per token of what was written, by the teacher, over those of its own greedy text after the "
        "same beginnings; text that repeats itself has few, so the share of distinct 4-grams stands beside it. "
        "Intervals in brackets: 95 %, paired bootstrap over seeds and then held-out texts."
    )
    if scale.name in _CAVEATS:
        text += f" {_CAVEATS[scale.name]}"
    missing, heads = left_out(arms, wanted(scale), SEEDS), heads_beside(folder, scale.inputs)
    text += f"\n\nLeft out: {missing}." if missing else ""
    tables = [
        _drift(arms),
        *(_ways(name, arm) for name, arm in arms.items()),
        *(_claims(arms, way) for way in _READ_AT),
        _lossless_claims(arms),
        _verified(arms),
        _beside(arms, heads),
        _reliability(arms),
    ]
    return Report("Standalone MTP", text, tables, _panels(arms, heads))


def spans_of(arm: Arm) -> list[SpanMeasures]:
    """What was measured of masks, by seed."""
    found = [row.spans for row in arm.rows]
    assert all(one is not None for one in found)  # of students, it always is
    return [one for one in found if one is not None]


def ways_of(arm: Arm, way: str, mode: str = "greedy") -> list[SpanCounts]:
    """One way, by seed; without a length in its name, at the arm's own longest spans."""
    name = _own(arm, way)
    assert name is not None  # or nobody asks
    return [one.ways[mode][name] for one in spans_of(arm)]


def tokens_per_pass(arm: Arm, way: str, mode: str = "greedy") -> Counts:
    """The effective k, pooled over texts; the token from prefill is not counted."""
    found = ways_of(arm, way, mode)
    return Counts.ratio([[count - 1 for count in one.tokens] for one in found], [one.passes for one in found])


def speed(arm: Arm, way: str, mode: str = "greedy") -> Counts:
    """Tokens per second over those of plain decoding of the same model."""
    fast, slow = ways_of(arm, way, mode), ways_of(arm, PLAIN, mode)
    return Counts.ratio([one.tokens for one in fast], [one.seconds for one in fast]) * Counts.ratio(
        [one.seconds for one in slow], [one.tokens for one in slow]
    )


def teacher_ce(arm: Arm, way: str) -> Counts:
    """Nats per token of what was written, by the teacher, over those of its own greedy text: a mean over texts."""
    return _over(ways_of(arm, way), [np.divide(one.teacher_nats, one.teacher_tokens) for one in spans_of(arm)])


def cost_of_believing(arm: Arm, way: str) -> Counts:
    """Teacher CE of what a way writes, over that of what the same student writes one token at a time."""
    return _over(ways_of(arm, way), [np.divide(one.nats, one.tokens) for one in ways_of(arm, PLAIN)])


def _over(written: Sequence[SpanCounts], others: Sequence[np.ndarray]) -> Counts:
    """Nats per token of texts, less those of others, by seed: a mean over texts."""
    by_text = [(np.divide(one.nats, one.tokens) - other).tolist() for one, other in zip(written, others, strict=True)]
    return Counts.ratio(by_text, [[1.0] * len(texts) for texts in by_text])


def as_teacher(arm: Arm, way: str) -> Counts:
    """Share of the teacher's own greedy text before the first token that is another."""
    return Counts.ratio(
        [one.as_teacher for one in ways_of(arm, way)], [list(map(float, one.teacher_tokens)) for one in spans_of(arm)]
    )


def kept(arm: Arm, way: str) -> Counts:
    """Share of the text before the first token that plain decoding would not have written."""
    found, plain = ways_of(arm, way), ways_of(arm, PLAIN)
    return Counts.ratio([one.kept for one in found], [one.tokens for one in plain])


def _names(arm: Arm) -> list[str]:
    return list(spans_of(arm)[0].ways["greedy"])


def _own(arm: Arm, way: str) -> str | None:
    """The name of a way among those of an arm, at its longest spans if ``way`` has no length; None: it is not there."""
    strategy, at, tau = way.partition(" at ")
    found = [name for name in _names(arm) if name == way or re.fullmatch(rf"{strategy} \d+{at}{tau}", name)]
    return max(found, key=lambda name: int(name.split()[1]) if name != PLAIN else 0, default=None)


def _drift(arms: Mapping[str, Arm]) -> Table:
    """What became of the model as it writes one token at a time, and how much of what it guesses is right."""
    rows = []
    for name, arm in arms.items():
        spans = spans_of(arm)
        own, theirs = [row.text.nats for row in arm.rows], [one.teacher_text for one in spans]
        weight = [row.text.weight for row in arm.rows]
        moved = Counts.ratio(
            [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(own, theirs, strict=True)], weight
        )
        slots = [[one.slots["slots"][place]["agreement"] for one in spans] for place in range(4)]
        shares = [_over_seeds([share for share in by_seed if share is not None]) for by_seed in slots]
        rows.append([
            name, with_interval(mean_of(moved), digits=3, signed=True),
            with_interval(mean_of(teacher_ce(arm, PLAIN)), digits=3, signed=True), *shares,
        ])  # fmt: skip
    columns = [
        "arm",
        "held-out CE, over the teacher's",
        "teacher CE of plain text",
        *(f"slot {j}" for j in range(1, 5)),
    ]
    note = (
        "Slots: agreement with the teacher on held-out text, each after the student's own tokens before it, in per "
        "cent; in brackets the range of seeds."
    )
    return Table("Drift, and what is guessed", columns, rows, note)


def _over_seeds(shares: Sequence[float]) -> str:
    mean = percent(float(np.mean(shares)))
    return mean if len(shares) == 1 else f"{mean} ({percent(min(shares))} to {percent(max(shares))})"


def _ways(name: str, arm: Arm) -> Table:
    rows = []
    for way in _names(arm):
        found = ways_of(arm, way)
        shares = [one.distinct_4grams for one in found if one.distinct_4grams is not None]
        rows.append([
            way, "no" if found[0].lossless else "**yes**", with_interval(mean_of(tokens_per_pass(arm, way))),
            with_interval(mean_of(speed(arm, way))), with_interval(mean_of(teacher_ce(arm, way)), signed=True),
            with_interval(mean_of(kept(arm, way)), 100, 0), with_interval(mean_of(as_teacher(arm, way)), 100, 0),
            number(float(np.mean(shares))),
        ])  # fmt: skip
    columns = [
        "way", "lossy", "tokens per pass", "wall clock over plain", "teacher CE", "kept of plain text, %",
        "kept of the teacher's, %", "distinct 4-grams",
    ]  # fmt: skip
    return Table(f"{name}, greedy", columns, rows)


def _claims(arms: Mapping[str, Arm], way: str) -> Table:
    rows = []
    for what, before, after in _CLAIMS:
        pair = paired(arms, after, before)
        if pair is None or not all(_own(arm, way) for arm in pair):
            continue
        tokens, _ = gain(*pair, lambda arm: tokens_per_pass(arm, way))
        ce, seeds = gain(*pair, lambda arm: teacher_ce(arm, way))
        believing, _ = gain(*pair, lambda arm: cost_of_believing(arm, way))
        rows.append([
            what, f"{after} over {before}", with_interval(tokens, signed=True), with_interval(ce, signed=True),
            per_seed(seeds, 1, 2), verdict(_less(ce), len(seeds)), with_interval(believing, signed=True),
            verdict(_less(believing), len(seeds)),
        ])  # fmt: skip
    columns = [
        "change", "arms", "gain in tokens per pass", "gain in teacher CE", "per seed", "better text",
        "of it, what believing costs", "better guesses",
    ]  # fmt: skip
    note = (
        "A gain in teacher CE is worse text. It has two parts: how far the student's own text, written one token at a "
        "time, has moved from the teacher's, and what believing adds to that."
    )
    return Table(f"The paper's claims, at {way}", columns, rows, note)


def _less(gained: Interval) -> Interval:
    """The same with its sign turned."""
    return Interval(*(None if end is None else -end for end in (gained.mean, gained.high, gained.low)))


def _lossless_claims(arms: Mapping[str, Arm]) -> Table:
    """What a change is worth where nothing is lost: every guess risked, and verified."""
    rows = []
    for what, before, after in _CLAIMS:
        if pair := paired(arms, after, before):
            gained, seeds = gain(*pair, lambda arm: tokens_per_pass(arm, "verified"))
            both = [with_interval(mean_of(tokens_per_pass(arm, "verified"))) for arm in pair]
            rows.append([
                what, f"{after} over {before}", *both, with_interval(gained, signed=True), per_seed(seeds, 1, 2),
                verdict(gained, len(seeds)),
            ])  # fmt: skip
    columns = ["change", "arms", "tokens per pass", "before", "gain", "per seed", "more tokens per pass"]
    note = "Each arm with its own longest spans. The text is the student's own, one token at a time: see drift."
    return Table("The paper's claims, when all guesses are verified", columns, rows, note)


def _verified(arms: Mapping[str, Arm]) -> Table:
    """How much of the speed is left when nothing is lost."""
    rows = []
    for name, arm in arms.items():
        for safe in (way for way in _names(arm) if way.startswith("verified")):
            lossy = safe.replace("verified", "confident")
            drawn = [safe] if safe in spans_of(arm)[0].ways["sampled"] else []
            figures = [tokens_per_pass(arm, way) for way in (safe, lossy) if way in _names(arm)]
            share = [figures[0] * one.inverse() for one in figures[1:]]
            rows.append([
                name, safe, with_interval(mean_of(figures[0])),
                with_interval(mean_of(speed(arm, safe))),
                *(_or_nothing([of(arm, way, "sampled") for way in drawn]) for of in (tokens_per_pass, speed)),
                _or_nothing(figures[1:]), _or_nothing(share, 100, 0), _or_nothing([speed(arm, lossy)] if share else []),
            ])  # fmt: skip
    columns = [
        "arm", "verified", "tokens per pass", "wall clock", "temperature 1: tokens per pass", "wall clock",
        "confident at that tau (lossy)", "verified / confident, %", "wall clock, confident",
    ]  # fmt: skip
    return Table("Verified beside believed", columns, rows)


def _or_nothing(found: Sequence[Counts], factor: float = 1.0, digits: int = 2) -> str:
    return with_interval(mean_of(found[0]), factor, digits) if found else ""


def _beside(arms: Mapping[str, Arm], heads: Mapping[str, Arm]) -> Table:
    """The main arms where nothing is lost, and heads on the same backbone, which lose nothing either."""
    rows = []
    for name in (name for name in ("online hard", _LONGER) if name in arms and heads):
        arm = arms[name]
        rows += [
            [name, safe, f"{arm.mean('tokens'):,.0f}", with_interval(mean_of(tokens_per_pass(arm, safe))),
             with_interval(mean_of(tokens_per_pass(arm, safe, "sampled"))), with_interval(mean_of(speed(arm, safe)))]
            for safe in spans_of(arm)[0].ways["sampled"] if safe != PLAIN
        ]  # fmt: skip
    for title, arm in heads.items():
        tokens = [with_interval(mean_of(arm.tokens_per_pass(mode, 3))) for mode in ("greedy", "sampled")]
        clock = with_interval(mean_of(arm.speed_over("greedy", 3, 0)))
        rows.append([title, "3 drafts", f"{arm.mean('tokens'):,.0f}", *tokens, clock])
    columns = ["arm", "way", "tokens trained on", "tokens per pass", "temperature 1", "wall clock over plain"]
    note = (
        "Heads write the backbone's own text, a student its own, which has moved. Wall clocks of heads are of another "
        "sweep on the same kind of core."
    )
    return Table("Beside heads on the same backbone, lossless", columns, rows, note)


def _reliability(arms: Mapping[str, Arm]) -> Table:
    """How often guesses are right of which the student is so sure."""
    rows = []
    for name, arm in arms.items():
        bins = [one.slots["reliability"] for one in spans_of(arm)]
        cells = []
        for place in range(len(bins[0])):
            tokens = sum(of_seed[place]["tokens"] for of_seed in bins)
            right = sum((of_seed[place]["agreement"] or 0) * of_seed[place]["tokens"] for of_seed in bins)
            cells.append(f"{100 * right / tokens:.0f} ({tokens:,.0f})" if tokens else "–")
        rows.append([name, *cells])
    bins = spans_of(next(iter(arms.values())))[0].slots["reliability"]
    edges = [f"{one['low']:.1f} to {one['high']:.1f}" for one in bins]
    note = "Per cent of guesses that are the teacher's token, by the probability that the student gives them (of many)."
    return Table("Is confidence worth its name?", ["arm", *edges], rows, note)


def _panels(arms: Mapping[str, Arm], heads: Mapping[str, Arm]) -> list[dict[str, Any]]:
    """The frontier by passes and by wall clock, heads on the same backbone in it; and what training came to."""
    found: dict[str, dict[str, Interval]] = {}
    named: dict[str, Arm] = {}
    main = next((name for name in (_LONGER, "online hard") if name in arms), None)
    for name, arm in arms.items():
        named[name] = arm
        found[name] = {way: mean_of(teacher_ce(arm, way)) for way in _names(arm) if way.startswith("confident")}
    if main is not None:
        safe, own = f"{main}, verified", mean_of(teacher_ce(arms[main], PLAIN))
        named[safe] = arms[main]
        found[safe] = {way: own for way in _names(arms[main]) if way.startswith("verified")}
    by_pass, by_clock = (
        {
            name: line({mean_of(figure(named[name], way)).mean: quality for way, quality in points.items()})
            for name, points in found.items()
        }
        for figure in (tokens_per_pass, speed)
    )
    for title, arm in heads.items():
        label, nothing = f"{title}, {arm.mean('tokens'):,.0f} tokens", Interval(0.0, 0.0, 0.0)
        by_pass[label] = line({mean_of(arm.tokens_per_pass("greedy", 3)).mean: nothing})
        by_clock[label] = line({mean_of(arm.speed_over("greedy", 3, 0)).mean: nothing})
    whole = {
        name: line({mean_of(tokens_per_pass(arm, way)).mean: mean_of(teacher_ce(arm, way)) for way in static})
        for name, arm in arms.items()
        if (static := [way for way in _names(arm) if way.startswith("static")])
    }
    y = "teacher CE, nats per token"
    return [
        {"title": "confident, tau 0.99 to 0.6; lossless", "x": "tokens per pass", "y": y, "lines": by_pass},
        {"title": "the same in wall clock", "x": "tokens per second over plain", "y": y, "lines": by_clock},
        {"title": "static, k of 2 to 5", "x": "tokens per pass", "y": y, "lines": whole},
        {"title": "slot 2, verified, in training", "x": "steps", "y": "share that stands", "lines": _curves(arms)},
    ]


def _curves(arms: Mapping[str, Arm]) -> dict[str, Any]:
    """How often the second token of a span is what the student itself writes after the first, as it is trained: a mean
    over seeds."""
    figure, lines = "decoded/slot_2/conditional", {}
    for name, arm in arms.items():
        by_step: dict[int, list[float]] = {}
        for point in (point for row in arm.rows for point in row.curve if point.get(figure) is not None):
            by_step.setdefault(point["step"], []).append(point[figure])
        points = [(step, float(np.mean(shares))) for step, shares in by_step.items() if len(shares) == len(arm.rows)]
        lines |= {name: points} if points else {}
    return lines


def heads_beside(folder: pathlib.Path, inputs: Sequence[tuple[str, str]]) -> dict[str, Arm]:
    """Heads on the same backbone, from the rows of ``experiments.posthoc`` in a folder that were made from the same."""
    file = folder / INPUTS
    if not file.exists() or read_json(file).get("posthoc") != dict(inputs):
        return {}
    rows = read_rows(folder / "posthoc.jsonl")
    found = {}
    for name, title in _HEADS.items():
        own = [row for row in rows if row.variant == name]
        if own:
            found[title] = Arm(title, own)
    return found
