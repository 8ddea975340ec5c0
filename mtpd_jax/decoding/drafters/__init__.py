"""Who drafts. A new drafter is a file in this folder and a line here."""

from mtpd_jax.decoding.drafters import both as _both  # noqa: F401
from mtpd_jax.decoding.drafters import heads as _heads  # noqa: F401
from mtpd_jax.decoding.drafters import lookup as _lookup  # noqa: F401
from mtpd_jax.decoding.drafters import masks as _masks  # noqa: F401
from mtpd_jax.decoding.drafters.drafter import DRAFTERS

__all__ = ["DRAFTERS"]
