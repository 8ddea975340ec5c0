"""The training methods. A new one is a file in this folder and a line here."""

from mtpd_jax.methods import extension as _extension  # noqa: F401
from mtpd_jax.methods import joint as _joint  # noqa: F401
from mtpd_jax.methods import posthoc as _posthoc  # noqa: F401
from mtpd_jax.methods import standalone as _standalone  # noqa: F401
