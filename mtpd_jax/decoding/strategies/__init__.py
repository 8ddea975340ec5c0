"""How rounds go. A new strategy is a file in this folder and a line here."""

from mtpd_jax.decoding.strategies import spans as _spans  # noqa: F401
from mtpd_jax.decoding.strategies import speculative as _speculative  # noqa: F401
from mtpd_jax.decoding.strategies import verified as _verified  # noqa: F401
from mtpd_jax.decoding.strategies.strategy import STRATEGIES, is_lossless

__all__ = ["STRATEGIES", "is_lossless"]
