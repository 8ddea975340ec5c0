"""Showing how far a long job is: a bar with an ETA on a terminal, plain lines in a log."""

import time
from typing import Any

import jax
import rich.console
import rich.progress


class Progress:
    """A bar where somebody watches; elsewhere the lines that the job writes through ``say``. A context manager."""

    def __init__(self, label: str, total: int, done: int = 0):
        self._console = rich.console.Console(stderr=True, quiet=jax.process_index() != 0)
        self._total, self._done, self._first_done = total, done, done
        self._start = time.monotonic()
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("ETA"),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            disable=not (self._console.is_terminal or self._console.is_jupyter),
            transient=True,
        )
        self._task = self._bar.add_task(label, total=total, completed=done)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def advance(self, steps: int = 1) -> None:
        """Moves on."""
        self._done += steps
        self._bar.update(self._task, completed=self._done)

    def say(self, text: str) -> None:
        """Writes a line (above the bar, if there is one)."""
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def remaining(self) -> str:
        """Estimated time left, as m:ss, for lines in a log."""
        moved = self._done - self._first_done
        if not moved:
            return "-:--"
        seconds = (time.monotonic() - self._start) / moved * (self._total - self._done)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
