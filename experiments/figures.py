"""Pictures of figures."""

import itertools
from typing import Any

# More names than these stand below the panels, of which they would hide too much. Our choice.
_IN_PANELS = 8


def curves(path: str, panels: list[dict[str, Any]]) -> None:
    """Draws one panel per entry and writes the picture.

    Args:
      path: of the image; the ending says which format.
      panels: ``title``, ``x``, ``y`` (axis labels), ``lines`` (label -> [(x, y)] or, with an interval around y,
        [(x, y, low, high)]) and optionally ``log`` (axes).
    """
    import matplotlib  # here, for machines that only measure need not have it

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), squeeze=False, layout="constrained")
    # A name has one colour in all panels.
    names = list(dict.fromkeys(name for panel in panels for name in panel["lines"]))
    colours = dict(
        zip(names, itertools.cycle(matplotlib.color_sequences["tab10" if len(names) <= 10 else "tab20"]), strict=False)
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        for label, points in panel["lines"].items():
            x, y, *interval = zip(*sorted(points), strict=True)
            (line,) = axis.plot(x, y, marker="o", markersize=3, label=label, color=colours[label])
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
    if len(names) > _IN_PANELS:
        shown = dict(
            pair for axis in axes.flat for pair in zip(*reversed(axis.get_legend_handles_labels()), strict=True)
        )
        figure.legend(shown.values(), shown.keys(), fontsize=7, loc="outside lower center", ncols=2 * columns)
    else:
        for number, panel in enumerate(panels):
            if not number or panel["lines"].keys() != panels[0]["lines"].keys():
                axes.flat[number].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
