"""Text and batches. A new source of text is a file in this folder and a line here."""

from mtpd_jax.data import generations as _generations  # noqa: F401
from mtpd_jax.data import sources as _sources  # noqa: F401
