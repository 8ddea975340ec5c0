"""Mutation testing: every one-line fault of ``mutants.toml`` against the tests that should notice it.

``python -m tests.mutation.run [--only=WORD] [--json=FILE]`` copies the checkout once per worker, makes one change at a
time, runs the tests named beside it, and prints a table of what survived. A mutant with a ``proof`` changes nothing
that can be observed, and the line says why; one that a test notices all the same is reported, too. The tests themselves
are run once without any change before: a red test notices nothing.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib

import rich.console
import rich.progress

from mtpd_jax.evaluation.report import new_table

ROOT = pathlib.Path(__file__).parents[2]
MUTANTS = pathlib.Path(__file__).with_name("mutants.toml")
COPIED = ("mtpd_jax", "experiments", "configs", "tests", "pyproject.toml", "README.md", "Makefile")
TIMEOUT_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
      file: the file that is changed.
      old, new: a text that stands in it exactly once, and what takes its place.
      tests: arguments of pytest: what should notice.
      proof: why nothing can notice; empty if something should.
    """

    file: str
    old: str
    new: str
    tests: str
    proof: str = ""

    def apply(self, root: pathlib.Path) -> None:
        """Changes a checkout.

        Raises:
          ValueError: the old text does not stand in the file exactly once.
        """
        path = root / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file}: {text.count(self.old)} places with {self.old!r}, expected one")
        path.write_text(text.replace(self.old, self.new))

    @property
    def name(self) -> str:
        """The change on one line."""
        return " ".join(f"{self.file.removeprefix('mtpd_jax/')}: {self.old} → {self.new or '(nothing)'}".split())


def load(path: pathlib.Path = MUTANTS) -> list[Mutant]:
    """The mutants, in the order of the file."""
    tree = tomllib.loads(path.read_text())
    return [Mutant(file=group["file"], **mutant) for group in tree["file"] for mutant in group["mutant"]]


def run_tests(root: pathlib.Path, tests: str) -> str:
    """What became of the tests in a checkout: passed, failed, "timeout", "signal", or what kept them from running."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "slow or not slow",
        *shlex.split(tests),
    ]
    with subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and whatever the tests have started
            return "timeout"
    if process.returncode < 0:
        return "signal"
    if process.returncode == 0 and " passed" not in output.splitlines()[-1]:
        return "nothing ran"  # all of it was skipped
    return {0: "passed", 1: "failed"}.get(process.returncode, f"pytest exits with {process.returncode}")


def outcome(mutant: Mutant, root: pathlib.Path) -> str:
    """Applies a mutant, runs its tests, and takes it back: killed, SURVIVED, equivalent, or what else was wrong."""
    original = (root / mutant.file).read_text()
    try:
        mutant.apply(root)
        found = run_tests(root, mutant.tests)
    except ValueError as error:
        return f"NOT APPLIED: {error}"
    finally:
        (root / mutant.file).write_text(original)
    if mutant.proof:
        return "equivalent" if found == "passed" else "NOTICED, though proven to change nothing"
    return {"passed": "SURVIVED", "failed": "killed", "timeout": "killed (timeout)", "signal": "killed (signal)"}.get(
        found, f"NOT RUN: {found}"
    )


def copies(folder: pathlib.Path, count: int) -> "queue.Queue[pathlib.Path]":
    """Checkouts to work in, one per worker."""
    roots: queue.Queue[pathlib.Path] = queue.Queue()
    for number in range(count):
        root = folder / str(number)
        root.mkdir()
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, root / name)
        (ROOT / ".cache").mkdir(exist_ok=True)
        (root / ".cache").symlink_to(ROOT / ".cache")  # compiled programs, and libtpu
        roots.put(root)
    return roots


def main() -> int:
    """Parses the flags, runs, prints the table; status 1 if anything survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run", description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose file or change holds this word")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="tests at a time (default: cores)")
    parser.add_argument("--json", type=pathlib.Path, help="write the outcomes here")
    flags = parser.parse_args()
    mutants = [mutant for mutant in load() if flags.only in mutant.name or flags.only in mutant.file]
    console = rich.console.Console()
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(flags.workers) as pool:
        roots = copies(pathlib.Path(folder), flags.workers)

        def in_a_copy(work, *arguments):
            root = roots.get()
            try:
                return work(*arguments, root)
            finally:
                roots.put(root)

        selections = list(dict.fromkeys(mutant.tests for mutant in mutants))
        with rich.progress.Progress(console=rich.console.Console(stderr=True)) as progress:
            task = progress.add_task("without changes, then mutants", total=len(selections) + len(mutants))

            def mapped(work, items):
                for found in pool.map(lambda item: in_a_copy(work, item), items):
                    progress.advance(task)
                    yield found

            clean = list(mapped(lambda tests, root: run_tests(root, tests), selections))
            red = [f"{tests}: {found}" for tests, found in zip(selections, clean, strict=True) if found != "passed"]
            if red:
                console.print("without any change: " + "; ".join(red), style="red")
                return 1
            outcomes = list(mapped(outcome, mutants))
    report(console, mutants, outcomes)
    if flags.json:
        rows = [{**dataclasses.asdict(m), "outcome": found} for m, found in zip(mutants, outcomes, strict=True)]
        flags.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return int(any(not found.startswith(("killed", "equivalent")) for found in outcomes))


def report(console: rich.console.Console, mutants: list[Mutant], outcomes: list[str]) -> None:
    """Counts by folder, then every mutant that was not killed."""
    table = new_table("mutants", ("module", "mutants", "killed", "equivalent", "survived"), left=("module",))
    by_module = collections.defaultdict(list)
    for mutant, found in zip(mutants, outcomes, strict=True):
        by_module[mutant.file.removeprefix("mtpd_jax/")].append(found)
    everything = [found for each in by_module.values() for found in each]
    for module, found in [*sorted(by_module.items()), ("all", everything)]:
        counts = [sum(one.startswith(kind) for one in found) for kind in ("killed", "equivalent")]
        table.add_row(module, str(len(found)), *map(str, counts), str(len(found) - sum(counts)))
    console.print(table)
    for mutant, found in zip(mutants, outcomes, strict=True):
        if found != "killed":
            console.print(f"{found}: {mutant.name}" + (f"\n    {mutant.proof}" if mutant.proof else ""), markup=False)


if __name__ == "__main__":
    raise SystemExit(main())
