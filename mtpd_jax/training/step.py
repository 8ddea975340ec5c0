"""One training step: count the weights, sum the gradients of the micro-batches, update."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from mtpd_jax.data.pipeline import Batch
from mtpd_jax.methods.method import Method, StepContext
from mtpd_jax.shapes import Array, Float, Int, Parameters
from mtpd_jax.sharding import batch_sharding, replicated, within
from mtpd_jax.training.state import TrainState


@struct.dataclass
class StepResult:
    """What a step reports.

    Attributes:
      loss: the objective, in nats.
      sums, weights: the terms behind it, and what each is a mean over (see ``Method``).
      grad_norm: global norm of the gradient, before clipping.
      tokens: tokens of the batch that are not padding.
    """

    loss: Float[Array, ""]
    sums: Any
    weights: Float[Array, " J"]
    grad_norm: Float[Array, ""]
    tokens: Int[Array, ""]


def gradients_of_batch(
    method: Method, trained: Parameters, frozen: Parameters | None, batch: Batch, step: Int[Array, ""]
) -> tuple[Float[Array, ""], Any, Float[Array, " J"], Any]:
    """Loss, sums, weights and gradients, by the trained parameters, of a whole [micro-batch, B, T] batch."""
    # What the step draws, and what its rows do, have nothing in common.
    key, of_rows = jax.random.split(jax.random.fold_in(jax.random.key(method.config.training.seed), step))
    numbers = jnp.arange(math.prod(batch.tokens.shape[:2]))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(of_rows, numbers).reshape(batch.tokens.shape[:2])

    def count(rows: Batch, row_keys: Array) -> Float[Array, " J"]:
        return method.count(rows, StepContext(step, key, row_keys))

    # What each term is a mean over, in the whole step: before any loss.
    weights = jnp.sum(jax.vmap(count)(batch, keys), axis=0)

    def gradient(rows: Batch, row_keys: Array) -> tuple[tuple[Array, Any], Any]:
        def loss(trained: Parameters) -> tuple[Array, Any]:
            return method.loss(trained, frozen, rows, weights, StepContext(step, key, row_keys))

        return jax.value_and_grad(loss, has_aux=True)(trained)

    def add_rows(total: Any, rows_and_keys: tuple[Batch, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(*rows_and_keys)), None

    # Micro-batches one after the other; their gradients add up, for the weights are the step's.
    if batch.tokens.shape[0] == 1:
        (loss, sums), gradients = gradient(jax.tree.map(lambda part: part[0], batch), keys[0])
    else:
        zeros = (jnp.zeros(()), method.zero_sums()), jax.tree.map(jnp.zeros_like, trained)
        ((loss, sums), gradients), _ = jax.lax.scan(add_rows, zeros, (batch, keys))
    return loss, sums, weights, gradients


def newest_share(decay: float, step: Int[Array, ""]) -> Float[Array, ""]:
    """The share of a step's parameters in their average: (1 - decay) / (1 - decay^step), counted from step 1.

    With it the average is that of ``optax.ema(debias=True)`` at every step: the first step's parameters replace what
    the average began with, which was not trained, and later the share falls to 1 - decay.
    """
    newest = jnp.float32(1 - decay)
    return newest / jnp.maximum(newest, -jnp.expm1(step * math.log(decay)))


def make_step(
    method: Method, optimizer: optax.GradientTransformation, shardings: TrainState
) -> Callable[[TrainState, Batch], tuple[TrainState, StepResult]]:
    """Returns the jitted step; it consumes the state that it is given (donation).

    Whatever is random in a step depends on the seed and the step's number alone.

    Args:
      method, optimizer: of the run.
      shardings: of the state, leaf by leaf (see ``state_shardings``); it goes out as it came in, so that a resumed
        run executes the same program as one that went on.
    """
    decay = method.config.optimizer.ema_decay

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepResult]:
        loss, sums, weights, gradients = gradients_of_batch(method, state.parameters, state.frozen, batch, state.step)
        # The update, of the trained parameters only.
        assert state.optimizer is not None  # an imported model has none, and is not trained as it is
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
            parameters: Any = optax.apply_updates(state.parameters, updates)
        # The average follows what was just updated.
        average: Any = state.average
        if decay is not None:
            average = optax.incremental_update(parameters, average, newest_share(decay, state.step + 1))
        # What the host is told.
        tokens = jnp.sum(batch.segment_ids != 0)
        result = StepResult(loss, sums, weights, optax.global_norm(gradients), tokens)
        return TrainState(state.step + 1, parameters, optimizer_state, average, state.frozen), result

    return jax.jit(
        within(method.mesh, step),
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(method.mesh)),
        out_shardings=(shardings, replicated(method.mesh)),
    )
