"""What a few rows of logits contribute to the loss, and its gradient: the mathematics of the objective, row by row.

Rows are aligned by target: row p of every head predicts the same token, so there is one target, one teacher
distribution and one top-N set per row, shared by all heads. Every line below is one pass over the logits or fuses
into one; exponentials are recomputed where they are needed, because that costs less than keeping them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.losses.divergences import DIVERGENCES, NOTHING, Comparison
from mtpd_jax.losses.select import nth_largest
from mtpd_jax.shapes import AnyArray, Array, Bool, Float, Int
from mtpd_jax.sharding import WHOLE, LastAxis

# A normaliser over the top-N set below this, relative to the row's largest logit, has lost digits to underflow.
_LOG_UNDERFLOW = -60.0


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How heads are compared with the main head.

    Attributes:
      top_n: how many of the teacher's largest logits the comparison covers; at least V means all of them.
      temperature: divides both sides' logits; the term is multiplied by its square (Hinton et al., 2015).
      kl: which divergence; a key of ``DIVERGENCES``.
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
      agreement: [K]; rows in which the head's argmax is the main head's argmax for the same target (or ties
        with it).
    """

    ce: Float[AnyArray, " J"]
    kl: Float[AnyArray, " K"]
    agreement: Float[AnyArray, " K"]


def zero_sums(num_heads: int) -> LossSums:
    """Sums over no rows."""
    return LossSums(jnp.zeros(num_heads + 1), jnp.zeros(num_heads), jnp.zeros(num_heads))


def chunk_loss(
    logits: Float[Array, "J P V"],
    teacher: Float[Array, "1 P V"],
    targets: Int[Array, " P"],
    mask: Bool[Array, "J P"],
    ce_scale: Float[Array, " J"],
    kl_scale: Float[Array, " K"],
    distillation: Distillation | None,
    vocabulary: LastAxis = WHOLE,
) -> tuple[LossSums, Float[Array, "J P V"]]:
    """The sums of these rows, and the gradient of their share of the total by the logits.

    The total is ``sums.ce @ ce_scale + sums.kl @ kl_scale``.

    Args:
      logits: [K+1, P, V] in float32, the main head first.
      teacher: ``logits[:1]``, from whoever can slice it where that costs nothing; inside a loop over rows, XLA's CPU
        backend does not vectorise what reads a slice of the loop's own slice.
      targets: [P].
      mask: [K+1, P]; which heads are supervised in which row. Elsewhere logits have no effect, NaN included.
      ce_scale, kl_scale: [K+1] and [K]; coefficient / global weight of each term, zero or more.
      distillation: None leaves out selection and divergence altogether.
      vocabulary: which part of the rows ``logits`` is.
    """
    largest = vocabulary.max(logits)
    exponents = _exponents(logits, largest)
    normaliser = jnp.log(vocabulary.sum(jnp.exp(exponents)))
    ce = normaliser + (largest - vocabulary.at(logits, targets))
    agrees = vocabulary.at(logits, vocabulary.argmax(teacher)[0]) == largest
    is_target = vocabulary.ids(logits) == targets[None, :, None]
    gradient = ce_scale[:, None, None] * (jnp.exp(exponents - normaliser[..., None]) - is_target)
    kl, of_teacher = jnp.zeros_like(kl_scale), None
    if distillation is not None:
        temperature = distillation.temperature
        # The teacher is compared with itself too: one array of K+1 heads fuses where two of 1 and K do not.
        sides = _compare(logits, teacher, largest, distillation, vocabulary)
        value, by_heads, by_teacher = DIVERGENCES[distillation.kl](sides, vocabulary)
        scale_Jx1x1 = temperature * jnp.pad(kl_scale, (1, 0))[:, None, None]
        kl = temperature**2 * _sum_where(mask, value)[1:]
        gradient += scale_Jx1x1 * by_heads
        if not distillation.detach_teacher:
            of_teacher = jnp.where(mask[..., None], scale_Jx1x1 * by_teacher, 0)
    gradient = jnp.where(mask[..., None], gradient, 0)
    if of_teacher is not None:
        gradient = gradient.at[0].add(jnp.sum(of_teacher, axis=0))
    return LossSums(_sum_where(mask, ce), kl, _sum_where(mask, agrees.astype(jnp.float32))[1:]), gradient


def _exponents(
    logits: Float[Array, "_ P V"], reference: Float[Array, "_ P"], temperature: float = 1.0
) -> Float[Array, "_ P V"]:
    return jnp.maximum((logits - reference[..., None]) / temperature, NOTHING)


def _compare(
    logits: Float[Array, "J P V"],
    teacher: Float[Array, "1 P V"],
    largest: Float[Array, "J P"],
    distillation: Distillation,
    vocabulary: LastAxis,
) -> Comparison:
    """Teacher and heads over the teacher's ``top_n`` largest logits and all ties with the last of them."""
    temperature = distillation.temperature
    p_exponents = _exponents(teacher, largest[:1], temperature)  # whose maximum is always in the set

    def against(reference: Array, threshold: Array | None, log_zp: Array, log_zq: Array, weighted: Array) -> Comparison:
        chosen = None if threshold is None else teacher >= threshold[None, :, None]
        q_exponents = _exponents(logits, reference, temperature)
        return Comparison(chosen, p_exponents, q_exponents, log_zp, log_zq, weighted)

    def sums(reference: Array, threshold: Array | None) -> tuple[Array, Array]:
        empty = jnp.zeros_like(reference)
        sides = against(reference, threshold, empty, empty, empty)
        weighted = sides.keep(sides.p * (sides.p_exponents - sides.q_exponents))
        return jnp.log(vocabulary.sum(sides.q)), vocabulary.sum(weighted)

    def result(normaliser: Array, weighted: Array, reference: Array, threshold: Array | None) -> Comparison:
        # The teacher's normaliser once per head: what it scales is then scaled where it is used, not kept scaled.
        of_teacher = jnp.broadcast_to(normaliser[:1], normaliser.shape)
        return against(reference, threshold, of_teacher, normaliser, weighted)

    if distillation.top_n >= vocabulary.size(logits):
        normaliser, weighted = sums(largest, None)
        return result(normaliser, weighted, largest, None)

    threshold = nth_largest(teacher[0], distillation.top_n, vocabulary)

    def from_the_set() -> tuple[Array, Array, Array]:
        reference = vocabulary.max(jnp.where(teacher >= threshold[None, :, None], logits, -jnp.inf))
        return *sums(reference, threshold), reference

    # A head may hold the teacher's set for all but impossible. Then, and only then, a pass more finds its maximum.
    # The barrier keeps the compiler from moving these sums out of the pass that they share and into the branch.
    first_pass = jax.lax.optimization_barrier((*sums(largest, threshold), largest))
    lost = jnp.any(first_pass[0] < _LOG_UNDERFLOW)
    normaliser, weighted, reference = jax.lax.cond(lost, from_the_set, lambda: first_pass)
    return result(normaliser, weighted, reference, threshold)


def _sum_where(mask: Bool[Array, "J P"], values: Float[Array, "J P"]) -> Float[Array, " J"]:
    return jnp.sum(jnp.where(mask, values, 0), axis=1)
