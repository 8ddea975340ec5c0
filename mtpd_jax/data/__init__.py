"""Text and batches. A new source of text is a file in this folder and a line here."""

from mtpd_jax.data import sources as _sources  # noqa: F401
