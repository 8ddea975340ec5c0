"""Timing programs side by side."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import rich.console
import rich.progress


def interleaved(programs: dict[Any, Callable[[], Any]], repeats: int, label: str) -> dict[Any, list[float]]:
    """Times every program once per round, so that what disturbs the machine disturbs all of them.

    Args:
      programs: each runs a compiled computation and returns its result, which is waited for.
      repeats: rounds, after one to warm up.
      label: shown beside the progress bar.

    Returns:
      Seconds of every round, per program.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in programs}
    console = rich.console.Console(stderr=True)
    steps = [(turn, name) for turn in range(-1, repeats) for name in programs]
    for turn, name in rich.progress.track(steps, label, console=console, transient=True):
        start = time.perf_counter()
        jax.block_until_ready(programs[name]())
        if turn >= 0:
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """The median over rounds of one program's time divided by another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))
