"""Being asked to stop: SIGTERM or Ctrl-C set a flag, which the loop reads between steps and inside evaluations."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Reads true once the process was asked to stop. A context manager: the old handlers come back on leaving.

    A second Ctrl-C interrupts at once. With several processes it is JAX's own preemption service that heeds SIGTERM, so
    that all of them stop at the same place; Ctrl-C then interrupts as it does anywhere.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._questions = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        # Only the main thread may set handlers; a loop that runs in another one is stopped by whoever started it.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        if self._asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = number

    @property
    def signal(self) -> int | None:
        """The signal that asked, or None."""
        return self._asked

    def asked(self) -> bool:
        """Whether to stop now. With several processes all must ask equally often, and all get the same answer."""
        if jax.process_count() > 1 and self._asked is None:
            # JAX settles on a number that no process has reached yet, and steps stand still in an evaluation; the
            # questions do not.
            self._questions += 1
            if multihost_utils.reached_preemption_sync_point(self._questions):
                self._asked = int(signal.SIGTERM)
        return self._asked is not None
