"""The loss as one would first write it, with all logits at once: the reference that the production form is held to.

Values by definition and gradients by autodiff, in whatever precision the arrays have; only tests and benchmarks use it.
"""

import jax
import jax.numpy as jnp

from mtpd_jax.losses.select import nth_largest
from mtpd_jax.losses.terms import Distillation
from mtpd_jax.shapes import Array, Bool, Float, Int
from mtpd_jax.sharding import WHOLE, LastAxis


def dense_divergence(
    teacher: Float[Array, "1 P V"],
    heads: Float[Array, "K P V"],
    distillation: Distillation,
    selection: str = "sort",
    vocabulary: LastAxis = WHOLE,
) -> Float[Array, "K P"]:
    """The divergence over the teacher's N largest logits.

    Args:
      teacher, heads: logits.
      distillation: which divergence, over how many.
      selection: ``sort`` keeps all ties with the N-th largest, as the production form does, and ``threshold`` is its
        search; ``top_k`` gathers exactly N.
      vocabulary: whole; says what the search is made for, a CPU or an accelerator.

    Raises:
      KeyError: an unknown divergence.
    """
    if distillation.detach_teacher:
        teacher = jax.lax.stop_gradient(teacher)
    n = min(distillation.top_n, teacher.shape[-1])
    # Which entries are compared.
    if selection == "top_k":
        chosen, indices = jax.lax.top_k(teacher, n)
        heads = jnp.take_along_axis(heads, jnp.broadcast_to(indices, (*heads.shape[:-1], n)), axis=-1)
        return _divergence(chosen, heads, distillation)
    if selection == "sort":
        threshold = jnp.sort(teacher, axis=-1)[..., -n, None]
    else:
        threshold = nth_largest(jax.lax.stop_gradient(teacher[0]), n, vocabulary)[None, :, None]
    # Ties at the threshold are all compared, as the fused loss does.
    chosen = teacher >= jax.lax.stop_gradient(threshold)
    return _divergence(jnp.where(chosen, teacher, -jnp.inf), jnp.where(chosen, heads, -jnp.inf), distillation)


def _divergence(teacher: Array, heads: Array, distillation: Distillation) -> Array:
    temperature, kind = distillation.temperature, distillation.kl
    p, q = jax.nn.softmax(teacher / temperature), jax.nn.softmax(heads / temperature)
    # Finite logarithms, so that what has no probability adds neither to the value nor to the gradient.
    log_p, log_q = (
        jnp.maximum(jax.nn.log_softmax(jnp.maximum(logits / temperature, -1e30)), -1e30) for logits in (teacher, heads)
    )
    # The divergences, as they are defined; gradients are autodiff's.
    acceptance = jnp.sum(jnp.minimum(p, q), axis=-1)
    forward = jnp.sum(p * (log_p - log_q), axis=-1)
    if kind == "forward":
        value = forward
    elif kind == "reverse":
        value = jnp.sum(q * (log_q - log_p), axis=-1)
    elif kind == "js":
        log_mean = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
        value = 0.5 * jnp.sum(p * (log_p - log_mean) + q * (log_q - log_mean), axis=-1)
    elif kind == "tv":
        value = 1 - acceptance
    elif kind == "lk":
        value = -jax.nn.logsumexp(jnp.minimum(log_p, log_q), axis=-1)
    else:
        weight = jnp.exp(-3 * jax.lax.stop_gradient(acceptance))
        value = {"lk_hybrid": weight * forward + (1 - weight) * (1 - acceptance)}[kind]
    return temperature**2 * value


def dense_total(
    logits: Float[Array, "J P V"],
    targets: Int[Array, " P"],
    mask: Bool[Array, "J P"],
    ce_scale: Float[Array, " J"],
    kl_scale: Float[Array, " K"],
    distillation: Distillation | None,
    selection: str = "sort",
    vocabulary: LastAxis = WHOLE,
) -> Float[Array, ""]:
    """The total of ``chunk_loss``, differentiable in the logits."""
    ce = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[None, :, None], axis=-1)[..., 0]
    total = jnp.sum(jnp.where(mask, ce, 0) * ce_scale[:, None])
    if distillation is not None:
        kl = dense_divergence(logits[:1], logits[1:], distillation, selection, vocabulary)
        total += jnp.sum(jnp.where(mask[1:], kl, 0) * kl_scale[:, None])
    return total


def dense_loss(
    hidden: Float[Array, "J B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "J B T"],
    ce_scale: Float[Array, " J"],
    kl_scale: Float[Array, " K"],
    *,
    distillation: Distillation | None,
    selection: str = "sort",
    vocabulary: LastAxis = WHOLE,
) -> Float[Array, ""]:
    """The total of ``fused_loss``, with K+1 full logit tensors in memory."""
    # All logits at once.
    rows_JxMxD = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])
    precision = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("jmd,vd->jmv", rows_JxMxD, unembedding.astype(hidden.dtype), preferred_element_type=precision)
    mask_JxM = mask.reshape(mask.shape[0], -1)
    return dense_total(logits, targets.reshape(-1), mask_JxM, ce_scale, kl_scale, distillation, selection, vocabulary)
