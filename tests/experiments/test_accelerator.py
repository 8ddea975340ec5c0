"""The battery for accelerators: all of it in tiny sizes, stopped in the middle; and what ends, crashes or fails."""

import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import rich.console

from experiments.accelerator import exactness
from experiments.accelerator.__main__ import Battery, environment_of
from experiments.accelerator.battery import Case, Piece, Place, Results, run_case
from experiments.accelerator.page import write_page
from experiments.accelerator.piece import PIECES
from experiments.lines import read_lines
from mtpd_jax.train import TrainResult

ROOT = pathlib.Path(__file__).parents[2]
# What a machine that only measures has not.
ABSENT = ("tensorflow_datasets", "pyarrow", "matplotlib")


def command(*flags):
    return [sys.executable, "-m", "experiments.accelerator", *flags]


@pytest.fixture
def environ(tmp_path):
    """That of a machine with one device, on which some packages are not to be had."""
    for name in ABSENT:
        (tmp_path / "absent").mkdir(exist_ok=True)
        (tmp_path / "absent" / f"{name}.py").write_text(f"raise ImportError('{name} is not installed')")
    ours = {"PYTHONPATH": f"{tmp_path / 'absent'}:{ROOT}", "XLA_FLAGS": "", "COLUMNS": "200"}
    return {**os.environ, **ours}


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_all_of_it_in_tiny_sizes_killed_and_continued(tmp_path, environ):
    """Without the packages that it can do without; every case is measured once, and the page shows them all."""
    out, rows = tmp_path / "out", tmp_path / "out" / "results.jsonl"
    flags = [f"--out={out}", f"--workdir={tmp_path / 'work'}", "--tiny"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(*flags), env=environ, cwd=ROOT, stdout=log, stderr=log)
        wait_for(lambda: len(read_lines(rows)) > 4 or process.poll() is not None)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(1.0)  # what it had started is gone, too, and measures no more
        before = rows.read_bytes()
        found = subprocess.run(command(*flags), env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
    assert found.returncode == 0, (tmp_path / "log").read_text()
    assert rows.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    place = Place(out, tmp_path / "work", tiny=True)
    cases = [(piece.name, case.name) for piece in PIECES.values() for case in piece.cases(place)]
    assert [(row["piece"], row["case"]) for row in read_lines(rows)] == cases
    assert all("result" in row and row["environment"]["devices"] == 1 for row in read_lines(rows))
    results = Results(place.out, tiny=True)
    assert all(result.get("ok", True) for result in results.of("exactness").values())
    assert "not measured yet" not in found.stdout and "holds: arrays" in found.stdout
    for result in results.of("profile").values():
        assert (out / result["trace"]).exists() and 0 <= result["idle"] < 1
        assert sum(result["by_place"].values()) > 2 * result["by_place"]["other"]
    check_page(place, tmp_path / "page.md")


def check_page(place, path):
    write_page(place, path)
    text = path.read_text()
    titles = ["The device", "What holds", "The loss", "Training steps", "Attention kernels", "A trained model",
              "Where the time goes: training step", "Rounds of decoding", "What is missing"]  # fmt: skip
    assert [title for title in titles if f"## {title}\n" not in text] == []
    assert text.endswith("## What is missing\n\nNothing.\n") and path.with_suffix(".png").exists()
    results = Results(place.out, tiny=True)
    plain = results.of("decoding")["tiny, prompt 64, batch 2"]["rounds"][0]
    assert f"| tiny | 64 | 2 | 0 | {1e3 * plain['seconds']:.2f} | 1.00 |" in text
    # A figure that is taken out of the folder is not claimed any more.
    lines = [line for line in results.path.read_text().splitlines() if json.loads(line)["piece"] != "trained"]
    results.path.write_text("\n".join(lines) + "\n")
    write_page(place, path)
    assert "A trained model" not in path.read_text() and "- trained: none of its 4 cases" in path.read_text()


def test_the_page_that_is_here_is_that_of_the_results_that_are_here(tmp_path):
    write_page(Place(ROOT / "experiments" / "results" / "accelerator", tmp_path, tiny=False), tmp_path / "page.md")
    page = (ROOT / "docs" / "accelerators.md").read_text()
    assert (tmp_path / "page.md").read_text() == page
    # And the manual says of which machine they are.
    lines = (ROOT / "docs" / "experiments.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| [accelerators"))
    assert ("no machine yet" in row) == ("Nothing has been measured" in page)


def made_up(*outcomes):
    """A piece whose cases return numbers, or raise."""

    def measure(outcome):
        if isinstance(outcome, Exception):
            raise outcome
        return {"value": outcome}

    cases = [Case(f"case {n}", 10.0, lambda outcome=outcome: measure(outcome)) for n, outcome in enumerate(outcomes)]
    return Piece("made up", "", lambda place: cases, str, grace=0.5)


class Scripted(Battery):
    """Whose processes run a script instead of a piece."""

    script = ""

    def command(self, piece, names):
        return [sys.executable, "-c", f"place, names = {str(self.place.out)!r}, {list(names)!r}\n{self.script}"]


def battery(tmp_path, script, seconds):
    made = Scripted(
        Place(tmp_path, tmp_path, tiny=False), time.time() + seconds, rich.console.Console(file=io.StringIO())
    )
    made.script = script
    return made


def test_what_hangs_is_ended_in_time(tmp_path):
    for script in (
        "import time; time.sleep(60)",
        "import signal, time; signal.signal(15, lambda *_: 0); time.sleep(60)",
    ):
        begin, piece = time.monotonic(), made_up(1, 2)
        assert not battery(tmp_path, script, 2.0).run(piece, piece.cases(None))
        assert 1.0 < time.monotonic() - begin < 6.0
    # What was not finished is not what the next call begins with, or nothing behind it would ever be measured.
    results, place = Results(tmp_path, tiny=False), Place(tmp_path, tmp_path, tiny=False)
    assert {case: row["error"] for (_, case), row in results.rows().items()} == {
        "case 0": "not finished when time was up"
    }
    assert [case.name for case in results.missing(piece, place)] == ["case 1", "case 0"]


CRASHES_IN_THE_SECOND = """
import os, pathlib
from experiments.accelerator.battery import Results
for name in names:
    if name == "case 1":
        os.abort()
    Results(pathlib.Path(place), tiny=False).add("made up", name, begin=0.0, result={"value": name})
"""


def test_what_crashes_is_said_and_the_rest_is_measured(tmp_path):
    """The process dies in the second of three cases; the third gets a new one."""
    piece = made_up(1, 2, 3)
    assert battery(tmp_path, CRASHES_IN_THE_SECOND, 60.0).run(piece, piece.cases(None))
    results = Results(tmp_path, tiny=False)
    assert {case: "result" in row for (_, case), row in results.rows().items()} == {
        "case 0": True, "case 1": False, "case 2": True,
    }  # fmt: skip
    assert "status -6" in results.rows()["made up", "case 1"]["error"]
    # An error is no result: the next call tries again.
    assert [case.name for case in results.missing(piece, Place(tmp_path, tmp_path, False))] == ["case 1"]


def test_a_process_that_crashes_on_its_way_out_has_done_its_work(tmp_path):
    piece, script = made_up(1, 2), CRASHES_IN_THE_SECOND.replace("case 1", "none") + "os.abort()"
    assert battery(tmp_path, script, 60.0).run(piece, piece.cases(None))
    assert all("result" in row for row in Results(tmp_path, tiny=False).rows().values())
    assert len(read_lines(tmp_path / "results.jsonl")) == 2


def test_a_process_that_cannot_begin_is_not_begun_again_for_every_case(tmp_path):
    piece = made_up(1, 2)
    with pytest.raises(SystemExit) as ended:
        battery(tmp_path, "import no_such_module", 60.0).run(piece, piece.cases(None))
    assert ended.value.code == 1 and not (tmp_path / "results.jsonl").exists()


def test_without_an_accelerator_only_tiny_sizes_are_for_it(tmp_path):
    flags = [f"--out={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}"]
    found = subprocess.run(command(*flags), cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2 and "error: JAX finds no accelerator here" in found.stderr
    assert not (tmp_path / "out").exists()


def test_a_case_is_measured_or_its_failure_said_or_not_begun(tmp_path):
    place, piece = Place(tmp_path, tmp_path, tiny=False), made_up(7, ValueError("no such kernel"), 8)
    first, second, third = piece.cases(place)
    assert run_case(piece, first, place, time.time() + 60) is True
    assert run_case(piece, second, place, time.time() + 60) is False
    assert run_case(piece, third, place, time.time() + 9) is None  # it takes ten
    results = Results(tmp_path, tiny=False)
    assert results.of("made up") == {"case 0": {"value": 7}}
    assert results.rows()["made up", "case 1"]["error"] == "ValueError: no such kernel"
    assert [case.name for case in results.missing(piece, place)] == ["case 2", "case 1"]


def test_being_asked_to_stop_while_a_run_is_looked_at_is_heeded(tmp_path, monkeypatch):
    """A run that is finished hears of it, too late to end early: the battery is not to go on with its next case."""
    asked = TrainResult(str(tmp_path), 8, finished=True, signal=signal.SIGTERM, tokens=0, parameters=0, seconds=0.0)
    monkeypatch.setattr(exactness.train, "run", lambda *_, **__: asked)
    place = Place(tmp_path, tmp_path, tiny=True)
    case = exactness.cases(place)[1]
    with pytest.raises(SystemExit):
        run_case(PIECES["exactness"], case, place, time.time() + 60)
    assert not Results(tmp_path, tiny=True).rows()


def test_results_are_of_one_device_and_one_size(tmp_path):
    place, piece = Place(tmp_path, tmp_path, tiny=False), made_up(7)
    run_case(piece, piece.cases(place)[0], place, time.time() + 60)
    Results(tmp_path, tiny=False).check_device("cpu")
    with pytest.raises(ValueError, match="holds results of cpu, and this is NVIDIA H200: take another folder"):
        Results(tmp_path, tiny=False).check_device("NVIDIA H200")
    with pytest.raises(ValueError, match="holds results of a machine's sizes, not of --tiny's"):
        Results(tmp_path, tiny=True).rows()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--only=nothing"], "--only=nothing: expected some of device, exactness"),
        pytest.param(["--minutes=0"], "--minutes=0: expected more than none", marks=pytest.mark.slow),
        pytest.param(["--seed=-1"], "--seed=-1: expected 0 to 999", marks=pytest.mark.slow),
        pytest.param(["--tiny", "--page"], "tiny sizes give none", marks=pytest.mark.slow),
    ],
)
def test_bad_flags_are_one_line(flags, said, tmp_path):
    found = subprocess.run(command(f"--out={tmp_path / 'out'}", *flags), cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2 and said in found.stderr and found.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_piece_has_the_flags_that_it_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_some_flag=1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
    place = Place(tmp_path, tmp_path, tiny=False)
    found = environment_of(PIECES["exactness"].cases(place)[0], place)
    assert found["XLA_FLAGS"] == "--xla_some_flag=1 --xla_gpu_deterministic_ops=true"
    assert found["JAX_COMPILATION_CACHE_DIR"] == "/mine"


def test_the_bundle_holds_what_the_tests_run_with(tmp_path):
    """Every name is one of the requirements, and none is what the battery can do without."""
    script, required = (ROOT / "scripts" / "offline_bundle.sh").read_text(), (ROOT / "requirements.txt").read_text()
    (names,) = re.findall(r"^names='(.*)'$", script, re.MULTILINE)
    assert all(f"\n{name}==" in required for name in names.split("|"))
    assert not set(names.split("|")) & {name.replace("_", "-") for name in ABSENT}
    usage = subprocess.run([ROOT / "scripts" / "offline_bundle.sh"], capture_output=True, text=True)
    assert usage.returncode == 2 and usage.stderr.startswith("usage:")
    # Two versions of one package stop the whole installation.
    (tmp_path / "grain-0.1.whl").touch()
    there = subprocess.run([ROOT / "scripts" / "offline_bundle.sh", tmp_path], capture_output=True, text=True)
    assert there.returncode == 2 and "holds wheels already" in there.stderr
