"""The paper's claims on standalone MTP, as pairs of arms: text at equal speed, and speed where nothing is lost."""

from collections.abc import Iterator, Mapping

from experiments.standalone_figures import at_equal_speed, cost_of_believing, own_name, teacher_ce, tokens_per_pass
from experiments.sweep.arms import Arm, gain, paired
from experiments.sweep.report import Table, per_seed, verdict, with_interval
from mtpd_jax.evaluation.statistics import Interval, mean_of

# What claims about text are read at: spans that are believed whole, where arms are equally fast.
_READ_AT = ("static 2", "static 4")
_FRONTIERS = ("static", "confident")
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

_OF_TEXT = ("gain in teacher CE", "per seed", "better text", "of it, what believing costs", "better guesses")


def tables_of_claims(arms: Mapping[str, Arm]) -> list[Table]:
    """What one change is worth: at single lengths, over whole frontiers, and when all guesses are verified."""
    return [
        *(_claims(arms, way) for way in _READ_AT),
        *(_equal_speed(arms, strategy) for strategy in _FRONTIERS),
        _lossless_claims(arms),
    ]


def _pairs(arms: Mapping[str, Arm]) -> Iterator[tuple[tuple[str, str], tuple[Arm, Arm]]]:
    """The claims, each in the words of the first two columns, of which both arms were run."""
    for what, before, after in _CLAIMS:
        if pair := paired(arms, after, before):
            yield (what, f"{after} over {before}"), pair


def _claims(arms: Mapping[str, Arm], way: str) -> Table:
    rows = []
    for claim, pair in _pairs(arms):
        if not all(own_name(arm, way) for arm in pair):
            continue
        tokens, _ = gain(*pair, lambda arm: tokens_per_pass(arm, way))
        ce, seeds = gain(*pair, lambda arm: teacher_ce(arm, way))
        believing, _ = gain(*pair, lambda arm: cost_of_believing(arm, way))
        speed = with_interval(tokens, signed=True)
        rows.append([*claim, speed, *_of_text(ce, seeds, believing)])
    columns = ["change", "arms", "gain in tokens per pass", *_OF_TEXT]
    note = (
        "A gain in teacher CE is worse text. It has two parts: how far the student's own text, written one token at a "
        "time, has moved from the teacher's, and what believing adds to that."
    )
    return Table(f"The paper's claims, at {way}", columns, rows, note)


def _equal_speed(arms: Mapping[str, Arm], strategy: str) -> Table:
    """The paper's claims on whole frontiers, and at no one threshold."""
    rows = []
    for claim, pair in _pairs(arms):
        found = at_equal_speed(*pair, strategy)
        rows.append([*claim, f"1 to {found.reach:.2f}", *_of_text(found.ce, found.seeds, found.believing)])
    columns = ["change", "arms", "tokens per pass", *_OF_TEXT]
    note = (
        "The mean distance of the two frontiers over the tokens per pass that both come to, from plain decoding on: "
        "the area between them over its breadth. A gain is worse text."
    )
    return Table(f"The paper's claims at equal speed, {strategy}", columns, rows, note)


def _of_text(ce: Interval, seeds: list[float], believing: Interval) -> list[str]:
    """Cells under ``_OF_TEXT``: what a change does to text, of which a gain in nats is a loss."""
    return [
        with_interval(ce, signed=True), per_seed(seeds, 1, 2), verdict(_less(ce), len(seeds)),
        with_interval(believing, signed=True), verdict(_less(believing), len(seeds)),
    ]  # fmt: skip


def _lossless_claims(arms: Mapping[str, Arm]) -> Table:
    """What a change is worth where nothing is lost: every guess risked, and verified."""
    rows = []
    for claim, pair in _pairs(arms):
        gained, seeds = gain(*pair, lambda arm: tokens_per_pass(arm, "verified"))
        both = [with_interval(mean_of(tokens_per_pass(arm, "verified"))) for arm in pair]
        worth = [with_interval(gained, signed=True), per_seed(seeds, 1, 2), verdict(gained, len(seeds))]
        rows.append([*claim, *both, *worth])
    columns = ["change", "arms", "tokens per pass", "before", "gain", "per seed", "more tokens per pass"]
    note = "Each arm with its own longest spans. The text is the student's own, one token at a time: see drift."
    return Table("The paper's claims, when all guesses are verified", columns, rows, note)


def _less(gained: Interval) -> Interval:
    """The same with its sign turned."""
    return Interval(*(None if end is None else -end for end in (gained.mean, gained.high, gained.low)))
