"""The loss as one would first write it, with all logits at once: the reference that the production form is held to."""

import jax
import jax.numpy as jnp

from mtpd_jax.losses.terms import Distillation
from mtpd_jax.shapes import Array, Bool, Float, Int


def dense_divergence(
    teacher: Float[Array, "B T 1 V"], heads: Float[Array, "B T K V"], distillation: Distillation
) -> Float[Array, "B T K"]:
    """The divergence over the teacher's N largest logits, gathered with ``lax.top_k``."""
    if distillation.detach_teacher:
        teacher = jax.lax.stop_gradient(teacher)
    n = min(distillation.top_n, teacher.shape[-1])
    chosen, indices = jax.lax.top_k(teacher, n)
    gathered = jnp.take_along_axis(heads, jnp.broadcast_to(indices, (*heads.shape[:-1], n)), axis=-1)
    p = jax.nn.softmax(chosen / distillation.temperature)
    q = jax.nn.softmax(gathered / distillation.temperature)
    mean = 0.5 * (p + q)
    total = {
        "forward": lambda: jnp.sum(p * jnp.log(p / q), axis=-1),
        "reverse": lambda: jnp.sum(q * jnp.log(q / p), axis=-1),
        "js": lambda: 0.5 * jnp.sum(p * jnp.log(p / mean) + q * jnp.log(q / mean), axis=-1),
    }[distillation.kl]()
    return distillation.temperature**2 * total


def dense_loss(
    hidden: Float[Array, "B T J D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T J"],
    ce_scale: Float[Array, " J"],
    kl_scale: Float[Array, " K"],
    *,
    distillation: Distillation | None,
) -> Float[Array, ""]:
    """The same total as ``fused_loss``, by plain autodiff, with K+1 full logit tensors in memory."""
    logits = jnp.einsum("btkd,vd->btkv", hidden.astype(jnp.float32), unembedding)
    log_probabilities = jax.nn.log_softmax(logits)
    ce = -jnp.take_along_axis(log_probabilities, targets[:, :, None, None], axis=-1)[..., 0]
    total = jnp.sum(jnp.where(mask, ce, 0) * ce_scale[None, None, :])
    if distillation is not None:
        kl = dense_divergence(logits[:, :, :1], logits[:, :, 1:], distillation)
        total += jnp.sum(jnp.where(mask[:, :, 1:], kl, 0) * kl_scale[None, None, :])
    return total
