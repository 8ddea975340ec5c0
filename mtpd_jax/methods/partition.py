"""Cutting a model between its heads. They are stacked along a leading axis, so that every cut is one of arrays.

Freezing is a partition of the parameters: what is trained has gradients and optimizer state, what is frozen neither.
"""

import jax
import jax.numpy as jnp

from mtpd_jax.shapes import Parameters


def without_heads(parameters: Parameters) -> Parameters:
    """All of a model's parameters but those of its heads."""
    return {name: part for name, part in parameters.items() if name != "heads"}


def language_model(parameters: Parameters) -> Parameters:
    """Those of a model that writes one token at a time: all but heads and the mask embedding."""
    return {name: part for name, part in without_heads(parameters).items() if name != "mask_embedding"}


def cut_heads(parameters: Parameters, number: int) -> tuple[Parameters, Parameters]:
    """Cuts parameters into the heads after the first ``number``, and all the rest."""
    above = jax.tree.map(lambda stacked: stacked[number:], parameters["heads"])
    below = jax.tree.map(lambda stacked: stacked[:number], parameters["heads"])
    return {"heads": above}, {**parameters, "heads": below}


def join_heads(above: Parameters, below: Parameters) -> Parameters:
    """Puts together what ``cut_heads`` returned."""
    return {**below, "heads": jax.tree.map(lambda *parts: jnp.concatenate(parts), below["heads"], above["heads"])}


def extend_heads(parameters: Parameters, num_heads: int) -> Parameters:
    """Parameters of a model with ``num_heads`` heads, new head j a copy of head ((j-1) mod m)+1 (MTP-D §3.3).

    Args:
      parameters: of a model with m heads, m at most ``num_heads``.
      num_heads: heads wanted.
    """

    def gather(stacked: jax.Array) -> jax.Array:
        return stacked[jnp.arange(num_heads) % stacked.shape[0]]

    return {**parameters, "heads": jax.tree.map(gather, parameters["heads"])}
