"""The arms that several experiments have, and the modes of decoding, by their names in tables."""

from experiments.sweep.runs import Variant

MODES = {"greedy": "greedy", "sampled": "temperature 1"}


def next_token() -> Variant:
    """Next-token prediction, without heads."""
    return Variant("ntp", {"heads.num_heads": 0})


def mtp(heads: int) -> Variant:
    """Plain multi-token prediction: cross entropy only."""
    return Variant(f"mtp_{heads}", {"heads.num_heads": heads, "objective.beta": 0.0})


def mtp_d(heads: int) -> Variant:
    """MTP-D: objective and beta are the paper's, alpha and N the config's."""
    return Variant(f"mtp_d_{heads}", {"heads.num_heads": heads})
