"""The page of ``experiments.standalone``: every arm and way, speed beside quality, and what one change is worth."""

import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.posthoc_report import left_out
from experiments.pretrained import INPUTS
from experiments.standalone_claims import tables_of_claims
from experiments.standalone_figures import (
    as_teacher,
    distinct_4grams,
    fell,
    kept,
    mean_of_means,
    names_of,
    places_per_token,
    same,
    spans_of,
    speed,
    stood,
    teacher_ce,
    tokens_per_pass,
    ways_of,
)
from experiments.sweep.arms import Arm
from experiments.sweep.report import Report, Table, line, with_interval
from experiments.sweep.rows import read_rows
from experiments.sweep.runs import Variant
from experiments.sweep.scale import Scale
from mtpd_jax.data.files import read_json
from mtpd_jax.evaluation.quality import PLAIN
from mtpd_jax.evaluation.report import number, percent
from mtpd_jax.evaluation.statistics import Counts, Interval, mean_of

SEEDS = (0, 1, 2)
UNTRAINED, TWICE, LONGER = "before training", "online hard twice as long", "longer online hard"
# The main arm by how long it was trained.
_BY_LENGTH = (UNTRAINED, "online hard", TWICE, LONGER)
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
    text += "\n\nIn no arm: spans whose slots read each other in both directions, and other learning rates."
    tables = [
        _drift(arms),
        _training(arms),
        *(_ways(name, arm) for name, arm in arms.items()),
        _sampled(arms),
        *tables_of_claims(arms),
        _verified(arms),
        _lengths(arms),
        _beside(arms, heads),
        _chains(arms),
        _reliability(arms),
    ]
    return Report("Standalone MTP", text, tables, _panels(arms, heads))


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


def _training(arms: Mapping[str, Arm]) -> Table:
    """What more steps of the main arm bring, from before the first one."""
    rows = []
    for arm in (arms[name] for name in _BY_LENGTH if name in arms):
        slots = [[one.slots["slots"][place]["agreement"] for one in spans_of(arm)] for place in (1, 3)]
        ways = ("verified 2", "verified 3", "verified", "confident at 0.6", "confident at 0.9")
        rows.append([
            f"{_steps(arm):,.0f}", " ".join(map(str, arm.seeds)), *map(_over_seeds, slots),
            *(with_interval(mean_of(tokens_per_pass(arm, way))) for way in ways),
        ])  # fmt: skip
    columns = [
        "steps", "seeds", "slot 2", "slot 4", "verified 2", "verified 3", "verified, longest", "confident at 0.6",
        "confident at 0.9",
    ]  # fmt: skip
    note = "Online hard: agreement with the teacher, in per cent, and tokens per pass."
    return Table("How far training has come", columns, rows if len(rows) > 1 else [], note)


def _ways(name: str, arm: Arm) -> Table:
    rows = []
    for way in names_of(arm):
        rows.append([
            way, "no" if ways_of(arm, way)[0].lossless else "**yes**",
            with_interval(mean_of(tokens_per_pass(arm, way))), number(mean_of(mean_of_means(arm, way)).mean),
            number(mean_of(places_per_token(arm, way)).mean, 1), with_interval(mean_of(speed(arm, way))),
            with_interval(mean_of(teacher_ce(arm, way)), signed=True), with_interval(mean_of(kept(arm, way)), 100, 0),
            number(100 * (mean_of(same(arm, way)).mean or 0.0), 0),
            with_interval(mean_of(as_teacher(arm, way)), 100, 0), number(distinct_4grams(arm, way)),
        ])  # fmt: skip
    columns = [
        "way", "lossy", "tokens per pass", "mean over texts", "places read per token", "wall clock over plain",
        "teacher CE", "kept of plain text, %", "texts that are plain's, %", "kept of the teacher's, %",
        "distinct 4-grams",
    ]  # fmt: skip
    return Table(f"{name}, greedy", columns, rows)


def _sampled(arms: Mapping[str, Arm]) -> Table:
    """Speed at temperature 1 beside what is drawn there, which a student that is sure of itself draws from fewer."""
    rows = [
        [
            name, way, with_interval(mean_of(tokens_per_pass(arm, way, "sampled"))),
            with_interval(mean_of(speed(arm, way, "sampled"))),
            with_interval(mean_of(teacher_ce(arm, way, "sampled")), signed=True),
            number(distinct_4grams(arm, way, "sampled")),
        ]
        for name, arm in arms.items()
        for way in names_of(arm, "sampled")
    ]  # fmt: skip
    columns = ["arm", "way", "tokens per pass", "wall clock over plain", "teacher CE", "distinct 4-grams"]
    note = (
        "Nothing is lost of the student's own distribution, which is not the teacher's: hard labels make it narrow, so "
        f"that it draws likelier text, and is more easily guessed. Plain text of `{UNTRAINED}` is drawn by the teacher."
    )
    return Table("At temperature 1, verified", columns, rows, note)


def _verified(arms: Mapping[str, Arm]) -> Table:
    """How much of the speed is left when nothing is lost."""
    rows = []
    for name, arm in arms.items():
        for safe in (way for way in names_of(arm) if way.startswith("verified")):
            lossy = safe.replace("verified", "confident")
            figures = [tokens_per_pass(arm, way) for way in (safe, lossy) if way in names_of(arm)]
            share = [figures[0] * one.inverse() for one in figures[1:]]
            rows.append([
                name, safe, with_interval(mean_of(figures[0])), with_interval(mean_of(speed(arm, safe))),
                _or_nothing([] if " at " in safe else [fell(arm, safe)], 100, 0),
                _or_nothing(figures[1:]), _or_nothing(share, 100, 0), _or_nothing([speed(arm, lossy)] if share else []),
            ])  # fmt: skip
    columns = [
        "arm", "verified", "tokens per pass", "wall clock", "passes in which a guess falls, %",
        "confident at that tau (lossy)", "verified / confident, %", "wall clock, confident",
    ]  # fmt: skip
    note = (
        "A pass after one in which a guess fell has none to verify; a text's last span, which the limit cuts, counts "
        "as fallen. With tau a guess is risked when its own probability and those of the guesses before it are at "
        "least tau; `confident` asks that of a span's first token, too, which verifying need not: hence more than "
        "100 %."
    )
    return Table("Verified beside believed", columns, rows, note)


def _lengths(arms: Mapping[str, Arm]) -> Table:
    """Accepted lengths, with each arm's longest spans."""
    rows = []
    for name, arm in arms.items():
        for way in ("verified", "confident at 0.6", "confident at 0.9"):
            at_least = [1.0, *(mean_of(stood(arm, way, guesses)).mean or 0.0 for guesses in range(1, 5)), 0.0]
            shares = [number(100 * (more - fewer), 0) for more, fewer in itertools.pairwise(at_least)]
            rows.append([name, way, *shares])
    columns = ["arm", "way", *(f"{guesses}" for guesses in range(4)), "4 or more"]
    return Table("Guesses that stood, in per cent of passes", columns, rows)


def _or_nothing(found: Sequence[Counts], factor: float = 1.0, digits: int = 2) -> str:
    return with_interval(mean_of(found[0]), factor, digits) if found else ""


def _beside(arms: Mapping[str, Arm], heads: Mapping[str, Arm]) -> Table:
    """The main arms where nothing is lost, and heads on the same backbone, which lose nothing either."""
    rows = []
    for name in (name for name in ("online hard", LONGER) if name in arms and heads):
        arm = arms[name]
        rows += [
            [name, safe, f"{arm.mean('tokens'):,.0f}", with_interval(mean_of(tokens_per_pass(arm, safe))),
             with_interval(mean_of(tokens_per_pass(arm, safe, "sampled"))), with_interval(mean_of(speed(arm, safe))),
             with_interval(mean_of(teacher_ce(arm, PLAIN)), signed=True)]
            for safe in names_of(arm, "sampled") if safe != PLAIN
        ]  # fmt: skip
    for title, arm in heads.items():
        tokens = [with_interval(mean_of(arm.tokens_per_pass(mode, 3))) for mode in ("greedy", "sampled")]
        clock = with_interval(mean_of(arm.speed_over("greedy", 3, 0)))
        rows.append([title, "3 drafts", f"{arm.mean('tokens'):,.0f}", *tokens, clock, "0, its own text"])
    columns = [
        "arm", "way", "tokens trained on", "tokens per pass", "temperature 1", "wall clock over plain",
        "teacher CE, greedy",
    ]  # fmt: skip
    note = (
        "Heads write the backbone's own text, a student its own, which has moved; what it draws at temperature 1 is "
        "worth what the table of that temperature says. Wall clocks of heads are of another sweep on the same kind of "
        "core."
    )
    return Table("Beside heads on the same backbone, lossless", columns, rows, note)


def _chains(arms: Mapping[str, Arm]) -> Table:
    """How far spans go that are the teacher's all along, and how sure the student is of each slot."""
    rows = []
    for name, arm in arms.items():
        for title, figure in (("all up to this one agree", "chain"), ("how sure", "confidence")):
            found = [[one.slots["slots"][place][figure] for one in spans_of(arm)] for place in range(5)]
            rows.append([name, title, *(_over_seeds([one for one in by_seed if one is not None]) for by_seed in found)])
    note = "In per cent, on held-out text, each slot after the student's own tokens before it."
    return Table("Chains and confidence", ["arm", "", *(f"slot {j}" for j in range(1, 6))], rows, note)


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
    main = next((name for name in (LONGER, "online hard") if name in arms), None)
    for name, arm in arms.items():
        if name == UNTRAINED:  # whose text, believed, can be so bad that the others would be one line
            continue
        named[name] = arm
        found[name] = {way: mean_of(teacher_ce(arm, way)) for way in names_of(arm) if way.startswith("confident")}
    if main is not None:
        safe, own = f"{main}, verified", mean_of(teacher_ce(arms[main], PLAIN))
        named[safe] = arms[main]
        found[safe] = {way: own for way in names_of(arms[main]) if way.startswith("verified")}
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
        if (static := [way for way in names_of(arm) if way.startswith("static")])
    }
    y = "teacher CE, nats per token"
    return [
        {"title": "confident, tau 0.99 to 0.6; lossless", "x": "tokens per pass", "y": y, "lines": by_pass},
        {"title": "the same in wall clock", "x": "tokens per second over plain", "y": y, "lines": by_clock},
        {"title": "static, k of 2 to 5", "x": "tokens per pass", "y": y, "lines": whole},
        {"title": "slot 2, in training", "x": "steps", "y": "agreement with the teacher", "lines": _curves(arms)},
        {"title": "online hard, by steps", "x": "steps", "y": "tokens per pass", "lines": _by_steps(arms)},
    ]


def _by_steps(arms: Mapping[str, Arm]) -> dict[str, Any]:
    """The main arm's tokens per pass by how long it was trained: what believing comes to, and verifying."""
    trained = {_steps(arms[name]): arms[name] for name in _BY_LENGTH if name in arms}
    ways = ("verified", "verified 3", "verified 2", "confident at 0.6", "confident at 0.9")
    return {
        way: line({steps: mean_of(tokens_per_pass(arm, way)) for steps, arm in trained.items()})
        for way in ways if len(trained) > 1
    }  # fmt: skip


def _steps(arm: Arm) -> float:
    """That an arm was trained for; what none has learned from is none."""
    return 0.0 if arm.name == UNTRAINED else arm.mean("steps")


def _curves(arms: Mapping[str, Arm]) -> dict[str, Any]:
    """How often the second slot's choice is the teacher's, on the text of the steps before: a mean over seeds."""
    figure, lines = "slot_2/agreement", {}
    for name, arm in ((name, arm) for name, arm in arms.items() if name != "ground truth"):  # which knows no teacher
        by_step: dict[int, list[float]] = {}
        for point in (point for row in arm.rows for point in row.curve if point.get(figure) is not None):
            by_step.setdefault(point["step"], []).append(point[figure])
        points = [(step, float(np.mean(shares))) for step, shares in by_step.items() if len(shares) == len(arm.rows)]
        lines |= {name: points} if len(points) > 1 else {}
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
