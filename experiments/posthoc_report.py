"""The page of ``experiments.posthoc``: every arm, and what one change at a time is worth."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.sweep.arms import Arm, gain, paired
from experiments.sweep.report import Report, Table, line, per_seed, share, verdict, with_interval
from experiments.sweep.runs import Variant
from experiments.sweep.scale import Scale
from experiments.variants import MODES
from mtpd_jax.evaluation.statistics import Counts, mean_of

_HEADS = 3
# What the figure varies.
_MAIN = ("shared", "kl", "pre", "text")
# Of every arm that names none.
SEEDS = (0, 1, 2)
_CAVEATS = {
    "stories_656k": "TinyStories-656K is somebody else's: whether it was trained on our held-out stories is not known.",
}
# What is changed, by the place of its word in an arm's name: from the first to the second.
_CHANGES = (
    ("KL in place of LM loss", 1, "lm", "kl"),
    ("own generations in place of text", 3, "text", "own"),
    ("a second stage after the first", 2, "pre", "both"),
    ("a short stage alone in place of a long one", 2, "pre", "fine"),
    ("a shared cache in place of one per depth", 0, "recurrent", "shared"),
    ("a cascade in place of a recurrent head", 0, "recurrent", "cascade"),
)


def report(
    arms: Mapping[str, Arm], scale: Scale, sizes: Mapping[str, Any], wanted: Callable[[Scale], Sequence[Variant]]
) -> Report:
    """Every arm, what changes are worth, and decoding during training.

    Args:
      arms: that have rows.
      scale: of them.
      sizes: how much was trained, by name; see ``posthoc.Sizes``.
      wanted: the arms that there are to be.
    """
    digests = ", ".join(f"{name} `{digest[:16]}`" for name, digest in scale.inputs if name != "generations")
    text = (
        f"Three depths on a frozen backbone ({scale.name}; {digests}), {scale.texts} beginnings of held-out stories of "
        f"{scale.prompt_tokens} tokens, continued by {scale.new_tokens}, one at a time. An arm is named by its kind, "
        f"its loss, its stages (`pre`: a long first stage, {sizes['pre']} steps; `fine`: a short one alone, "
        f"{sizes['fine']} steps; `both`: one on text, then the short one) and the data of its last stage: text, or "
        f"what the backbone wrote at temperature 1 after {sizes['generations']:,} beginnings of it. The checkpoint is "
        "the one that decoded best while it was trained, on other prompts. Intervals in brackets: 95 %, paired "
        "bootstrap over seeds and then held-out texts."
    )
    if scale.name in _CAVEATS:
        text += f" {_CAVEATS[scale.name]}"
    missing = left_out(arms, wanted(scale), SEEDS)
    text += f"\n\nLeft out: {missing}." if missing else ""
    tables = [_all(arms), *(_changes(arms, mode) for mode in MODES)]
    return Report("Post-hoc heads", text, tables, _panels(arms))


def left_out(arms: Mapping[str, Arm], wanted: Sequence[Variant], all_seeds: Sequence[int]) -> str:
    """The seeds without a row, by arm: nothing where there are all."""
    lacking: dict[tuple[int, ...], list[str]] = {}
    for variant in wanted:
        there = arms[variant.name].seeds if variant.name in arms else []
        seeds = tuple(seed for seed in (all_seeds if variant.seeds is None else variant.seeds) if seed not in there)
        if seeds:
            lacking.setdefault(seeds, []).append(variant.name)
    return "; ".join(
        f"seed{'s' * (len(seeds) > 1)} {' and '.join(map(str, seeds))} of "
        f"{'every arm' if len(names) == len(wanted) else ', '.join(names)}"
        for seeds, names in lacking.items()
    )


def _all(arms: Mapping[str, Arm]) -> Table:
    rows = []
    for name, arm in arms.items():
        accepted = [share(mean_of(arm.conditional("sampled", _HEADS, k))) for k in range(1, _HEADS + 1)]
        decoded = [
            with_interval(mean_of(figure))
            for mode in MODES
            for figure in (arm.tokens_per_pass(mode, _HEADS), arm.speed_over(mode, _HEADS, 0))
        ]
        rows.append([name, *accepted, *decoded])
    columns = ["arm", *(f"accepted {k}, %" for k in range(1, _HEADS + 1))]
    for label in MODES.values():
        columns += [f"tokens per pass, {label}", f"wall clock over plain, {label}"]
    note = "Accepted: conditional acceptance of each depth at temperature 1."
    return Table("Every arm", columns, rows, note)


def _changes(arms: Mapping[str, Arm], mode: str) -> Table:
    """One change at a time, the rest of the arm as it is."""
    rows = []

    def figure(arm: Arm) -> Counts:
        return arm.tokens_per_pass(mode, _HEADS)

    for what, place, before, after in _CHANGES:
        for name in arms:
            words = name.split()
            if words[place] == after:
                base = " ".join([*words[:place], before, *words[place + 1 :]])
                # A second stage on own text is beside the first, which was on text.
                if place == 2 and after == "both":
                    base = " ".join([*words[:2], "pre", "text"])
                rows += _row(arms, what, name, base, figure)
    columns = ["change", "arm", "before", "after", "gain in tokens per pass", "per seed", "better"]
    return Table(f"One change at a time, {MODES[mode]}", columns, rows)


def _row(arms: Mapping[str, Arm], what: str, name: str, base: str, figure: Callable[[Arm], Counts]) -> list[list[str]]:
    pair = paired(arms, name, base)
    if pair is None:
        return []
    gained, seeds = gain(*pair, figure)
    before, after = (with_interval(mean_of(figure(arm))) for arm in reversed(pair))
    cells = [with_interval(gained, signed=True), per_seed(seeds, 1, 2), verdict(gained, len(seeds))]
    return [[what, name, before, after, *cells]]


def _panels(arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    """Acceptance by depth, and decoding in first stages: of the main arm, and with one thing changed at a time."""
    pre = {
        name: arm
        for name, arm in arms.items()
        if " pre " in name and sum(a != b for a, b in zip(name.split(), _MAIN, strict=True)) <= 1
    }
    by_depth = {
        name: line({k: mean_of(arm.conditional("sampled", _HEADS, k)) for k in range(1, _HEADS + 1)}, 100)
        for name, arm in pre.items()
    }
    curves = {
        name: [
            (point["step"] * arm.rows[0].tokens / arm.rows[0].steps / 1000, point["decoded/tokens_per_pass"])
            for point in arm.rows[0].curve
            if point.get("decoded/tokens_per_pass")
        ]
        for name, arm in pre.items()
    }
    return [
        {"title": "conditional acceptance, temperature 1", "x": "depth", "y": "%", "lines": by_depth},
        {"title": "greedy, in training", "x": "thousand tokens of training", "y": "tokens per pass", "lines": curves},
    ]
