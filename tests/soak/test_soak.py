"""A few seconds of the soak, and that it notices what it is for."""

import collections
import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.soak.commands import PHASES, Outcome, place_of
from tests.soak.faults import all_faults
from tests.soak.inputs import all_inputs
from tests.soak.run import QUOTAS, Result, plan, table

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_some_of_it(tmp_path):
    """In processes of its own: forks of this one would begin with devices and threads."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    command = [sys.executable, "-m", "tests.soak.run", "--minutes=0.35", "--seed=3", f"--json={tmp_path / 'soak.json'}"]
    found = subprocess.run([*command, "--workers=1"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    rows = json.loads((tmp_path / "soak.json").read_text())["rows"]
    # As many as there was time for, each of another kind at first.
    assert rows and len({row["kind"] for row in rows[:3]}) == len(rows[:3])
    assert "survived" in found.stdout


def test_a_whole_soak_covers_what_it_promises():
    faults = [*all_faults(with_disk=True), *all_inputs()]
    names = [fault.name for fault in faults]
    assert len(set(names)) == len(names)
    phases = {name.split(": ")[1] for name in names if name.startswith("SIGKILL in train")}
    assert len(phases) >= 12
    distinct = collections.Counter(fault.kind for fault in faults)
    assert distinct["input"] >= 300 and distinct["disk"] >= 20

    def first(count, seed=0, only=""):
        return [(fault.kind, fault.name, moment) for fault, moment in itertools.islice(plan(seed, True, only), count)]

    planned = first(sum(QUOTAS.values()))
    tried = collections.Counter(kind for kind, *_ in planned)
    assert all(tried[kind] >= number for kind, number in QUOTAS.items())
    assert {name for kind, name, _ in planned if kind == "kill"} == {f.name for f in faults if f.kind == "kill"}
    assert planned == first(len(planned)) != first(len(planned), seed=1)
    assert {kind for kind, *_ in first(20, only="bit flipped")} == {"flip"}


@pytest.mark.parametrize(("command", "phase"), [(command, phase) for command in PHASES for phase in PHASES[command]])
def test_phases_are_where_they_are_said_to_be(command, phase):
    owner, name = place_of(command, phase)
    assert callable(getattr(owner, name)) and name in vars(owner)


@pytest.mark.parametrize(
    ("status", "errors", "allowed", "wrong"),
    [
        (0, "", (0,), None),
        (0, "/w: training 3 parameters for 4 steps\nstep 4/4  loss 1\nnothing is held out: x\n", (0,), None),
        (2, "error: no such file\n", (0, 2), None),
        (None, "", (0,), "hung"),
        (-11, "", (0, 2), "exit status -11"),
        (2, "Traceback (most recent call last):\nerror: x\n", (2,), "says 'Traceback"),
        (0, "WARNING:absl:something\n", (0,), "says 'WARNING"),
        (2, "", (2,), "with 0 lines of error"),
        (2, "error: x\nerror: y\n", (2,), "with 2 lines of error"),
        (0, "error: x\n", (0,), "with 1 lines of error"),
    ],
)
def test_what_a_command_may_say(status, errors, allowed, wrong):
    found = Outcome(status, "", errors).complaint(*allowed)
    assert found is None if wrong is None else wrong in found


def test_the_table_counts_distinct_faults():
    results = [
        Result("kill", "a", "0/0", None, 1.0),
        Result("kill", "a", "0/1", "hung", 2.0),
        Result("flip", "b", "0/2", None, 3.0),
    ]
    shown = table(results)
    cells = list(zip(*(column.cells for column in shown.columns), strict=True))
    assert cells == [
        ("kill", "2", "1", "1", "0", "1.5"),
        ("flip", "1", "1", "1", "1", "3.0"),
        ("all", "3", "2", "2", "1", "2.0"),
    ]
