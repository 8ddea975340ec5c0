"""The optimizer: AdamW with warm-up and decay, clipping by the global norm; all of it from optax."""

from typing import Any

import jax
import optax

from mtpd_jax.config import Config


def learning_rate_schedule(config: Config) -> optax.Schedule:
    """Learning rate by optimizer step: linear warm-up, then cosine, linear, or constant with a linear tail (wsd)."""
    optimizer, steps = config.optimizer, config.training.steps
    peak, final = optimizer.learning_rate, optimizer.learning_rate * optimizer.final_fraction
    # What follows the warm-up, over the steps that are left.
    after_warmup = steps - optimizer.warmup_steps
    if optimizer.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, after_warmup, alpha=optimizer.final_fraction)
    elif optimizer.schedule == "linear":
        decay = optax.linear_schedule(peak, final, after_warmup)
    else:
        tail = min(max(1, round(optimizer.decay_fraction * steps)), after_warmup)
        decay = optax.linear_schedule(peak, final, tail, transition_begin=after_warmup - tail)
    if not optimizer.warmup_steps:
        return decay
    # The first step has a rate above zero, so that it is not wasted.
    warmup = optax.linear_schedule(peak / optimizer.warmup_steps, peak, max(1, optimizer.warmup_steps - 1))
    return optax.join_schedules([warmup, decay], [optimizer.warmup_steps])


def decay_mask(parameters: Any) -> Any:
    """True for matrices; what is a vector of its own, which stacking makes look like a matrix, is told by its name."""

    def is_matrix(path: tuple[Any, ...], _: Any) -> bool:
        names = {getattr(key, "key", None) for key in path}
        return names.isdisjoint({"scale", "bias", "mask_embedding"})

    return jax.tree_util.tree_map_with_path(is_matrix, parameters)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping (if asked for), then AdamW with the config's schedule."""
    optimizer = config.optimizer
    adamw = optax.adamw(
        learning_rate_schedule(config),
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        mask=decay_mask,
    )
    return adamw if optimizer.clip_norm is None else optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), adamw)
