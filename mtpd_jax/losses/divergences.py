"""How far a head's distribution is from the main head's: every variant with its gradient in closed form.

Each function takes a ``Comparison`` and returns the value in nats and its derivatives by the heads' and by the
teacher's log-probabilities before normalising. What goes unused, such as the teacher's derivative, is not compiled.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import struct

from mtpd_jax.shapes import Array, Bool, Float
from mtpd_jax.sharding import LastAxis

# Stands for log 0. Finite, so that zero probability times the difference of two logarithms is zero.
NOTHING = -1e30


@struct.dataclass
class Comparison:
    """Teacher and heads over the tokens that are compared; the teacher's row is the same for all heads.

    Attributes:
      chosen: [1, P, V]; the tokens that are compared; None for all.
      p_exponents, q_exponents: [1, P, V] and [J, P, V]; log-probabilities of teacher and heads up to a constant per
        row, no less than ``NOTHING``; outside the chosen set without meaning, but finite.
      log_zp, log_zq: [J, P]; logarithms of the sums of their exponentials over the chosen set.
      weighted: [J, P]; the sum of exp(p_exponents) (p_exponents - q_exponents) over the chosen set.
    """

    chosen: Bool[Array, "1 P V"] | None
    p_exponents: Float[Array, "1 P V"]
    q_exponents: Float[Array, "J P V"]
    log_zp: Float[Array, "J P"]
    log_zq: Float[Array, "J P"]
    weighted: Float[Array, "J P"]

    def keep(self, values: Float[Array, "_ P V"], otherwise: float = 0.0) -> Float[Array, "_ P V"]:
        """Replaces what is not chosen."""
        return values if self.chosen is None else jnp.where(self.chosen, values, otherwise)

    @property
    def log_p(self) -> Float[Array, "J P V"]:
        """The teacher's log-probabilities, where chosen."""
        return self.p_exponents - self.log_zp[..., None]

    @property
    def log_q(self) -> Float[Array, "J P V"]:
        """The heads' log-probabilities, where chosen."""
        return self.q_exponents - self.log_zq[..., None]

    @property
    def p(self) -> Float[Array, "J P V"]:
        """The teacher's probabilities; the exponentials are those of ``weighted``, and so are taken once."""
        return self.keep(jnp.exp(self.p_exponents)) * jnp.exp(-self.log_zp)[..., None]

    @property
    def q(self) -> Float[Array, "J P V"]:
        """The heads' probabilities."""
        return self.keep(jnp.exp(self.log_q))


Result = tuple[Float[Array, "J P"], Float[Array, "J P V"], Float[Array, "J P V"]]


def forward_kl(sides: Comparison, vocabulary: LastAxis) -> Result:
    """KL(teacher || head), what MTP-D distils with."""
    # From sums before normalising, which take no pass of their own over the logits.
    value = sides.weighted * jnp.exp(-sides.log_zp) + (sides.log_zq - sides.log_zp)
    return value, sides.q - sides.p, sides.p * (sides.log_p - sides.log_q - value[..., None])


def reverse_kl(sides: Comparison, vocabulary: LastAxis) -> Result:
    """KL(head || teacher)."""
    p, q = sides.p, sides.q
    log_ratios = sides.log_q - sides.log_p
    value = vocabulary.sum(q * log_ratios)
    return value, q * (log_ratios - value[..., None]), p - q


def jensen_shannon(sides: Comparison, vocabulary: LastAxis) -> Result:
    """The mean of both sides' KL to their mixture."""
    p, q = sides.p, sides.q
    # The mixture of both, in the log domain.
    log_mean = jnp.logaddexp(sides.log_p, sides.log_q) - jnp.log(2.0)
    of_p = 0.5 * p * (sides.log_p - log_mean)
    of_q = 0.5 * q * (sides.log_q - log_mean)
    from_p, from_q = vocabulary.sum(of_p), vocabulary.sum(of_q)
    return from_p + from_q, of_q - q * from_q[..., None], of_p - p * from_p[..., None]


def total_variation(sides: Comparison, vocabulary: LastAxis) -> Result:
    """1 - sum min(p, q): the share of drafts that rejection sampling turns down (Leviathan et al., 2023, §3.2)."""
    p, q = sides.p, sides.q
    value = 0.5 * vocabulary.sum(jnp.abs(p - q))
    # The derivative of sum min(p, q): of whichever is smaller.
    smaller_q, smaller_p = jnp.where(q < p, q, 0), jnp.where(q < p, 0, p)
    by_q = q * vocabulary.sum(smaller_q)[..., None] - smaller_q
    by_p = p * vocabulary.sum(smaller_p)[..., None] - smaller_p
    return value, by_q, by_p


def negative_log_acceptance(sides: Comparison, vocabulary: LastAxis) -> Result:
    """-log sum min(p, q), in the log domain, so that distributions without overlap still have a gradient.

    The LK loss (LK Losses: Direct Acceptance Rate Optimization for Speculative Decoding, arXiv 2602.23881).
    """
    log_p, log_q = sides.log_p, sides.log_q
    log_smaller = sides.keep(jnp.minimum(log_p, log_q), NOTHING)
    # log sum exp of the smaller of both.
    reference = vocabulary.max(log_smaller)
    log_acceptance = reference + jnp.log(vocabulary.sum(jnp.exp(log_smaller - reference[..., None])))
    share = jnp.exp(log_smaller - log_acceptance[..., None])
    of_q, of_p = jnp.where(log_q < log_p, share, 0), jnp.where(log_q < log_p, 0, share)
    by_q = sides.q * vocabulary.sum(of_q)[..., None] - of_q
    by_p = sides.p * vocabulary.sum(of_p)[..., None] - of_p
    return -log_acceptance, by_q, by_p


def hybrid(sides: Comparison, vocabulary: LastAxis) -> Result:
    """w KL(teacher || head) + (1-w) TV with the weight w = exp(-3 (1-TV)) held constant (the same paper).

    KL while few drafts would be accepted, where TV has little gradient; TV once many are.
    """
    kl, tv = forward_kl(sides, vocabulary), total_variation(sides, vocabulary)
    weight = jnp.exp(-3 * (1 - tv[0]))
    value = weight * kl[0] + (1 - weight) * tv[0]
    by_q, by_p = (weight[..., None] * kl[i] + (1 - weight[..., None]) * tv[i] for i in (1, 2))
    return value, by_q, by_p


# The values of ``objective.kl``.
DIVERGENCES: dict[str, Callable[[Comparison, LastAxis], Result]] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "js": jensen_shannon,
    "tv": total_variation,
    "lk": negative_log_acceptance,
    "lk_hybrid": hybrid,
}
