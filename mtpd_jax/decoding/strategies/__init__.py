"""How rounds go: a file each, and a line here, which registers it."""

from mtpd_jax.decoding.strategies import speculative
from mtpd_jax.decoding.strategies.strategy import STRATEGIES

__all__ = ["STRATEGIES", "speculative"]
