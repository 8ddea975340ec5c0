"""Who drafts: a file each, and a line here, which registers it."""

from mtpd_jax.decoding.drafters import both, heads, lookup
from mtpd_jax.decoding.drafters.drafter import DRAFTERS

__all__ = ["DRAFTERS", "both", "heads", "lookup"]
