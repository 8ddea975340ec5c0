"""Showing how far a long job is: a bar with an ETA on a terminal, plain lines in a log."""

import contextlib
import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import jax
import rich.console
import rich.progress

# Whether a command runs, whose user waits for it; functions that somebody's program calls say nothing of their own.
_in_command = False


@contextlib.contextmanager
def command() -> Iterator[None]:
    """Within it, what is compiled is said where there is no bar to show it."""
    global _in_command
    before, _in_command = _in_command, True
    try:
        yield
    finally:
        _in_command = before


def say(text: str) -> None:
    """Writes a line on standard error, from the first process only."""
    _print(_console(), text)


def _console() -> rich.console.Console:
    return rich.console.Console(stderr=True, quiet=jax.process_index() != 0)


def _print(console: rich.console.Console, text: str) -> None:
    with contextlib.suppress(OSError):  # a log that is full is no reason to end a run
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _widgets(console: rich.console.Console) -> bool:
    """Whether this is a notebook that can show a bar; without ipywidgets it would show a warning for it."""
    return console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None


class Progress:
    """A bar where somebody watches; elsewhere the lines that the job writes through ``say``. A context manager."""

    def __init__(self, label: str, total: int, done: int = 0):
        self._console = _console()
        self._label = label
        self._total, self._done = total, done
        # What is done first takes longer, for it is compiled: time is counted from its end.
        self._first: tuple[int, float] | None = None
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("ETA"),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            disable=not (self._console.is_terminal or _widgets(self._console)),
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
        if self._first is None:
            self._first = self._done, time.monotonic()
        self._bar.update(self._task, completed=self._done, description=self._label)

    def show(self, what: str) -> None:
        """Shows what is being done, in place of the bar's label, until the job moves on; in a command's log, a line."""
        if self._bar.disable and _in_command:
            self.say(what)
        self._bar.update(self._task, description=what)

    def say(self, text: str) -> None:
        """Writes a line (above the bar, if there is one)."""
        _print(self._bar.console, text)

    def remaining(self) -> str:
        """Estimated time left, as m:ss, for lines in a log."""
        first, since = self._first or (self._done, 0.0)
        if self._done == first:
            return "0:00" if self._done >= self._total else "-:--"
        seconds = (time.monotonic() - since) / (self._done - first) * (self._total - self._done)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
