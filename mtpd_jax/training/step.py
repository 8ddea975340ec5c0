"""One training step: count the weights, sum the gradients of the micro-batches, update."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from mtpd_jax.data.pipeline import Batch
from mtpd_jax.losses.objective import Objective
from mtpd_jax.losses.terms import LossSums, zero_sums
from mtpd_jax.model.backbone import LanguageModel, further_heads, unembedding_of
from mtpd_jax.model.layers import apply
from mtpd_jax.shapes import Array, Float, Int
from mtpd_jax.sharding import batch_sharding, replicated, within
from mtpd_jax.training.state import TrainState


@struct.dataclass
class StepResult:
    """What a step reports.

    Attributes:
      loss: the objective, in nats.
      sums, weights: the terms behind it and the supervised tokens per head.
      grad_norm: global norm of the gradient, before clipping.
      tokens: tokens of the batch that are not padding.
    """

    loss: Float[Array, ""]
    sums: LossSums
    weights: Float[Array, " J"]
    grad_norm: Float[Array, ""]
    tokens: Int[Array, ""]


def loss_of_rows(
    model: LanguageModel,
    objective: Objective,
    parameters: Any,
    frozen: Any,
    rows: Batch,
    weights: Array,
    mesh: Mesh | None,
) -> tuple[Float[Array, ""], LossSums]:
    """Runs model and objective on [B, T] rows; returns their share of the loss and the sums behind it."""
    inputs = rows.tokens, rows.segment_ids, rows.positions
    if frozen is None:
        hidden = apply(model, parameters, *inputs, detach_trunk=objective.trunk == "detached")
    else:
        hidden = further_heads(model, objective.first_head - 1, parameters, frozen, *inputs)
    unembedding = unembedding_of(parameters if frozen is None else frozen)
    return objective.loss(hidden, unembedding, rows.tokens, rows.segment_ids, weights, mesh)


def gradients_of_batch(
    model: LanguageModel,
    objective: Objective,
    parameters: Any,
    batch: Batch,
    mesh: Mesh | None = None,
    frozen: Any = None,
) -> tuple[Float[Array, ""], LossSums, Float[Array, " J"], Any]:
    """Loss, sums, weights and gradients, by the trained parameters, of a whole [micro-batch, B, T] batch."""
    weights = objective.count(batch.segment_ids)

    def of_rows(rows: Batch) -> tuple[tuple[Array, LossSums], Any]:
        def loss(parameters: Any) -> tuple[Array, LossSums]:
            return loss_of_rows(model, objective, parameters, frozen, rows, weights, mesh)

        return jax.value_and_grad(loss, has_aux=True)(parameters)

    if batch.tokens.shape[0] == 1:
        (loss, sums), gradients = of_rows(jax.tree.map(lambda part: part[0], batch))
    else:
        zeros = (jnp.zeros(()), zero_sums(objective.num_heads)), jax.tree.map(jnp.zeros_like, parameters)
        summed = jax.lax.scan(lambda total, rows: (jax.tree.map(jnp.add, total, of_rows(rows)), None), zeros, batch)
        (loss, sums), gradients = summed[0]
    return loss, sums, weights, gradients


def newest_share(decay: float, step: Int[Array, ""]) -> Float[Array, ""]:
    """The share of a step's parameters in their average: (1 - decay) / (1 - decay^step), counted from step 1.

    With it the average is that of ``optax.ema(debias=True)`` at every step: the first step's parameters replace what
    the average began with, which was not trained, and later the share falls to 1 - decay.
    """
    newest = jnp.float32(1 - decay)
    return newest / jnp.maximum(newest, -jnp.expm1(step * math.log(decay)))


def make_step(
    model: LanguageModel,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    shardings: TrainState,
    ema_decay: float | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepResult]]:
    """Returns the jitted step; it consumes the state that it is given (donation).

    Args:
      model, objective, optimizer, mesh: what to train, and where.
      shardings: of the state, leaf by leaf (see ``state_shardings``); it goes out as it came in, so that a resumed
        run executes the same program as one that went on.
      ema_decay: of the averaged parameters; None if the state has none.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepResult]:
        loss, sums, weights, gradients = gradients_of_batch(
            model, objective, state.parameters, batch, mesh, state.frozen
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        average = state.average
        if ema_decay is not None:
            average = optax.incremental_update(parameters, average, newest_share(ema_decay, state.step + 1))
        tokens = jnp.sum(batch.segment_ids != 0)
        result = StepResult(loss, sums, weights, optax.global_norm(gradients), tokens)
        return TrainState(state.step + 1, parameters, optimizer_state, average, state.frozen), result

    return jax.jit(
        within(mesh, step),
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )
