"""The training state, and its creation already sharded."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from mtpd_jax.config import Config
from mtpd_jax.model.backbone import LanguageModel
from mtpd_jax.shapes import Array, Int
from mtpd_jax.sharding import shardings_of, within
from mtpd_jax.training.partition import extend_heads, merge, split


class DivergedError(RuntimeError):
    """The loss, the gradient or the parameters are not finite any more."""


@struct.dataclass
class TrainState:
    """All that a training step reads and writes on the devices.

    Attributes:
      step: optimizer steps done.
      parameters: those that are trained, in float32.
      optimizer: optax's state, of those only.
      average: the exponential moving average of the parameters, or None if the config asks for none.
      frozen: the parameters that are not trained, or None (see ``training.partition``).
    """

    step: Int[Array, ""]
    parameters: Any
    optimizer: optax.OptState
    average: Any
    frozen: Any

    @property
    def evaluated(self) -> Any:
        """The whole model's parameters, as evaluation and decoding use them: the average if there is one."""
        return merge(self.parameters if self.average is None else self.average, self.frozen)


def _initial_parameters(model: LanguageModel, key: jax.Array) -> Any:
    dummy = jnp.ones((1, model.heads_config.num_heads + 2), jnp.int32)
    return model.init(key, dummy, dummy, dummy)["params"]


def _state_of(parameters: Any, optimizer: optax.GradientTransformation, config: Config) -> TrainState:
    """The state before the first step, from the whole model's parameters."""
    trained, frozen = split(parameters, config.frozen_heads)
    average = None if config.optimizer.ema_decay is None else trained
    return TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained), average, frozen)


def abstract_state(
    model: LanguageModel, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh
) -> TrainState:
    """The state as shapes, dtypes and shardings: what a checkpoint is restored into."""
    boxed = jax.eval_shape(lambda key: _state_of(_initial_parameters(model, key), optimizer, config), jax.random.key(0))
    shardings = shardings_of(boxed, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        shardings,
    )


def state_shardings(abstract: TrainState) -> TrainState:
    """The shardings of an abstract state's leaves."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def initial_state(
    model: LanguageModel, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh, source: Any = None
) -> TrainState:
    """Creates the state on the mesh; no device ever holds more than its own share of it.

    Args:
      model, optimizer, config, mesh: what to train, and where.
      source: parameters of the run that is extended (see ``training.looping``); None: begin with random ones.
    """

    def create(key: jax.Array, source: Any) -> TrainState:
        if source is None:
            parameters = nn.meta.unbox(_initial_parameters(model, key))
        else:
            parameters = extend_heads(source, config.heads.num_heads)
        return _state_of(parameters, optimizer, config)

    shardings = state_shardings(abstract_state(model, optimizer, config, mesh))
    return jax.jit(within(mesh, create), out_shardings=shardings)(jax.random.key(config.training.seed), source)
