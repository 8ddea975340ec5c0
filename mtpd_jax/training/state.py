"""The training state, and its creation already sharded."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from mtpd_jax.methods.method import Method
from mtpd_jax.methods.partition import without_heads
from mtpd_jax.shapes import Array, Int, Parameters
from mtpd_jax.sharding import shardings_of, within


class DivergedError(RuntimeError):
    """The loss, the gradient or the parameters are not finite any more."""


@struct.dataclass
class TrainState:
    """All that a training step reads and writes on the devices.

    Attributes:
      step: optimizer steps done.
      parameters: those that are trained, in float32.
      optimizer: optax's state, of those only; None of an imported model, which has none.
      average: the exponential moving average of the parameters, or None if the config asks for none.
      frozen: the parameters that are not trained, or None (see ``Method.split``).
    """

    step: Int[Array, ""]
    parameters: Parameters
    optimizer: optax.OptState | None
    average: Parameters | None
    frozen: Parameters | None

    @property
    def evaluated(self) -> Parameters:
        """The trained parameters as evaluation and decoding use them: the average if there is one."""
        return self.parameters if self.average is None else self.average


def _state_of(parameters: Parameters, method: Method, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, from the whole model's parameters."""
    # The optimizer knows of what is trained, and of nothing else.
    trained, frozen = method.split(parameters)
    average = None if method.config.optimizer.ema_decay is None else trained
    return TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained), average, frozen)


def abstract_parameters(method: Method) -> tuple[Parameters, Parameters | None]:
    """The parameters that are trained and those that are frozen (None: none are), as shapes, dtypes and shardings.

    Raises:
      ValueError: the mesh cannot share out an axis of them evenly.
    """

    def create(key: jax.Array) -> tuple[Parameters, Parameters | None]:
        return method.split(method.initial_parameters(key, None))

    return _abstract(jax.eval_shape(create, jax.random.key(0)), method)


def abstract_state(method: Method, optimizer: optax.GradientTransformation) -> TrainState:
    """The state as shapes, dtypes and shardings on the method's mesh: what a checkpoint is restored into.

    Raises:
      ValueError: the mesh cannot share out an axis of the parameters evenly.
    """

    def create(key: jax.Array) -> TrainState:
        return _state_of(method.initial_parameters(key, None), method, optimizer)

    return _abstract(jax.eval_shape(create, jax.random.key(0)), method)


def _abstract(boxed: Any, method: Method) -> Any:
    """Shapes with Linen's metadata as shapes with shardings on the method's mesh."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        shardings_of(boxed, method.mesh),
    )


def state_shardings(abstract: TrainState) -> TrainState:
    """The shardings of an abstract state's leaves."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def initial_state(
    method: Method, optimizer: optax.GradientTransformation, source: Parameters | None = None
) -> TrainState:
    """Creates the state on the method's mesh; no device ever holds more than its own share of it.

    Args:
      method, optimizer: of the run.
      source: parameters of the run that it starts from, if there is one.
    """

    # Shapes first: they say where each array lies, and jit then makes it there.
    shardings = state_shardings(abstract_state(method, optimizer))
    seed = jax.random.key(method.config.training.seed)
    # What a run names without storing it stays where the source has it.
    frozen = None
    if method.names_backbone and source is not None:
        frozen = jax.device_put(without_heads(source), shardings.frozen)
        shardings = dataclasses.replace(shardings, frozen=None)

    def create(key: jax.Array, source: Parameters | None) -> TrainState:
        state = _state_of(nn.meta.unbox(method.initial_parameters(key, source)), method, optimizer)
        return state if frozen is None else dataclasses.replace(state, frozen=None)

    state = jax.jit(within(method.mesh, create), out_shardings=shardings)(seed, source)
    return state if frozen is None else dataclasses.replace(state, frozen=frozen)
