"""Freezing as a partition of the parameters: what is trained has gradients and optimizer state, what is frozen neither.

Heads are stacked along a leading axis, so that a looped extension is a gather along it, and its partition a cut.
"""

from typing import Any

import jax
import jax.numpy as jnp


def split(parameters: Any, frozen_heads: int | None) -> tuple[Any, Any]:
    """Cuts parameters into (trained, frozen).

    Args:
      parameters: of the whole model.
      frozen_heads: the first heads, which are frozen together with backbone, embedding and unembedding; None: all of
        it is trained, and the frozen part is None.
    """
    if frozen_heads is None:
        return parameters, None
    trained = jax.tree.map(lambda stacked: stacked[frozen_heads:], parameters["heads"])
    frozen = jax.tree.map(lambda stacked: stacked[:frozen_heads], parameters["heads"])
    return {"heads": trained}, {**parameters, "heads": frozen}


def merge(trained: Any, frozen: Any) -> Any:
    """Puts the parameters of the whole model together again."""
    if frozen is None:
        return trained
    return {**frozen, "heads": jax.tree.map(lambda *parts: jnp.concatenate(parts), frozen["heads"], trained["heads"])}


def extend_heads(parameters: Any, num_heads: int) -> Any:
    """Parameters of a model with ``num_heads`` heads, new head j a copy of head ((j-1) mod m)+1 (MTP-D §3.3).

    Args:
      parameters: of a model with m heads, m at most ``num_heads``.
      num_heads: heads wanted.
    """

    def gather(stacked: jax.Array) -> jax.Array:
        return stacked[jnp.arange(num_heads) % stacked.shape[0]]

    return {**parameters, "heads": jax.tree.map(gather, parameters["heads"])}
