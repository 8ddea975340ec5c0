"""Plain MTP against MTP-D at equal steps (MTP-D, Table 1): ``python -m experiments.distillation --scale=cpu --workdir=DIR``.

Acceptance in real decoding on held-out texts, teacher-forced agreement beside it, and what it costs the main head.
"""

from collections.abc import Mapping

from experiments.sweep.arms import Arm, gain
from experiments.sweep.experiment import Experiment, main
from experiments.sweep.report import Report, Table, per_seed, points, share, with_interval
from experiments.sweep.runs import Variant
from experiments.sweep.scale import Scale
from experiments.sweep.statistics import figure
from mtpd_jax import frontdoor

HEADS = (1, 4)

# MTP-D, 2B dense model (arXiv 2603.23911): acceptance rate with one head on AGIEval-en; with four, that of the fourth
# head, and its cumulative one.
PAPER = [
    ("1 head: conditional, head 1", "85.8", "89.0"),
    ("4 heads: conditional, head 4", "83.8", "86.5"),
    ("4 heads: cumulative, head 4", "45.5", "53.0"),
]


def mtp(heads: int) -> Variant:
    """Plain multi-token prediction: cross entropy only."""
    return Variant(f"mtp_{heads}", {"heads.num_heads": heads, "objective.beta": 0.0})


def mtp_d(heads: int) -> Variant:
    """MTP-D with the paper's coefficients."""
    return Variant(f"mtp_d_{heads}", {"heads.num_heads": heads})


def variants(scale: Scale) -> list[Variant]:
    """Both objectives with one head and with four."""
    return [make(heads) for heads in reversed(HEADS) for make in (mtp, mtp_d)]


EXPERIMENT = Experiment("distillation", variants, lambda arms, scale: report(arms, scale))

if __name__ == "__main__":
    frontdoor.guarded(lambda: main(EXPERIMENT, __doc__))
