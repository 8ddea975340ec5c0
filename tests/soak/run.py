"""Soak testing: random faults, from a seed, against all commands, on a tiny model, for a given time.

``python -m tests.soak.run [--minutes=55] [--seed=0] [--only=WORD] [--json=FILE]`` kills and interrupts commands in
every phase, fills their disks, flips bits of what they wrote and gives them bad input; then it looks whether they hung,
lost something, took something wrong, or said more than a line. It prints a table of what was tried and what survived,
counted by distinct fault, and exits with status 1 if anything did not survive. Until there is as much of each kind as
``QUOTAS`` wants, kinds take turns; then, until time is over, all there is, again with other moments and places.
"""

import argparse
import collections
import dataclasses
import json
import multiprocessing
import os
import pathlib
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import rich.console
import rich.progress
import rich.table

from mtpd_jax.evaluation.report import new_table
from tests.soak.disks import Disk
from tests.soak.faults import Bench, Fault, MissedError, all_faults
from tests.soak.inputs import all_inputs

# Faults of each kind that a whole soak makes at least.
QUOTAS = {"kill": 100, "signal": 80, "flip": 50, "disk": 40, "input": 300}


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one fault; ``wrong`` is None if it was survived."""

    kind: str
    name: str
    seed: str
    wrong: str | None
    seconds: float
    missed: bool = False


def plan(
    seed: int, with_disk: bool, only: str = "", missed: Mapping[str, int] | None = None
) -> Iterator[tuple[Fault, str]]:
    """Yields faults for ever, each with the seed of its moments and places; first what ``QUOTAS`` asks for.

    Args:
      seed: decides all of it.
      with_disk: whether there is a small disk.
      only: a part of the names of faults.
      missed: how many of each kind did not come to pass, as whoever makes them happen counts.
    """
    rng = random.Random(seed)
    kinds: dict[str, list[Fault]] = collections.defaultdict(list)
    for fault in [*all_faults(with_disk), *all_inputs()]:
        if only in f"{fault.kind} {fault.name}":
            kinds[fault.kind].append(fault)
    if not kinds:
        raise SystemExit(f"--only={only}: no fault of that name")
    for faults in kinds.values():
        rng.shuffle(faults)
    wanted = {kind: max(1, QUOTAS[kind]) for kind in kinds}
    done = dict.fromkeys(kinds, 0)
    for number in range(10**9):
        # The kind that is furthest behind its quota.
        kind = min(kinds, key=lambda kind: (done[kind] - (missed or {}).get(kind, 0)) / wanted[kind])
        yield kinds[kind][done[kind] % len(kinds[kind])], f"{seed}/{number}"
        done[kind] += 1


def work(root: pathlib.Path, name: str, todo: Any, results: Any) -> None:
    """A worker: takes faults until there is no more, each in a folder that is empty."""
    warnings.simplefilter("ignore")  # of forks: nothing was started that could be lost in them
    disk = small_disk(root / f"disk-{name}")
    bench = Bench(root, root / f"scratch-{name}", disk)
    known = {fault.name: fault for fault in [*all_faults(disk is not None), *all_inputs()]}
    import_commands()
    try:
        while (item := todo.get()) is not None:
            fault, seed = known[item[0]], item[1]
            bench.clear()
            start = time.monotonic()
            try:
                wrong = fault.happen(bench, random.Random(seed))
            except MissedError:
                results.put(Result(fault.kind, fault.name, seed, None, 0.0, missed=True))
                continue
            except Exception as error:  # the soak goes on, and shows it
                wrong = f"the soak itself: {type(error).__name__}: {error}"
            results.put(Result(fault.kind, fault.name, seed, wrong, time.monotonic() - start))
    finally:
        if disk is not None:
            disk.remove()


def import_commands() -> None:
    """Imports what the commands need, and starts nothing: forks go on from here."""
    from mtpd_jax import evaluate, generate, train  # noqa: F401


def small_disk(place: pathlib.Path) -> Disk | None:
    """A disk to fill up, or None where mounting one is refused."""
    try:
        return Disk(place)
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None


def soak(minutes: float, seed: int, only: str = "", workers: int = 2) -> list[Result]:
    """Makes faults happen for so many minutes; returns what came of each."""
    root = pathlib.Path(tempfile.mkdtemp(prefix="soak-"))
    # Programs are compiled once for all.
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(root / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    os.environ |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(root / "cache"), "PYTHONPATH": str(pathlib.Path.cwd())}
    # Relative names, which bad flags give, are in nobody's way here.
    (root / "beside").mkdir()
    os.chdir(root / "beside")
    context = multiprocessing.get_context("spawn")
    todo, results = context.Queue(), context.Queue()
    try:
        _prepared(root, context)
        deadline = time.monotonic() + 60 * minutes
        disk = small_disk(root / "disk")
        if disk is not None:
            disk.remove()
        else:
            print("no small disk can be mounted here: full disks are not tried", file=sys.stderr)
        started = [context.Process(target=work, args=(root, str(n), todo, results)) for n in range(workers)]
        for process in started:
            process.start()
        missed: collections.Counter[str] = collections.Counter()
        faults = plan(seed, disk is not None, only, missed)
        found = _collect(faults, todo, results, deadline, started, missed)
        for _ in started:
            todo.put(None)
        for process in started:
            process.join()
        return found
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _prepared(root: pathlib.Path, context: Any) -> None:
    """The runs that faults are held to, made in a process of its own, for this one must not start anything."""
    process = context.Process(target=_prepare, args=(root,))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the commands fail without any fault")


def _prepare(root: pathlib.Path) -> None:
    warnings.simplefilter("ignore")
    import_commands()
    Bench(root, root / "scratch", None).prepare()


def _collect(
    faults: Iterator[tuple[Fault, str]],
    todo: Any,
    results: Any,
    deadline: float,
    workers: list[Any],
    missed: collections.Counter[str],
) -> list[Result]:
    found: list[Result] = []
    minutes = rich.progress.TextColumn("{task.fields[left]:.0f} min left")
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(*rich.progress.Progress.get_default_columns()[:1], minutes, console=console) as bar:
        task = bar.add_task("faults", total=None, left=0)
        running = 0
        while running or time.monotonic() < deadline:
            while running < len(workers) and time.monotonic() < deadline:
                fault, seed = next(faults)
                todo.put((fault.name, seed))
                running += 1
            result = _next(results, workers)
            running -= 1
            if result.missed:
                missed[result.kind] += 1
                continue
            found.append(result)
            left = max(0.0, deadline - time.monotonic()) / 60
            bar.update(
                task, description=f"{len(found)} faults, {sum(bool(r.wrong) for r in found)} not survived", left=left
            )
            if result.wrong:
                bar.console.print(f"{result.kind}: {result.name} ({result.seed}): {result.wrong}", markup=False)
    return found


def _next(results: Any, workers: list[Any]) -> Result:
    """The next result; what takes longer than all that a fault runs has ended a worker."""
    while True:
        try:
            return results.get(timeout=10)
        except queue.Empty:
            if not all(worker.is_alive() for worker in workers):
                raise SystemExit("a worker of the soak has ended") from None


def table(found: list[Result]) -> rich.table.Table:
    """What was tried and survived, by kind: faults, and distinct ones."""
    columns = ("kind", "tried", "survived", "distinct faults", "survived", "seconds each")
    shown = new_table("soak", columns, left=("kind",))
    for kind in [*QUOTAS, "all"]:
        rows = [result for result in found if kind in ("all", result.kind)]
        if not rows:
            continue
        names, wrong = {row.name for row in rows}, [row for row in rows if row.wrong]
        survived = len(names) - len({row.name for row in wrong})
        seconds = sum(row.seconds for row in rows) / len(rows)
        shown.add_row(kind, *map(str, (len(rows), len(rows) - len(wrong), len(names), survived)), f"{seconds:.1f}")
    return shown


def main(arguments: list[str]) -> int:
    """Parses the flags, soaks, reports."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.run", description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=55, help="(default: 55)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--only", default="", help="faults whose kind and name hold this")
    parser.add_argument("--workers", type=int, default=2, help="(default: 2)")
    parser.add_argument("--json", type=pathlib.Path, help="write all results to this file")
    flags = parser.parse_args(arguments)
    found = soak(flags.minutes, flags.seed, flags.only, flags.workers)
    rich.console.Console().print(table(found))
    if flags.json:
        rows = [dataclasses.asdict(result) for result in found]
        flags.json.write_text(json.dumps({"rows": rows}, indent=2, ensure_ascii=True) + "\n")
    return int(any(result.wrong for result in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
