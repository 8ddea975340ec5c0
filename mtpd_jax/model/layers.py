"""What all modules are made of: dtypes, norms, and parameters with named axes."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtpd_jax.config import ModelConfig
from mtpd_jax.shapes import Array, Float, Hidden, Parameters
from mtpd_jax.sharding import constrain


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of activations and matrix products, of a config that a platform has resolved."""
    return jnp.dtype(config.dtype)


def weights_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype that parameters are kept in."""
    return jnp.dtype(config.weights)


def apply(module: nn.Module, parameters: Parameters, *inputs: Any, **options: Any) -> Any:
    """Runs a Linen module as a pure function. Nothing here has mutable collections, so outputs are all it returns."""
    return module.apply({"params": parameters}, *inputs, **options)


def cast_matrices(parameters: Parameters, dtype: jnp.dtype) -> Parameters:
    """Casts matrices, so that no pass reads more bytes than it multiplies; norms and biases stay as they are."""

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        names = {getattr(key, "key", None) for key in path}
        return leaf if names & {"scale", "bias"} else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, parameters)


def partitioned(initializer: Callable[..., Array], *axes: str | None) -> Callable[..., Any]:
    """Attaches logical axis names (see ``sharding.ShardingRules``) to what an initializer returns."""
    return nn.with_logical_partitioning(initializer, axes)


def constrain_activation(x: Hidden) -> Hidden:
    """Rows split over the batch axes, the width whole: how activations lie between layers."""
    return constrain(x, "batch", None, None)


def norm(config: ModelConfig, name: str | None = None) -> nn.RMSNorm:
    """RMSNorm over the last axis, computed in float32, with a learned scale that starts at one."""
    scale_init = partitioned(nn.initializers.ones_init(), None)
    return nn.RMSNorm(
        epsilon=config.norm_epsilon,
        dtype=compute_dtype(config),
        param_dtype=weights_dtype(config),
        scale_init=scale_init,
        name=name,
    )


class NormScale(nn.Module):
    """The learned scale of an RMSNorm over heads, [H], for whoever applies several of them in one go."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Float[Array, " H"]:
        ones = partitioned(nn.initializers.ones_init(), None)
        return self.param("scale", ones, (self.config.head_size,), weights_dtype(self.config))
