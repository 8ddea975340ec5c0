"""What one chunk of logits contributes to the loss: the mathematics of the objective, row by row.

Rows are aligned by target: row p of every head predicts the same token, so there is one target, one teacher
distribution and one top-N set per row, shared by all heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.losses.select import largest
from mtpd_jax.shapes import AnyArray, Array, Bool, Float, Int

# Stands for minus infinity where a difference of two of them must not become NaN.
_EXCLUDED = -1e30


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How heads are compared with the main head.

    Attributes:
      top_n: how many of the teacher's largest logits the comparison covers; at least V means all of them.
      temperature: divides both sides' logits; the term is multiplied by its square (Hinton et al., 2015).
      kl: ``forward`` is KL(teacher || head), ``reverse`` KL(head || teacher), ``js`` the Jensen-Shannon divergence.
      detach_teacher: no gradient into the teacher's logits (MTP-D §3.2).
    """

    top_n: int
    temperature: float
    kl: str
    detach_teacher: bool


@struct.dataclass
class LossSums:
    """Sums over rows, in nats or in counts; dividing them by the weights is left to whoever has all of them.

    Attributes:
      ce: [K+1]; cross entropy against the data, main head first.
      kl: [K]; the divergence from the main head, as the objective defines it. Zeros without distillation.
      agreement: [K]; rows in which the head's argmax is the main head's argmax for the same target.
    """

    ce: Float[AnyArray, " J"]
    kl: Float[AnyArray, " K"]
    agreement: Float[AnyArray, " K"]


def zero_sums(num_heads: int) -> LossSums:
    """Sums over no rows."""
    return LossSums(jnp.zeros(num_heads + 1), jnp.zeros(num_heads), jnp.zeros(num_heads))


def argmax(logits: Float[Array, "*rows V"]) -> Int[Array, "*rows"]:
    """The first index of the largest entry; on XLA's CPU backend many times faster than ``jnp.argmax``."""
    indices = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    is_largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_largest, indices, logits.shape[-1] - 1), axis=-1)


def cross_entropy(logits: Float[Array, "P J V"], targets: Int[Array, " P"]) -> Float[Array, "P J"]:
    """-log softmax(logits)[target], in nats; the same target for every head of a row."""
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[:, None, None]
    target_logit = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - target_logit


def divergence(
    teacher: Float[Array, "P V"], heads: Float[Array, "P K V"], distillation: Distillation
) -> Float[Array, "P K"]:
    """The divergence of each head from the teacher over the teacher's top-N set, both sides renormalised over it.

    MTP-D §3.2; renormalising both sides is our choice. The set includes ties with the N-th largest logit.
    """
    vocabulary, temperature = teacher.shape[-1], distillation.temperature
    if distillation.detach_teacher:
        teacher = jax.lax.stop_gradient(teacher)
    teacher, heads = teacher[:, None, :] / temperature, heads / temperature
    if distillation.top_n < vocabulary:
        chosen = largest(jax.lax.stop_gradient(teacher[:, 0]), distillation.top_n)[:, None, :]
        teacher, heads = jnp.where(chosen, teacher, _EXCLUDED), jnp.where(chosen, heads, _EXCLUDED)
    # Excluded entries have probability exactly zero on both sides, and so add nothing, whatever their logarithm.
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(heads)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if distillation.kl == "forward":
        total = jnp.sum(p * (log_p - log_q), axis=-1)
    elif distillation.kl == "reverse":
        total = jnp.sum(q * (log_q - log_p), axis=-1)
    else:
        log_mean = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
        total = 0.5 * jnp.sum(p * (log_p - log_mean) + q * (log_q - log_mean), axis=-1)
    return temperature**2 * total


def chunk_terms(
    logits: Float[Array, "P J V"],
    targets: Int[Array, " P"],
    mask: Bool[Array, "P J"],
    ce_scale: Float[Array, " J"],
    kl_scale: Float[Array, " K"],
    distillation: Distillation | None,
) -> tuple[Float[Array, ""], LossSums]:
    """The chunk's share of the total, differentiable in the logits, and its sums, under stop-gradient.

    Args:
      logits: [P, K+1, V] in float32, the main head first.
      targets: [P].
      mask: [P, K+1]; which heads are supervised in which row.
      ce_scale, kl_scale: [K+1] and [K]; coefficient / global weight of each term.
      distillation: None leaves out selection and divergence altogether.
    """
    teacher, heads, heads_mask = logits[:, 0], logits[:, 1:], mask[:, 1:]
    ce = jnp.sum(jnp.where(mask, cross_entropy(logits, targets), 0), axis=0)
    total = jnp.dot(ce, ce_scale)
    kl = jnp.zeros_like(kl_scale)
    if distillation is not None:
        kl = jnp.sum(jnp.where(heads_mask, divergence(teacher, heads, distillation), 0), axis=0)
        total += jnp.dot(kl, kl_scale)
    agrees = argmax(jax.lax.stop_gradient(heads)) == argmax(jax.lax.stop_gradient(teacher))[:, None]
    agreement = jnp.sum(agrees & heads_mask, axis=0, dtype=jnp.float32)
    return total, jax.lax.stop_gradient(LossSums(ce, kl, agreement))
