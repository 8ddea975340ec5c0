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


@struct.dataclass
class TrainState:
    """All that a training step reads and writes on the devices.

    Attributes:
      step: optimizer steps done.
      parameters: float32.
      optimizer: optax's state.
      average: the exponential moving average of the parameters, or None if the config asks for none.
    """

    step: Int[Array, ""]
    parameters: Any
    optimizer: optax.OptState
    average: Any

    @property
    def evaluated(self) -> Any:
        """The parameters that evaluation and decoding use: the average if there is one."""
        return self.parameters if self.average is None else self.average


def _initializer(model: LanguageModel, optimizer: optax.GradientTransformation, config: Config) -> Any:
    def create(key: jax.Array) -> TrainState:
        dummy = jnp.ones((1, config.heads.num_heads + 2), jnp.int32)
        parameters = model.init(key, dummy, dummy, dummy)["params"]
        average = None if config.optimizer.ema_decay is None else parameters
        return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer.init(parameters), average)

    return create


def abstract_state(
    model: LanguageModel, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh
) -> TrainState:
    """The state as shapes, dtypes and shardings: what a checkpoint is restored into."""
    boxed = jax.eval_shape(_initializer(model, optimizer, config), jax.random.key(0))
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
    model: LanguageModel, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh
) -> TrainState:
    """Creates the state on the mesh; no device ever holds more than its own share of it."""
    create = _initializer(model, optimizer, config)
    shardings = state_shardings(abstract_state(model, optimizer, config, mesh))
    sharded_create = jax.jit(within(mesh, lambda key: nn.meta.unbox(create(key))), out_shardings=shardings)
    return sharded_create(jax.random.key(config.training.seed))
