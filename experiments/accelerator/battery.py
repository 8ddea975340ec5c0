"""Pieces of work whose results stand in a folder, case by case, so that nothing is measured twice.

A piece is a list of cases. It runs in a process of its own: an accelerator's memory is whole again when it ends, one
that crashes takes no other with it, and one that is still at work when time is up can be ended. A case's result is a
row in ``results.jsonl`` as soon as it is there; what is not there yet is done by the next call.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.environment import environment
from experiments.lines import append_line, read_lines

Result = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a piece is run.

    Attributes:
      out: the folder of results, which leaves the machine.
      work: a folder for what does not: models in training, compiled programs.
      tiny: sizes that a CPU does in seconds instead of an accelerator's.
      seed: of the models that are trained.
    """

    out: pathlib.Path
    work: pathlib.Path
    tiny: bool
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured at once.

    Attributes:
      name: within its piece.
      seconds: how long an accelerator is expected to take.
      run: measures.
      resumable: whether it goes on where it was when it is stopped, and so may be begun however little time is left.
      flags: of XLA, for its process.
    """

    name: str
    seconds: float
    run: Callable[[], Result]
    resumable: bool = False
    flags: str = ""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Cases that belong together, the most valuable first.

    Attributes:
      name: as ``--only`` takes it.
      title: what it is about.
      cases: of a place.
      summary: a result in a line.
      grace: seconds that it needs to stop cleanly.
    """

    name: str
    title: str
    cases: Callable[[Place], Sequence[Case]]
    summary: Callable[[Result], str]
    grace: float = 1.0


class Results:
    """The rows of a folder: one per case that was measured, or that failed; of several the last one counts."""

    def __init__(self, out: pathlib.Path, tiny: bool):
        self.path, self._tiny = out / "results.jsonl", tiny

    def rows(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The last row of every case, by piece and case.

        Raises:
          ValueError: the file is none of rows, or they are of the other sizes.
        """
        found = read_lines(self.path)
        other = [row for row in found if row["tiny"] != self._tiny]
        if other:
            there, here = ("--tiny's", "a machine's")[:: 1 if other[0]["tiny"] else -1]
            raise ValueError(f"{self.path}: holds results of {there} sizes, not of {here}: take another folder")
        return {(row["piece"], row["case"]): row for row in found}

    def of(self, piece: str) -> dict[str, Result]:
        """What was measured of a piece, by case."""
        return {case: row["result"] for (of, case), row in self.rows().items() if of == piece and "result" in row}

    def missing(self, piece: Piece, place: Place) -> list[Case]:
        """The cases of a piece that have no result, in order; those that were tried and failed come last."""
        rows = {case: row for (of, case), row in self.rows().items() if of == piece.name}
        missing = [case for case in piece.cases(place) if "result" not in rows.get(case.name, {})]
        return sorted(missing, key=lambda case: case.name in rows)

    def check_device(self, kind: str) -> None:
        """Checks that the results are of one kind of device.

        Raises:
          ValueError: naming both.
        """
        others = {row["environment"]["device"] for row in self.rows().values() if row["environment"]} - {kind}
        if others:
            raise ValueError(f"{self.path}: holds results of {others.pop()}, and this is {kind}: take another folder")

    def add(self, piece: str, case: str, *, begin: float, **outcome: Any) -> None:
        """Adds ``result=…``, or ``error=…`` for a case that failed, which began at a time of ``time.time``."""
        about = environment() if "result" in outcome else {}
        row = {"piece": piece, "case": case, "tiny": self._tiny, "seconds": round(time.time() - begin, 1)}
        append_line(self.path, {**row, **outcome, "environment": about})


def run_case(piece: Piece, case: Case, place: Place, until: float) -> bool | None:
    """Measures a case in this process, and writes what came of it.

    Args:
      piece, place: of the case.
      case: which.
      until: the time, by ``time.time``, at which it has to be over.

    Returns:
      Whether it was measured. Else its process should not go on: what failed may have left the device in any state.
      None if the time is too short to begin it.
    """
    results, begin = Results(place.out, place.tiny), time.time()
    if begin + (piece.grace if case.resumable or place.tiny else case.seconds) > until:
        return None
    try:
        results.add(piece.name, case.name, result=case.run(), begin=begin)
    except Exception as error:  # whatever it is, the cases after it are worth having
        results.add(piece.name, case.name, error=f"{type(error).__name__}: {error}"[:2000], begin=begin)
        return False
    return True
