"""What the benchmarks share: interleaved timing, the machine that was measured, and curves."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import rich.console
import rich.progress


def environment() -> dict[str, Any]:
    """The device and the versions that figures belong to."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in names},
    }


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


def curves(path: str, panels: list[dict[str, Any]]) -> None:
    """Draws one panel per entry and writes the picture.

    Args:
      path: of the image; the ending says which format.
      panels: ``title``, ``x``, ``y`` (axis labels), ``lines`` (label -> [(x, y)] or, with an interval around y,
        [(x, y, low, high)]) and optionally ``log`` (axes).
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for label, points in panel["lines"].items():
            x, y, *interval = zip(*sorted(points), strict=True)
            (line,) = axis.plot(x, y, marker="o", markersize=3, label=label)
            if interval:
                axis.fill_between(x, *interval, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
        if "x" in panel.get("log", ""):
            axis.set_xscale("log", base=2)
        if "y" in panel.get("log", ""):
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for number, panel in enumerate(panels):
        if not number or panel["lines"].keys() != panels[0]["lines"].keys():
            axes.flat[number].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
