"""Being asked to stop: SIGTERM or Ctrl-C, which end a command at once, and a run of training where it can go on."""

import contextlib
import functools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds that a run which was asked to stop may go without hearing it, if its steps take no longer. Our choice:
# clusters kill after 30 to 120.
_PATIENCE = 60.0
# Whoever ends the process says one last line, and nobody else says another.
_speaking, _last_line_said = threading.Lock(), False
# Makes the terminal what it was before somebody typed into it, if somebody does.
_restore_terminal: Callable[[], None] | None = None
# The run that is to stop by itself, if there is one.
_heeding: "StopRequest | None" = None


class StopRequest:
    """Reads true once the process was asked to stop. A context manager: the old handlers come back on leaving.

    A second Ctrl-C interrupts at once. With several processes it is JAX's own preemption service that heeds SIGTERM, so
    that all of them stop at the same place; Ctrl-C then interrupts as it does anywhere.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._questions = 0
        self._heard = False
        self._last, self._longest = time.monotonic(), 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        global _heeding
        # Only the main thread may set handlers; training in another one is stopped by whoever started it.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            _heeding = self
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        global _heeding
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        _heeding = None

    def _handle(self, number: int, _: Any) -> None:
        if self._asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = number

    @property
    def signal(self) -> int | None:
        """The signal that asked, or None."""
        return self._asked

    @property
    def heard(self) -> bool:
        """Whether whoever asks ``asked`` has been told to stop."""
        return self._heard

    @property
    def patience(self) -> float:
        """Seconds to wait for the next question: twice the longest time between two so far, and a minute at least."""
        return max(_PATIENCE, 2 * self._longest)

    def asked(self) -> bool:
        """Whether to stop now. With several processes all must ask equally often, and all get the same answer."""
        if jax.process_count() > 1 and self._asked is None:
            # JAX settles on a number that no process has reached yet, and steps stand still in an evaluation; the
            # questions do not.
            self._questions += 1
            if multihost_utils.reached_preemption_sync_point(self._questions):
                self._asked = int(signal.SIGTERM)
        now = time.monotonic()
        self._last, self._longest = now, max(self._longest, now - self._last)
        self._heard = self._asked is not None
        return self._heard


def end_on_signals() -> None:
    """Lets SIGTERM and Ctrl-C end this process with one line, wherever it is: for commands, which call it once.

    Python hears of a signal between two of its own instructions, which compiled code may be far from; so a thread
    waits for it. A signal that was ignored when the process began (``nohup``) stays so. A run that stops by itself
    (``StopRequest``) is left to do so, but not for ever.
    """
    # Python writes each signal's number there, whatever else it is doing.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _left_to_the_thread)
    threading.Thread(target=_wait, args=(reader,), daemon=True).start()


def _left_to_the_thread(number: int, frame: Any) -> None:
    """Takes the place of what would end the process otherwise."""


def _wait(reader: int) -> None:
    """Reads the numbers of signals as they come, and ends the process when it is time."""
    first, deadline, asked = None, None, None
    while True:
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        arrived = os.read(reader, 1)[0] if select.select([reader], [], [], seconds)[0] else None
        if arrived is not None and arrived not in _SIGNALS:
            continue
        stopping = _heeding
        if asked is not stopping:  # another run in the same process is asked anew
            first, deadline, asked = None, None, stopping
        # The first signal asks, and the clock runs from there.
        if first is None and arrived is not None and stopping is not None:
            first, deadline = arrived, time.monotonic() + stopping.patience
        # Time is up: whoever has not heard is ended.
        elif arrived is None and first is not None:
            deadline = None
            if stopping is not None and not stopping.heard:
                waited = stopping.patience
                leave(128 + first, f"error: what runs did not end within {waited:.0f} s of being asked to stop")
        # A second Ctrl-C, or one that nobody heeds, ends it at once.
        elif arrived is not None and (stopping is None or arrived == signal.SIGINT):
            leave(128 + arrived, "interrupted")


def keep_terminal() -> None:
    """Remembers how the terminal is, for ``leave``: whoever lets a user edit what is typed changes it meanwhile."""
    global _restore_terminal
    with contextlib.suppress(ImportError):  # another platform
        import termios

        with contextlib.suppress(termios.error):  # no terminal
            before = termios.tcgetattr(0)
            _restore_terminal = functools.partial(termios.tcsetattr, 0, termios.TCSANOW, before)


def leave(status: int, line: str | None = None) -> NoReturn:
    """Ends the process here and now: what other threads and libraries would still say has been said in one line.

    Args:
      status: the exit status.
      line: written on standard error.
    """
    _speaking.acquire()  # and nobody gives it back
    with contextlib.suppress(OSError):  # closed, or full, and there is nobody left to tell
        if os.isatty(2):
            os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
        with contextlib.suppress(Exception):  # it is gone, which is no error of the system's: this goes on to the end
            if _restore_terminal is not None:
                _restore_terminal()
        if line is not None and not _last_line_said:
            os.write(2, f"{line}\n".encode())
    os._exit(status)


def say_last(line: str) -> None:
    """Writes the line on standard error with which a command ends by itself; waits if it is being ended otherwise."""
    global _last_line_said
    with _speaking, contextlib.suppress(OSError):  # as above
        _last_line_said = True
        if sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)
