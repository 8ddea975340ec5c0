"""Everything that is to be measured on an accelerator, in pieces, on a machine that may be there for minutes only.

    python -m experiments.accelerator --out=DIR

measures what DIR does not hold yet, the most valuable first, and stops when time is up. The same command goes on, on
the same machine or, with DIR, on another one of its kind. ``--page`` writes docs/accelerators.md from DIR.
"""

import dataclasses
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import rich.console
import rich.table

from experiments.accelerator import BEGUN
from experiments.accelerator.battery import Case, Piece, Place, Results
from experiments.accelerator.page import write_page
from experiments.accelerator.piece import FAILED, PIECES
from experiments.lines import read_lines
from experiments.sweep.runs import SEEDS
from mtpd_jax import frontdoor
from mtpd_jax.evaluation.report import new_table

# A process gets as much of an accelerator's memory as leaves room for what others hold of it.
_MEMORY = "0.92"
# Nothing is measured with tiny sizes: what takes time there is compiling.
_TINY_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1"
)


def environment_of(case: Case, place: Place) -> dict[str, str]:
    """The environment of a case's process; what is set already stays."""
    flags = os.environ.get("XLA_FLAGS", ""), case.flags, _TINY_FLAGS if place.tiny else ""
    ours = {
        "JAX_COMPILATION_CACHE_DIR": str(place.work / "compiled"),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": _MEMORY,
    }
    return {**ours, **os.environ, "XLA_FLAGS": " ".join(filter(None, flags))}


@dataclasses.dataclass
class Battery:
    """A call of the command.

    Attributes:
      place: where.
      until: the time, by ``time.time``, at which all has to be over.
      console: where it says what it does.
    """

    place: Place
    until: float
    console: rich.console.Console

    def run(self, piece: Piece, cases: Sequence[Case]) -> bool:
        """Runs cases of a piece, each once; returns whether one failed.

        Raises:
          SystemExit: no case can be run; its process has said why.
        """
        results, left, failed = Results(self.place.out, self.place.tiny), list(cases), False
        while left and time.time() + piece.grace < self.until:
            # Those that can share a process do.
            _, sharing = next(itertools.groupby(left, key=lambda case: case.flags))
            together = list(sharing)
            before, begin = len(read_lines(results.path)), time.time()
            status = self._process(piece, together)
            done = len(read_lines(results.path)) - before
            unfinished = together[done] if done < len(together) else None
            if status is None:
                # It is not the first one next time, or nothing behind it would ever be measured.
                if unfinished is not None and not unfinished.resumable:
                    results.add(piece.name, unfinished.name, begin=begin, error="not finished when time was up")
                break
            if status == 0 and unfinished is not None:  # no time for it
                break
            if status in (1, 2):
                raise SystemExit(status)
            if status not in (0, FAILED):  # it crashed: in the first case that has no row, if there is one
                failed = True
                if unfinished is not None:
                    error = f"its process ended with status {status}"
                    results.add(piece.name, unfinished.name, begin=begin, error=error)
                    done += 1
            failed = failed or status == FAILED
            left = left[done:]
        return failed

    def command(self, piece: Piece, names: Sequence[str]) -> list[str]:
        """Runs cases of a piece."""
        place = self.place
        return [
            sys.executable, "-m", "experiments.accelerator.piece", piece.name, f"--out={place.out}",
            f"--workdir={place.work}", f"--seed={place.seed}", f"--until={self.until}", "--started",
            *(["--tiny"] if place.tiny else []), "--cases", *names,
        ]  # fmt: skip

    def _process(self, piece: Piece, cases: Sequence[Case]) -> int | None:
        """Runs cases in a process of their own; returns its exit status, or None if it was ended for want of time."""
        command, environment = self.command(piece, [case.name for case in cases]), environment_of(cases[0], self.place)
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
        try:
            return process.wait(timeout=max(0.0, self.until - piece.grace - time.time()))
        except subprocess.TimeoutExpired:
            self.console.print(f"  time is up: {piece.name} is asked to stop", markup=False)
            return None
        finally:
            _end(process, max(1.0, min(piece.grace, self.until - time.time())))


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Ends a process: asks it, and does not wait for ever."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def table_of(place: Place) -> rich.table.Table:
    """Every case, and what came of it."""
    rows = Results(place.out, place.tiny).rows()
    table = new_table(f"results in {place.out}", ("piece", "case", "s", ""), left=("piece", "case", ""))
    for piece in PIECES.values():
        for number, case in enumerate(piece.cases(place)):
            row = rows.get((piece.name, case.name), {})
            said = piece.summary(row["result"]) if "result" in row else row.get("error", "not measured yet")
            seconds = f"{row['seconds']:,.0f}" if row else f"~{case.seconds:,.0f}"
            table.add_row("" if number else piece.name, case.name, seconds, said.splitlines()[0])
    return table


def _parse(arguments: list[str]) -> Any:
    parser = frontdoor.Parser(prog="python -m experiments.accelerator", description=__doc__)
    listed = "; ".join(f"{piece.name}: {piece.title}" for piece in PIECES.values())
    parser.add_argument("--out", required=True, help="the folder of results, a few MB")
    parser.add_argument("--only", type=frontdoor.names, help=f"pieces to run, separated by commas ({listed})")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which all has to be over (default: 9)")
    parser.add_argument("--workdir", help="for what stays on the machine (default: a folder for temporary files)")
    parser.add_argument("--seed", type=int, default=0, help="of what is trained; another one is trained anew")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU: all of it in minutes, to see it run")
    parser.add_argument("--page", action="store_true", help="only write docs/accelerators.md from the results")
    flags = parser.parse_args(arguments)
    unknown = sorted(set(flags.only or ()) - PIECES.keys())
    if unknown:
        raise ValueError(f"--only={unknown[0]}: expected some of {', '.join(PIECES)}")
    if not 0 <= flags.seed < SEEDS:
        raise ValueError(f"--seed={flags.seed}: expected 0 to {SEEDS - 1}")
    if not flags.minutes > 0:
        raise ValueError(f"--minutes={flags.minutes:g}: expected more than none")
    return flags


def main(arguments: list[str]) -> int:
    """Parses flags, runs what is missing, and prints what is there."""
    flags = _parse(arguments)
    kind = "tiny" if flags.tiny else "full"
    work = flags.workdir or pathlib.Path(tempfile.gettempdir(), f"mtpd_jax_accelerator_{kind}")
    place = Place(pathlib.Path(flags.out).resolve(), pathlib.Path(work).resolve(), flags.tiny, flags.seed)
    if flags.page:
        if flags.tiny:
            raise ValueError("--page is for figures, and tiny sizes give none: leave one of --page and --tiny out")
        write_page(place)
        return 0
    console, results = rich.console.Console(stderr=True, highlight=False), Results(place.out, place.tiny)
    battery, failed = Battery(place, BEGUN + 60 * flags.minutes, console), False
    for number, piece in enumerate(PIECES.values(), 1):
        cases, chosen = results.missing(piece, place), flags.only is None or piece.name in flags.only
        # What the device can do is what the others are held against.
        if not cases or not (chosen or piece.name == "device"):
            continue
        left, needed = battery.until - time.time(), sum(case.seconds for case in cases)
        console.print(
            f"[{number}/{len(PIECES)}] {piece.name}: {len(cases)} of {len(piece.cases(place))} cases, about "
            f"{needed / 60:.0f} min on an accelerator; {max(0.0, left) / 60:.1f} min left",
            markup=False, soft_wrap=True,
        )  # fmt: skip
        failed = battery.run(piece, cases) or failed
    rich.console.Console().print(table_of(place))
    return 1 if failed else 0


def _leave(number: int, _: Any) -> NoReturn:
    """Ends this process by an exception, so that the one that it has started is ended, too."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    sys.exit(frontdoor.status_of(lambda: main(sys.argv[1:])))
