"""What a few rows of logits contribute to the loss, and its gradient: the mathematics of the objective, row by row.

Rows are aligned by target: row p of every head predicts the same token, so there is one target, one teacher
distribution and one top-N set per row, shared by all heads. Every line below is one pass over the logits or fuses
into one; exponentials are recomputed where they are needed, because that costs less than keeping them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from mtpd_jax.losses.divergences import DIVERGENCES, NOTHING, Comparison, Result
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
    rows = row_terms(logits, teacher, targets, distillation, vocabulary)
    # Cross entropy against the data, of every head.
    gradient = ce_scale[:, None, None] * rows.ce_by_logits
    kl, of_teacher = jnp.zeros_like(kl_scale), None
    # The divergence from the main head, of the heads beside it.
    if distillation is not None and rows.divergence is not None:
        temperature, (value, by_heads, by_teacher) = distillation.temperature, rows.divergence
        scale_Jx1x1 = temperature * jnp.pad(kl_scale, (1, 0))[:, None, None]
        kl = temperature**2 * _sum_where(mask, value)[1:]
        gradient += scale_Jx1x1 * by_heads
        if not distillation.detach_teacher:
            of_teacher = jnp.where(mask[..., None], scale_Jx1x1 * by_teacher, 0)
    # What is not supervised has no effect; the teacher is moved by all heads that are compared with it.
    gradient = jnp.where(mask[..., None], gradient, 0)
    if of_teacher is not None:
        gradient = gradient.at[0].add(jnp.sum(of_teacher, axis=0))
    agreement = _sum_where(mask, rows.agrees.astype(jnp.float32))[1:]
    return LossSums(_sum_where(mask, rows.ce), kl, agreement), gradient


@struct.dataclass
class RowTerms:
    """What each row comes to, before masks and coefficients. What goes unused is not compiled.

    Attributes:
      ce: [J, P]; cross entropy against the target.
      agrees: [J, P]; whether the head's largest logit is that of the main head's argmax.
      likeliest: [P]; the main head's argmax.
      ce_by_logits: [J, P, V].
      divergence: of each head from the main head, whose own is 0: [J, P], and its derivatives by both sides' logits /
        temperature, [J, P, V]; None without distillation.
    """

    ce: Float[Array, "J P"]
    agrees: Bool[Array, "J P"]
    likeliest: Int[Array, " P"]
    ce_by_logits: Float[Array, "J P V"]
    divergence: Result | None = None


def row_terms(
    logits: Float[Array, "J P V"],
    teacher: Float[Array, "1 P V"],
    targets: Int[Array, " P"],
    distillation: Distillation | None,
    vocabulary: LastAxis = WHOLE,
) -> RowTerms:
    """Cross entropy, agreement and divergence of every row; for the arguments see ``chunk_loss``."""
    # Cross entropy: log-softmax at the target.
    largest = vocabulary.max(logits)
    exponents = _exponents(logits, largest)
    normaliser = jnp.log(vocabulary.sum(jnp.exp(exponents)))
    ce = normaliser + (largest - vocabulary.at(logits, targets))
    # Agreement: the head's logit of the main head's choice is its own largest.
    likeliest = vocabulary.argmax(teacher)[0]
    agrees = vocabulary.at(logits, likeliest) == largest
    is_target = vocabulary.ids(logits) == targets[None, :, None]
    by_logits = jnp.exp(exponents - normaliser[..., None]) - is_target
    if distillation is None:
        return RowTerms(ce, agrees, likeliest, by_logits)
    # The teacher is compared with itself too: one array of K+1 heads fuses where two of 1 and K do not.
    sides = _compare(logits, teacher, largest, distillation, vocabulary)
    return RowTerms(ce, agrees, likeliest, by_logits, DIVERGENCES[distillation.kl](sides, vocabulary))


def _exponents(
    logits: Float[Array, "_ P V"], reference: Float[Array, "_ P"], temperature: float = 1.0
) -> Float[Array, "_ P V"]:
    return jnp.maximum((logits - reference[..., None]) / temperature, NOTHING)


@dataclasses.dataclass(frozen=True)
class _Sides:
    """Both sides of a comparison, before it is known what is compared with which reference.

    Attributes:
      logits: [J, P, V]; of all heads.
      teacher: [1, P, V].
      p_exponents: [1, P, V]; the teacher's, less its maximum, which is always in the set.
      temperature, vocabulary: see ``chunk_loss``.
    """

    logits: Array
    teacher: Array
    p_exponents: Array
    temperature: float
    vocabulary: LastAxis

    def over(
        self, reference: Array, threshold: Array | None, log_zp: Array, log_zq: Array, weighted: Array
    ) -> Comparison:
        """The comparison over what is at least the threshold (None: over everything), with these sums over it."""
        chosen = None if threshold is None else self.teacher >= threshold[None, :, None]
        q_exponents = _exponents(self.logits, reference, self.temperature)
        return Comparison(chosen, self.p_exponents, q_exponents, log_zp, log_zq, weighted)

    def sums(self, reference: Array, threshold: Array | None) -> tuple[Array, Array]:
        """The sums ``log_zq`` and ``weighted`` of a comparison, [J, P]; row 0 is the teacher's own."""
        empty = jnp.zeros_like(reference)
        sides = self.over(reference, threshold, empty, empty, empty)
        weighted = sides.keep(sides.p * (sides.p_exponents - sides.q_exponents))
        return jnp.log(self.vocabulary.sum(sides.q)), self.vocabulary.sum(weighted)

    def compared(self, log_z: Array, weighted: Array, reference: Array, threshold: Array | None) -> Comparison:
        """The comparison with the sums from ``sums``."""
        # The teacher's normaliser once per head: what it scales is then scaled where it is used, not kept scaled.
        of_teacher = jnp.broadcast_to(log_z[:1], log_z.shape)
        return self.over(reference, threshold, of_teacher, log_z, weighted)

    def largest_in_set(self, threshold: Array) -> Array:
        """Each head's largest logit among what is at least the threshold, [J, P]."""
        in_set = jnp.where(self.teacher >= threshold[None, :, None], self.logits, -jnp.inf)
        return self.vocabulary.max(in_set)


def _compare(
    logits: Float[Array, "J P V"],
    teacher: Float[Array, "1 P V"],
    largest: Float[Array, "J P"],
    distillation: Distillation,
    vocabulary: LastAxis,
) -> Comparison:
    """Teacher and heads over the teacher's ``top_n`` largest logits and all ties with the last of them."""
    p_exponents = _exponents(teacher, largest[:1], distillation.temperature)
    sides = _Sides(logits, teacher, p_exponents, distillation.temperature, vocabulary)
    if distillation.top_n >= vocabulary.size(logits):
        return sides.compared(*sides.sums(largest, None), largest, None)
    threshold = nth_largest(teacher[0], distillation.top_n, vocabulary)

    def from_the_set() -> tuple[Array, Array, Array]:
        reference = sides.largest_in_set(threshold)
        return *sides.sums(reference, threshold), reference

    # A head may hold the teacher's set for all but impossible. Then, and only then, a pass more finds its maximum.
    # The barrier keeps the compiler from moving these sums out of the pass that they share and into the branch.
    first_pass = jax.lax.optimization_barrier((*sides.sums(largest, threshold), largest))
    lost = jnp.any(first_pass[0] < _LOG_UNDERFLOW)
    log_z, weighted, reference = jax.lax.cond(lost, from_the_set, lambda: first_pass)
    return sides.compared(log_z, weighted, reference, threshold)


def _sum_where(mask: Bool[Array, "J P"], values: Float[Array, "J P"]) -> Float[Array, " J"]:
    return jnp.sum(jnp.where(mask, values, 0), axis=1)
