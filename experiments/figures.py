"""Pictures of figures."""

from typing import Any


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

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        axis.set_prop_cycle(color=plt.get_cmap("tab10" if len(panel["lines"]) <= 10 else "tab20").colors)
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
