"""What each choice in MTP-D's objective is worth (MTP-D, Table 2), with four heads.

``python -m experiments.ablations --scale=cpu --workdir=DIR``: every variant is one change from MTP-D: the detached
teacher, N, beta, what is compared, the temperature, one of the two terms alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

from experiments.sweep.arms import Arm, gain, paired
from experiments.sweep.experiment import Experiment, main
from experiments.sweep.report import Report, Table, line, points, share, verdict, with_interval
from experiments.sweep.runs import Variant
from experiments.sweep.scale import Scale
from experiments.variants import mtp, mtp_d
from mtpd_jax import frontdoor
from mtpd_jax.evaluation.statistics import Counts, mean_of
from mtpd_jax.losses.objective import HeadsObjectiveConfig

HEADS = 4
BASE = mtp_d(HEADS)
CE_ONLY = mtp(HEADS)
BETAS = (0.25, 1.0, 1.5)

Figure = Callable[[Arm], Counts]

FIGURES: dict[str, Figure] = {
    "agreement, head 1": lambda arm: arm.agreement(1),
    "agreement, head 4": lambda arm: arm.agreement(HEADS),
    "cumulative acceptance, head 4": lambda arm: arm.cumulative("sampled", HEADS, HEADS),
}


def tokens_per_pass(arm: Arm) -> Counts:
    """At temperature 1, with all heads."""
    return arm.tokens_per_pass("sampled", HEADS)


def variants(scale: Scale) -> list[Variant]:
    """MTP-D, plain MTP, and every change."""
    changes: dict[str, Mapping[str, Any]] = {
        "no_detach": {"detach_teacher": False},
        **{f"n_{n}": {"top_n": n} for n in _other_sizes(scale)},
        **{f"beta_{beta}": {"beta": beta} for beta in BETAS},
        **{kl: {"kl": kl} for kl in ("reverse", "js", "lk", "lk_hybrid")},
        **{f"temperature_{temperature}": {"temperature": temperature} for temperature in (0.5, 2.0)},
        "kl_only": {"alpha": 0.0},
    }
    changed = [
        Variant(name, {**BASE.diff, **{f"objective.{field}": value for field, value in change.items()}})
        for name, change in changes.items()
    ]
    return [BASE, CE_ONLY, *changed]


def _other_sizes(scale: Scale) -> tuple[int, int, int]:
    """The sizes N of the compared set beside the config's own: 16, a quarter of it, and the whole vocabulary."""
    return 16, _top_n(scale) // 4, scale.config.model.vocabulary_size


def _top_n(scale: Scale) -> int:
    """The size N of the config's own."""
    objective = scale.config.objective
    assert isinstance(objective, HeadsObjectiveConfig)  # every variant trains heads
    return objective.top_n


def report(arms: Mapping[str, Arm], scale: Scale) -> Report:
    """Every variant, its difference from MTP-D, and the paper's claims."""
    text = (
        f"MTP-D as it stands has N = {_top_n(scale)}, beta 0.5, forward KL at temperature 1, a "
        "detached teacher. Decoding is at temperature 1. Intervals in brackets: 95 %, paired bootstrap over seeds, "
        "if there are several, and then held-out texts; with one seed they do not know how another would differ."
    )
    found = {name: paired(arms, name, BASE.name) for name in arms if name != BASE.name}
    pairs = {name: pair for name, pair in found.items() if pair is not None}
    tables = [_values(arms), _differences(pairs), _claims(pairs, scale)]
    return Report("Ablations of the objective", text, tables, _panels(arms, scale))


def _values(arms: Mapping[str, Arm]) -> Table:
    rows = []
    for name, arm in arms.items():
        shares = [share(mean_of(figure(arm))) for figure in FIGURES.values()]
        others = [with_interval(mean_of(figure(arm))) for figure in (tokens_per_pass, Arm.main_ce)]
        rows.append([name, *shares, *others])
    columns = ["variant", *(f"{name}, %" for name in FIGURES), "tokens per pass", "main CE, nats"]
    note = f"{CE_ONLY.name} is the cross entropy alone. Agreement is teacher-forced, on held-out texts."
    return Table("Variants", columns, rows, note)


def _differences(pairs: Mapping[str, tuple[Arm, Arm]]) -> Table:
    rows = []
    for name, (arm, base) in pairs.items():
        shares = [points(gain(arm, base, figure)[0]) for figure in FIGURES.values()]
        gains = [gain(arm, base, figure)[0] for figure in (tokens_per_pass, Arm.main_ce)]
        rows.append([name, *shares, *(with_interval(gained, digits=3, signed=True) for gained in gains)])
    columns = ["variant", *(f"{name}, points" for name in FIGURES), "tokens per pass", "main CE, nats"]
    return Table(f"Difference from {BASE.name}", columns, rows)


def _claims(pairs: Mapping[str, tuple[Arm, Arm]], scale: Scale) -> Table:
    """The paper's claims: what a change costs the main head (in nats), or takes from acceptance (in points)."""
    smallest = f"n_{_other_sizes(scale)[0]}"
    dearer = {
        "no_detach": "without the detached teacher the main head is worse",
        "beta_1.5": "beta = 1.5 raises the main head's loss",
    }
    worse = {
        smallest: "too small an N lowers acceptance",
        CE_ONLY.name: "cross entropy alone lowers acceptance",
        "reverse": "forward KL, the paper's choice, beats reverse",
    }
    rows = []
    for name, claim in {**dearer, **worse}.items():
        if name in pairs:
            arm, base = pairs[name]
            if name in dearer:
                found, seeds = gain(arm, base, Arm.main_ce)
                value = f"{with_interval(found, digits=3, signed=True)} nats"
            else:
                found, seeds = gain(base, arm, FIGURES["cumulative acceptance, head 4"])
                value = f"{points(found)} points of cumulative acceptance, head 4"
            rows.append([claim, value, verdict(found, len(seeds))])
    return Table("The paper's claims", ["claim (MTP-D)", "ours", "holds here"], rows)


def _panels(arms: Mapping[str, Arm], scale: Scale) -> list[dict[str, Any]]:
    """Cumulative acceptance of the last head, and the main head's cross entropy, by N and by beta."""
    sweeps = {
        "N": {_top_n(scale): BASE.name, **{n: f"n_{n}" for n in _other_sizes(scale)}},
        "beta": {0.0: CE_ONLY.name, 0.5: BASE.name, **{beta: f"beta_{beta}" for beta in BETAS}},
    }
    figures = {"%": (FIGURES["cumulative acceptance, head 4"], 100.0), "main CE, nats": (Arm.main_ce, 1.0)}
    panels = []
    for label, names in sweeps.items():
        for unit, (figure, factor) in figures.items():
            found = {value: mean_of(figure(arms[name])) for value, name in names.items() if name in arms}
            title = f"{'cumulative acceptance, head 4' if unit == '%' else 'main head'}, by {label}"
            log = {"log": "x"} if label == "N" else {}
            panels.append({"title": title, "x": label, "y": unit, "lines": {"ours": line(found, factor)}, **log})
    return panels


EXPERIMENT = Experiment("ablations", variants, report, seeds=(0,))

if __name__ == "__main__":
    frontdoor.guarded(lambda: main(EXPERIMENT, __doc__))
