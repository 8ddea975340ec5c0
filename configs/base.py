"""A 131M-parameter MTP-D setting on the installed Python packages: the defaults, which other configs are diffs from.

What each field means, its unit and what it may be stand beside it: in ``mtpd_jax/config.py``, and for ``data`` and
``objective`` in ``mtpd_jax/data/sources.py`` and ``mtpd_jax/methods``. A config that takes another case of these says
so with ``mtpd_jax.editing.change``, or names the case and its fields in ``update``.
"""

import ml_collections

from mtpd_jax.editing import editable


def get_config() -> ml_collections.ConfigDict:
    """Returns every field with its default."""
    return editable()
