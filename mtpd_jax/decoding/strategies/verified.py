"""A model that fills in masks, and reads in the next pass what it wrote there: nothing is lost; see ``drafters.masks``.

What it loses to ``confident`` is a pass without drafts after every draft that falls: with s drafts standing, and b the
share of passes in which one falls, (E[s] + 1 + b) / (1 + b) tokens per pass of those that had drafts. Our choice.
"""

from mtpd_jax.decoding.options import MASKS
from mtpd_jax.decoding.strategies.speculative import Speculative


class Verified(Speculative, name="verified"):
    """Its text is that which the same model writes one token at a time: not that of the model which taught it."""

    drafter_name = MASKS
