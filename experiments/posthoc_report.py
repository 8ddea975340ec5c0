"""The page of ``experiments.posthoc``: every arm, and what one change at a time is worth."""

from collections.abc import Callable, Mapping
from typing import Any

from experiments.sweep.arms import Arm, gain, paired
from experiments.sweep.report import Report, Table, line, per_seed, share, verdict, with_interval
from experiments.sweep.scale import Scale
from experiments.variants import MODES
from mtpd_jax.evaluation.statistics import Counts, mean_of

_HEADS = 3
# Four heads each, trained with their backbone and on a frozen one.
JOINT, FROZEN = "joint, 4 heads", "frozen, 4 heads"
# What is changed, by the place of its word in an arm's name: from the first to the second.
_CHANGES = (
    ("KL in place of LM loss", 1, "lm", "kl"),
    ("own generations in place of text", 3, "text", "own"),
    ("a second stage after the first", 2, "pre", "both"),
    ("a short stage alone in place of a long one", 2, "pre", "fine"),
    ("a shared cache in place of one per depth", 0, "recurrent", "shared"),
    ("a cascade in place of a recurrent head", 0, "recurrent", "cascade"),
)


def report(arms: Mapping[str, Arm], scale: Scale, scale_name: str) -> Report:
    """Every arm, what changes are worth, and decoding during training."""
    text = (
        f"Three depths on a frozen backbone ({scale_name}), {scale.texts} beginnings of held-out stories of "
        f"{scale.prompt_tokens} tokens, continued by {scale.new_tokens}, one at a time. An arm is named by its kind, "
        "its loss, its stages (`pre`: a long first stage; `fine`: a short one alone; `both`: one on text, then the "
        "other) and the data of its last stage. The checkpoint is the one that decoded best while it was trained, on "
        "other prompts. Intervals in brackets: 95 %, paired bootstrap over seeds and then held-out texts."
    )
    tables = [_all(arms), *(_changes(arms, mode) for mode in MODES), _freezing(arms)]
    return Report("Post-hoc heads", text, tables, _panels(arms))


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
            if name not in (JOINT, FROZEN) and words[place] == after:
                base = " ".join([*words[:place], before, *words[place + 1 :]])
                # A second stage on own text is beside the first, which was on text.
                if place == 2 and after == "both":
                    base = " ".join([*words[:2], "pre", "text"])
                rows += _row(arms, what, name, base, figure)
    columns = ["change", "arm", "before", "after", "gain in tokens per pass", "per seed", "better"]
    return Table(f"One change at a time, {MODES[mode]}", columns, rows)


def _freezing(arms: Mapping[str, Arm]) -> Table:
    """What it costs that the backbone does not learn with its heads, and what it saves."""
    rows = []
    for name in (JOINT, FROZEN):
        if name in arms:
            arm = arms[name]
            accepted = [share(mean_of(arm.conditional("sampled", 4, k))) for k in range(1, 5)]
            decoded = [
                with_interval(mean_of(figure))
                for mode in MODES
                for figure in (arm.tokens_per_pass(mode, 4), arm.speed_over(mode, 4, 0))
            ]
            ce = with_interval(mean_of(arm.main_ce()), digits=3)
            rows.append([name, ce, f"{arm.mean('training_flops'):.3g}", *accepted, *decoded])
    columns = ["", "main CE, nats", "training FLOPs", *(f"accepted {k}, %" for k in range(1, 5))]
    for label in MODES.values():
        columns += [f"tokens per pass, {label}", f"wall clock over plain, {label}"]
    note = (
        "As many tokens for the heads of both; the frozen backbone was trained before, on as many, without heads, "
        "which its training FLOPs do not count. Accepted: conditional acceptance at temperature 1."
    )
    return Table("What freezing the backbone costs", columns, rows, note)


def _row(arms: Mapping[str, Arm], what: str, name: str, base: str, figure: Callable[[Arm], Counts]) -> list[list[str]]:
    pair = paired(arms, name, base)
    if pair is None:
        return []
    gained, seeds = gain(*pair, figure)
    before, after = (with_interval(mean_of(figure(arm))) for arm in reversed(pair))
    cells = [with_interval(gained, signed=True), per_seed(seeds, 1, 2), verdict(gained, len(seeds))]
    return [[what, name, before, after, *cells]]


def _panels(arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    """Acceptance by depth, and decoding while the first stages went on."""
    pre = {name: arm for name, arm in arms.items() if " pre " in name}
    by_depth = {
        name: line({k: mean_of(arm.conditional("sampled", _HEADS, k)) for k in range(1, _HEADS + 1)}, 100)
        for name, arm in pre.items()
    }
    curves = {
        name: [
            (point["step"] * arm.rows[0].tokens / arm.rows[0].steps, point["decoded/tokens_per_pass"])
            for point in arm.rows[0].curve
            if point.get("decoded/tokens_per_pass")
        ]
        for name, arm in pre.items()
    }
    return [
        {"title": "conditional acceptance, temperature 1", "x": "depth", "y": "%", "lines": by_depth},
        {"title": "greedy, while training", "x": "tokens of training", "y": "tokens per pass", "lines": curves},
    ]
