"""What can go wrong: kills, signals, disks, flipped bits and bad input, each with what has to hold afterwards."""

import dataclasses
import functools
import json
import os
import pathlib
import random
import shutil
import signal
from collections.abc import Callable

from tests.soak.commands import PHASES, Strike, run, run_from_the_start
from tests.soak.disks import Disk

STEPS = 20
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "more", "big", "dog", "run", "by")


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
      kind: of fault, which quotas are counted by.
      name: what goes wrong where; faults of one name differ by moments and places.
      happen: makes it happen in an empty folder; returns what is wrong with what came of it, or None.
    """

    kind: str
    name: str
    happen: Callable[["Bench", random.Random], str | None]


class MissedError(Exception):
    """A fault came too late, or its place was never reached: nothing was tried."""


class Bench:
    """Where faults happen: an empty folder, beside the data and whole runs to copy from.

    Args:
      root: holds ``data.txt``, ``prompts.jsonl``, and after ``prepare`` the runs ``whole`` (all steps) and ``half``.
      scratch: emptied before each fault.
      disk: a small disk, or None where there is none.
    """

    def __init__(self, root: pathlib.Path, scratch: pathlib.Path, disk: Disk | None):
        self.root, self.scratch, self.disk = root, scratch, disk

    def clear(self) -> None:
        """Begins anew."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)

    def train_flags(self, workdir: pathlib.Path, data: pathlib.Path | None = None) -> list[str]:
        """The flags of the soak's run."""
        config = pathlib.Path(__file__).with_name("config.py")
        paths = f"--config.data.paths=('{data or self.root / 'data.txt'}',)"
        return [f"--config={config}", f"--workdir={workdir}", paths]

    def generate_flags(self, workdir: pathlib.Path) -> list[str]:
        """Greedy text, as JSON beside the workdir."""
        return [f"--workdir={workdir}", "--prompt=the cat", "--max_new_tokens=8", f"--json={self.scratch / 'g.json'}"]

    def evaluate_flags(self, workdir: pathlib.Path) -> list[str]:
        """Text, held-out documents and prompts."""
        return [
            f"--workdir={workdir}", f"--prompts={self.root / 'prompts.jsonl'}", "--split=validation", "--limit=2",
            "--max_new_tokens=6", "--heads=2", f"--json={self.scratch / 'e.json'}",
        ]  # fmt: skip

    def struck(self, command: str, flags: list[str], strike: Strike, *allowed: int) -> str | None:
        """Runs a command that is struck, and may end with these statuses; what is wrong with how it ended.

        Raises:
          MissedError: nothing is, but it was not struck.
        """
        outcome = run(command, flags, strike)
        wrong = outcome.complaint(*allowed)
        if not wrong and not outcome.struck:
            raise MissedError
        return wrong

    def flags(self, command: str, workdir: pathlib.Path) -> list[str]:
        """The flags of any command."""
        made = {"train": self.train_flags, "generate": self.generate_flags, "evaluate": self.evaluate_flags}
        return made[command](workdir)

    def copy(self, name: str) -> pathlib.Path:
        """A copy of a prepared run."""
        return pathlib.Path(shutil.copytree(self.root / name, self.scratch / "run"))

    def prepare(self) -> None:
        """Writes the data and trains the runs that faults are held to.

        Raises:
          RuntimeError: that fails already.
        """
        documents = [" ".join(WORDS[(i * j + j) % 14] for j in range(1, 30 + 7 * (i % 9))) for i in range(60)]
        (self.root / "data.txt").write_text("<|endoftext|>".join(documents))
        (self.root / "prompts.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "a dog ran"}\n')
        self.clear()
        stop = Strike("train", "step", functools.partial(os.kill, 0, signal.SIGTERM), call=11)
        steps = [
            run("train", self.train_flags(self.root / "whole")).complaint(0),
            run("train", self.train_flags(self.root / "half"), stop).complaint(143),
            *(self._text_of(name, self.root / "whole", step) for name, step in (("20", 20), ("15", 15))),
            run("evaluate", self.evaluate_flags(self.root / "whole")).complaint(0),
        ]
        if any(steps):
            raise RuntimeError(f"without any fault: {next(filter(None, steps))}")

    def _text_of(self, name: str, workdir: pathlib.Path, step: int) -> str | None:
        """Keeps what a checkpoint writes."""
        found = run("generate", [*self.generate_flags(workdir), f"--checkpoint={step}"]).complaint(0)
        if found is None:
            shutil.copy(self.scratch / "g.json", self.root / f"text-{name}.json")
        return found

    def goes_on(self, workdir: pathlib.Path, data: pathlib.Path | None = None) -> str | None:
        """Runs training again; what is wrong if it does not end as if nothing had been."""
        again = run("train", self.train_flags(workdir, data)).complaint(0)
        return f"afterwards: {again}" if again else self.differs(workdir)

    def differs(self, workdir: pathlib.Path, with_metrics: bool = True) -> str | None:
        """How a finished run differs from the one that nothing happened to, bit for bit."""
        for part in ("digests", "data", "tokens", "tokenizer"):
            if _record(workdir)[part] != _record(self.root / "whole")[part]:
                return f"its {part} are not those of a run without a fault"
        if with_metrics and _metrics(workdir) != _metrics(self.root / "whole"):
            return "its metrics are not those of a run without a fault"
        return None


def _record(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "checkpoints" / str(STEPS) / "progress" / "metadata").read_text())


def _metrics(workdir: pathlib.Path) -> list[dict]:
    clocks = ("tokens_per_second", "mfu")
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in clocks} for line in lines]


def all_faults(with_disk: bool) -> list[Fault]:
    """Every distinct fault but bad input, of which there is a list of its own."""
    faults = [
        Fault("kill" if number == signal.SIGKILL else "signal", f"{number.name} in {command}: {phase}",
              functools.partial(_signal, command, phase, number))
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT) for command in PHASES for phase in PHASES[command]
    ]  # fmt: skip
    faults += [
        Fault("kill" if number == signal.SIGKILL else "signal", f"{number.name} in {command}: importing",
              functools.partial(_signal_at_start, command, number))
        for number in (signal.SIGKILL, signal.SIGINT) for command in PHASES
    ]  # fmt: skip
    faults += [Fault("flip", f"bit flipped in {what}", functools.partial(_flip, what)) for what in _PARTS]
    faults += [
        Fault("disk", f"{what} in train: {phase}", functools.partial(_disappears, what, phase))
        for what in ("workdir deleted", "checkpoints deleted", "data cut short", "checkpoints become a file")
        for phase in ("tokenizer", "creation", "step", "saving", "evaluation", "writing metrics")
    ]
    faults += [Fault("disk", "no room for --json", _no_room_for_json), Fault("disk", "no room for output", _no_output)]
    if with_disk:
        faults += [
            Fault("disk", f"full after {size} kB", functools.partial(_full, size)) for size in range(20, 1400, 90)
        ]
        faults += [
            Fault("disk", f"full in train: {phase}", functools.partial(_fills_up, phase))
            for phase in ("creation", "initial state", "opening metrics", "step", "saving", "evaluation", "leaving")
        ]
    return faults


def _signal(command: str, phase: str, number: signal.Signals, bench: Bench, rng: random.Random) -> str | None:
    resumed = phase == "restoring" or (phase not in ("tokenizer", "initial state") and rng.random() < 0.5)
    training = command == "train"
    workdir = bench.copy("half" if resumed else "whole") if resumed or not training else bench.scratch / "run"
    delay = rng.choice([0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.3)])
    call = rng.choice([1, 2, 3]) if phase in _REPEATED and not resumed else 1
    strike = Strike(command, phase, lambda: os.kill(os.getpid(), number), call, delay)
    status = -number if number == signal.SIGKILL else 128 + number
    wrong = bench.struck(command, bench.flags(command, workdir), strike, 0, status)
    if wrong or training:
        return wrong or bench.goes_on(workdir)
    return run(command, bench.flags(command, workdir)).complaint(0)


def _signal_at_start(command: str, number: signal.Signals, bench: Bench, rng: random.Random) -> str | None:
    workdir = bench.copy("half")
    outcome = run_from_the_start(command, bench.flags(command, workdir), number, rng.uniform(0.15, 4))
    if not outcome.struck:
        raise MissedError
    return outcome.complaint(0, -number, 128 + number) or bench.goes_on(workdir)


# Phases that a run of all steps comes to more than once.
_REPEATED = {"step", "logging", "evaluation", "writing metrics", "saving"}

_PARTS = {
    "array data": "checkpoints/*/*/**/d/*",
    "array manifests": "checkpoints/*/*/**/*manifest*",
    "array descriptions": "checkpoints/*/parameters/*",
    "a checkpoint's record": "checkpoints/*/progress/*",
    "a checkpoint's description": "checkpoints/*/*",
    "config.json": "config.json",
    "tokenizer.json": "tokenizer.json",
    "metrics.jsonl": "metrics.jsonl",
}


def _flip(what: str, bench: Bench, rng: random.Random) -> str | None:
    """Some bits of one file; what is read afterwards is what was written, or is refused where there is no other."""
    workdir = bench.copy("whole")
    files = sorted(path for path in workdir.glob(_PARTS[what]) if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 8])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    allowed = (0, 2) if what in ("config.json", "tokenizer.json") else (0,)  # one of two checkpoints is whole
    outcome = run("generate", bench.generate_flags(workdir))
    wrong = outcome.complaint(*allowed)
    if not wrong and outcome.status == 0:
        wrong = _other_text(bench, ("15", "20") if "damaged" in outcome.errors else ("20",))
    if wrong:
        return f"{path.relative_to(workdir)}: generate: {wrong}"
    outcome = run("train", bench.train_flags(workdir))
    wrong = outcome.complaint(*allowed)
    if not wrong and outcome.status == 0:
        # A line of metrics that is none any more is put aside; a flipped digit of one nobody can tell.
        wrong = bench.differs(workdir, with_metrics=what != "metrics.jsonl")
    return f"{path.relative_to(workdir)}: train: {wrong}" if wrong else None


def _other_text(bench: Bench, names: tuple[str, ...]) -> str | None:
    found = json.loads((bench.scratch / "g.json").read_text())["tokens"]
    expected = [json.loads((bench.root / f"text-{name}.json").read_text())["tokens"] for name in names]
    return None if found in expected else "wrote another text without a word"


def _disappears(what: str, phase: str, bench: Bench, rng: random.Random) -> str | None:
    """Somebody removes something while a run uses it: one line, and with everything in place it goes on."""
    workdir, data = bench.scratch / "run", bench.scratch / "data.txt"
    shutil.copy(bench.root / "data.txt", data)

    def remove() -> None:
        if what == "data cut short":
            os.truncate(data, 100)
            return
        target = workdir if what == "workdir deleted" else workdir / "checkpoints"
        shutil.rmtree(target, ignore_errors=True)
        if what == "checkpoints become a file":
            workdir.mkdir(exist_ok=True)
            target.write_text("no folder")

    call = rng.choice([1, 2]) if phase in _REPEATED else 1
    strike = Strike("train", phase, remove, call, rng.choice([0.0, rng.uniform(0, 0.05)]))
    wrong = bench.struck("train", bench.train_flags(workdir, data), strike, 0, 2)
    shutil.copy(bench.root / "data.txt", data)
    if (workdir / "checkpoints").is_file():
        (workdir / "checkpoints").unlink()
    return wrong or bench.goes_on(workdir, data)


def _no_room_for_json(bench: Bench, rng: random.Random) -> str | None:
    command = rng.choice(["generate", "evaluate"])
    flags = [flag for flag in bench.flags(command, bench.copy("whole")) if not flag.startswith("--json")]
    return run(command, [*flags, "--json=/dev/full"]).complaint(2)


def _no_output(bench: Bench, rng: random.Random) -> str | None:
    command = rng.choice(["generate", "evaluate"])

    def fill() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    return bench.struck(command, bench.flags(command, bench.copy("whole")), Strike(command, "opening", fill), 2)


def _full(size: int, bench: Bench, rng: random.Random) -> str | None:
    """A disk of so many kilobytes; with more room, the run goes on as if it always had it."""
    assert bench.disk is not None
    workdir = bench.disk.make(size + rng.randrange(90)) / "run"
    wrong = run("train", bench.train_flags(workdir)).complaint(0, 2)
    bench.disk.resize(50_000)
    return wrong or bench.goes_on(workdir)


def _fills_up(phase: str, bench: Bench, rng: random.Random) -> str | None:
    """Somebody else takes the room that is left, in the middle of a run."""
    assert bench.disk is not None
    place = bench.disk.make(20_000)
    call = rng.choice([1, 2]) if phase in _REPEATED else 1
    strike = Strike("train", phase, functools.partial(fill_up, place, rng.randrange(0, 40_000)), call)
    wrong = bench.struck("train", bench.train_flags(place / "run"), strike, 0, 2)
    (place / "filler").unlink(missing_ok=True)
    return wrong or bench.goes_on(place / "run")


def fill_up(place: pathlib.Path, left: int) -> None:
    """Writes a file that leaves so many bytes of a disk."""
    free = shutil.disk_usage(place).free
    with (place / "filler").open("wb") as file:
        file.write(b"x" * max(0, free - left))
