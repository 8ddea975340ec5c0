"""The code version: the same for code that does the same, another for other mathematics, and that of the rows."""

import json
import signal

import pytest

from experiments.standalone import SIZES, variants_of
from experiments.sweep import fingerprint
from experiments.sweep.rows import Row
from experiments.sweep.runner import RESULTS
from mtpd_jax.losses import terms
from mtpd_jax.losses.divergences import forward_kl
from mtpd_jax.losses.objective import HeadsObjectiveConfig
from tests.runs.runs import stop_after


def scaled(behaviour, part, factor):
    """The same with every number of one part scaled, as rounding or a change would."""
    return {**behaviour, part: {name: factor * value for name, value in behaviour[part].items()}}


def test_every_part_is_of_a_family():
    assert {part for parts in fingerprint.FAMILIES.values() for part in parts} == set(fingerprint.PARTS)


def test_rounding_is_no_new_version_and_anything_else_is():
    recorded = fingerprint.recorded()
    version = fingerprint.version_of(recorded)
    assert fingerprint.known_as(recorded) == version
    for part in recorded:
        assert fingerprint.known_as(scaled(recorded, part, 1 + 1e-5)) == version
        assert fingerprint.known_as(scaled(recorded, part, 1.02)) != version
    missing = {name: part for name, part in recorded.items() if name != "recurrent"}
    assert fingerprint.known_as(missing) != version
    more = {**recorded, "joint": {**recorded["joint"], "metrics/9/loss": 1.0}}
    assert fingerprint.known_as(more) != version


# In every run of the tests; the others take half a minute each.
_QUICK = ("divergences",)


@pytest.mark.optimised
@pytest.mark.parametrize(
    "part",
    [pytest.param(part, marks=pytest.mark.slow if part not in _QUICK else ()) for part in fingerprint.PARTS],
)
def test_this_code_does_what_is_recorded(part, tmp_path):
    """With the tests' eight devices and without optimisation, where the record was made with one and with it."""
    with fingerprint.jax.default_matmul_precision("highest"):
        found = fingerprint.PARTS[part](tmp_path)
    family = next(name for name, parts in fingerprint.FAMILIES.items() if part in parts)
    assert fingerprint.changes(found, fingerprint.recorded(family)[part]) == []
    assert len(found) > 30


def test_a_run_that_is_asked_to_stop_names_no_version(monkeypatch, tmp_path):
    stop_after(monkeypatch, 3)
    with pytest.raises(SystemExit) as ended:
        fingerprint.trained("next_token", tmp_path)
    assert ended.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("family", fingerprint.FAMILIES)
def test_the_committed_rows_are_of_the_recorded_version(family):
    version = fingerprint.version_of(fingerprint.recorded(family))
    lines = [line for path in RESULTS.glob("*/*.jsonl") for line in path.read_text().splitlines()]
    rows = [(Row.of(row), row) for row in map(json.loads, lines)]
    # Heads on a frozen backbone are named by their kind or, where joint ones are beside them, as frozen.
    students = {variant.name for sizes in SIZES.values() for variant in variants_of(sizes)}
    names = {"posthoc": ("recurrent ", "shared ", "cascade ", "frozen_"), "standalone": tuple(students)}
    own = [(row, plain) for row, plain in rows if _family(row.variant, names) == family]
    assert {row.code for row, _ in own} <= {version} and own
    assert [row.to_json() for row, _ in own] == [plain for _, plain in own]  # nothing is left out


def _family(variant, names):
    return next((family for family, begin in names.items() if variant.startswith(begin)), "heads")


@pytest.mark.slow
def test_changed_mathematics_of_a_divergence_is_noticed(monkeypatch, tmp_path):
    def changed(sides, vocabulary):
        value, by_heads, by_teacher = forward_kl(sides, vocabulary)
        return value, 1.01 * by_heads, by_teacher

    monkeypatch.setitem(terms.DIVERGENCES, "forward", changed)
    differences = fingerprint.changes(fingerprint.divergences(tmp_path), fingerprint.recorded()["divergences"])
    assert differences and all("gradient" in name for name in differences)
    assert all(name.startswith(("forward", "lk_hybrid")) for name in differences)


def test_changed_mathematics_of_training_is_noticed(monkeypatch, tmp_path):
    """One coefficient, by a tenth."""
    given = HeadsObjectiveConfig.coefficients

    def changed(self, num_heads):
        alpha, beta = given(self, num_heads)
        return tuple(1.1 * value for value in alpha), beta

    monkeypatch.setattr(HeadsObjectiveConfig, "coefficients", changed)
    differences = fingerprint.changes(fingerprint.trained("plain", tmp_path), fingerprint.recorded()["plain"])
    for name in ("metrics/0/loss", "metrics/3/grad_norm", "parameters/"):
        assert any(difference.startswith(name) for difference in differences), (name, differences)
