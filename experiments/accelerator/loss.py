"""The loss at the size of MTP-D's model: time and memory, by number of heads, objective and form."""

import functools
from collections.abc import Sequence

from experiments.accelerator.battery import Case, Piece, Place, Result
from experiments.accelerator.device import Ceilings
from experiments.bench.loss import Study, measure

_FORMS = ("fused", "dense_threshold", "dense_top_k")


def rows(place: Place, heads: int) -> Result:
    """Every form and objective with so many heads; their floor is of the three bare products, timed beside them.

    ``products_seconds`` is that of the same products at the device's measured peak.
    """
    study = Study(64, 32, "float32", _FORMS, repeats=2) if place.tiny else Study(8192, 2048, "bfloat16", _FORMS)
    case = {"heads": heads, "vocabulary": 512 if place.tiny else 122_880, "top_n": 32 if place.tiny else 10_000}
    ceilings = Ceilings.of(place)
    found = [
        {**row, "products_seconds": ceilings and ceilings.seconds(row["flops"], 0.0)} for row in measure(case, study)
    ]
    fused = {row["objective"]: row["over_plain"] for row in found if row["form"] == "fused"}
    return {"rows": found, "mtp_d_over_mtp": fused.get("mtp_d")}


def cases(place: Place) -> Sequence[Case]:
    """One per number of heads."""
    return [
        Case(f"K={heads}", seconds, functools.partial(rows, place, heads))
        for heads, seconds in {4: 150, 1: 120, 0: 60, 16: 180}.items()
    ]


def summary(result: Result) -> str:
    """A result in a line: the fused form's."""
    shown = [
        f"{row['objective']} {1e3 * row['seconds']:.3g} ms, {row['seconds'] / row['floor_seconds']:.2f} x floor, "
        f"{row['temp_bytes'] / 2**20:,.0f} MiB"
        for row in result["rows"]
        if row["form"] == "fused" and row["seconds"] is not None
    ]
    ratio = [f"mtp_d / mtp {result['mtp_d_over_mtp']:.2f}"] if result["mtp_d_over_mtp"] else []
    return "; ".join([*ratio, *shown]) or "nothing fits"


PIECE = Piece("loss", "the loss and its gradients", cases, summary)
