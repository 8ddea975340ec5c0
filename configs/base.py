"""A ~150M-parameter MTP-D setting on the installed Python packages: every field with its default, a template to edit.

What each field means, its unit and what it may be stand beside it: in ``mtpd_jax/config.py``, and for ``data`` and
``objective`` in ``mtpd_jax/data/sources.py`` and ``mtpd_jax/methods``. Other configs are short diffs from this one.
"""

import ml_collections

from mtpd_jax.editing import editable


def get_config() -> ml_collections.ConfigDict:
    """Returns every field with its default."""
    return editable()
