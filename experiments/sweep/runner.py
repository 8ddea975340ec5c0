"""Running a sweep: every run once, resumed where it stopped, its row appended when it is finished."""

import contextlib
import dataclasses
import fcntl
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import rich.console

from experiments.environment import environment
from experiments.sweep.fingerprint import code_version
from experiments.sweep.measure import measure
from experiments.sweep.rows import Row, append_row, read_rows
from experiments.sweep.runs import Run
from mtpd_jax import train
from mtpd_jax.config import Config
from mtpd_jax.train import TrainResult
from mtpd_jax.training.state import DivergedError

RESULTS = pathlib.Path(__file__).parent.parent / "results"


@dataclasses.dataclass(frozen=True)
class Code:
    """The code whose runs are compared.

    Attributes:
      version: what the rows of a family of runs know it by.
      train: trains the run of a config in a workdir.
    """

    version: Callable[[str], str] = code_version
    train: Callable[[Config, str], TrainResult] = train.run


class Sweep:
    """The runs of one experiment at one scale, and their rows in ``<results>/<scale>/<name>.jsonl``.

    A run counts as finished when its row, known by configuration, seed and code version, stands in this experiment's
    file. Where it stands in another experiment's at the same scale, it is taken over from there.
    """

    def __init__(self, name: str, runs: Sequence[Run], code: Code, root: pathlib.Path, results: pathlib.Path):
        """``root`` is the folder that runs are trained in, ``results`` that of the rows."""
        self._runs, self._root = list(dict.fromkeys(runs)), root
        self._path = results / runs[0].scale.name / f"{name}.jsonl"
        self._code = code
        self._console = rich.console.Console(stderr=True, highlight=False)

    def run(self) -> list[str]:
        """Trains and measures what is not finished.

        Returns:
          What went wrong with runs whose loss became infinite; the others are done all the same.

        Raises:
          ValueError: a config that cannot be run; raised before anything is.
          SystemExit: asked to stop; started again, the sweep goes on where it was.
        """
        for run in self._runs:
            run.config()
        open_runs = [run for run in self._runs if not self._finished(run)]
        self._say(f"{len(self._runs) - len(open_runs)} of {len(self._runs)} runs are finished; rows: {self._path}")
        begin, diverged = time.monotonic(), []
        for number, run in enumerate(open_runs):
            per_run = (time.monotonic() - begin) / number if number else 0.0
            left = f", about {per_run * (len(open_runs) - number) / 60:.0f} min left" if number else ""
            self._say(f"[{number + 1}/{len(open_runs)}] {run.variant.name}, seed {run.seed}{left}")
            if self._finished(run):  # by another process meanwhile
                continue
            try:
                seconds = self._train(run)
            except DivergedError as error:
                diverged.append(f"{run.variant.name}, seed {run.seed}: {error}")
                self._say(diverged[-1])
                continue
            measured = measure(str(self._workdir(run)), run.heads(), run.scale)
            parts = {one.name: getattr(measured, one.name) for one in dataclasses.fields(measured)}
            about = {"variant": run.variant.name, "seconds": seconds, "environment": environment()}
            append_row(self._path, Row(**parts, **self._name(run), **about))
            jax.clear_caches()  # programs of one run are of no use to the next
        return diverged

    def _train(self, run: Run) -> float:
        """Trains a run, and first what it starts from; one process at a time, because sweeps share runs.

        Returns:
          Seconds of training, compilation and evaluation included, over all calls.
        """
        start = None
        if run.start is not None:
            self._train(run.start)
            start = self._workdir(run.start)
        workdir = self._workdir(run)
        with locked(workdir.with_suffix(".lock")):
            result = self._code.train(run.config(start), str(workdir))
        if not result.finished or result.signal is not None:
            raise SystemExit(128 + (result.signal or 0))
        return result.seconds

    def _finished(self, run: Run) -> bool:
        name = self._name(run)
        # This experiment's own file first.
        for path in (self._path, *sorted(self._path.parent.glob("*.jsonl"))):
            for row in read_rows(path):
                if all(getattr(row, field) == value for field, value in name.items()):
                    if path != self._path:
                        append_row(self._path, dataclasses.replace(row, variant=run.variant.name))
                    return True
        return False

    def _workdir(self, run: Run) -> pathlib.Path:
        return run.workdir(self._root, self._code.version(run.family))

    def _name(self, run: Run) -> dict[str, Any]:
        return {"config": run.key(), "seed": run.seed, "code": self._code.version(run.family)}

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Waits for other processes that hold the file, and holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
