"""How far a head's distribution is from the main head's: every variant with its gradient in closed form.

Each function takes both sides over the vocabulary as exponents, log-probabilities up to a constant per row, and the
logarithms of their normalisers; ``NOTHING`` stands for log 0, outside the set that is compared and for logits of -inf.
It returns the value in nats and its derivatives by the heads' and by the teacher's exponents. The teacher's single row
is shared by all heads. Code that goes unused, such as the teacher's derivative, is not compiled.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import struct

from mtpd_jax.losses.vocabulary import Vocabulary
from mtpd_jax.shapes import Array, Float

# Finite, so that zero probability times the difference of two logarithms is zero.
NOTHING = -1e30


@struct.dataclass
class Side:
    """One side of a comparison: probabilities are ``exp(exponents - log_normaliser)``.

    Attributes:
      exponents: [J, P, V], or [1, P, V] for the teacher.
      log_normaliser: [J, P] or [1, P].
    """

    exponents: Float[Array, "J P V"]
    log_normaliser: Float[Array, "J P"]

    @property
    def log_probabilities(self) -> Float[Array, "J P V"]:
        """Of every token; ``NOTHING`` or so where the probability is zero."""
        return self.exponents - self.log_normaliser[..., None]

    @property
    def probabilities(self) -> Float[Array, "J P V"]:
        """Of every token."""
        return jnp.exp(self.log_probabilities)


Result = tuple[Float[Array, "J P"], Float[Array, "J P V"], Float[Array, "J P V"]]


def forward_kl(teacher: Side, heads: Side, vocabulary: Vocabulary) -> Result:
    """KL(teacher || head), what MTP-D distils with.

    The sum is taken before normalising, so that it joins the pass over the logits that finds the normalisers.
    """
    p, q = teacher.probabilities, heads.probabilities
    weighted = vocabulary.sum(jnp.exp(teacher.exponents) * (teacher.exponents - heads.exponents))
    log_ratio = heads.log_normaliser - teacher.log_normaliser
    value = weighted * jnp.exp(-teacher.log_normaliser) + log_ratio
    return value, q - p, p * (teacher.log_probabilities - heads.log_probabilities - value[..., None])


def reverse_kl(teacher: Side, heads: Side, vocabulary: Vocabulary) -> Result:
    """KL(head || teacher)."""
    p, q = teacher.probabilities, heads.probabilities
    log_ratios = heads.log_probabilities - teacher.log_probabilities
    value = vocabulary.sum(q * log_ratios)
    return value, q * (log_ratios - value[..., None]), p - q


def jensen_shannon(teacher: Side, heads: Side, vocabulary: Vocabulary) -> Result:
    """The mean of both sides' KL to their mixture."""
    p, q = teacher.probabilities, heads.probabilities
    log_mean = jnp.logaddexp(teacher.log_probabilities, heads.log_probabilities) - jnp.log(2.0)
    of_p = 0.5 * p * (teacher.log_probabilities - log_mean)
    of_q = 0.5 * q * (heads.log_probabilities - log_mean)
    from_p, from_q = vocabulary.sum(of_p), vocabulary.sum(of_q)
    return from_p + from_q, of_q - q * from_q[..., None], of_p - p * from_p[..., None]


def total_variation(teacher: Side, heads: Side, vocabulary: Vocabulary) -> Result:
    """1 - sum min(p, q): the share of drafts that rejection sampling turns down (Leviathan et al., 2023, §3.2)."""
    p, q = teacher.probabilities, heads.probabilities
    value = 0.5 * vocabulary.sum(jnp.abs(p - q))
    smaller_q, smaller_p = jnp.where(q < p, q, 0), jnp.where(q < p, 0, p)
    by_q = q * vocabulary.sum(smaller_q)[..., None] - smaller_q
    by_p = p * vocabulary.sum(smaller_p)[..., None] - smaller_p
    return value, by_q, by_p


def negative_log_acceptance(teacher: Side, heads: Side, vocabulary: Vocabulary) -> Result:
    """-log sum min(p, q), in the log domain, so that distributions without overlap still have a gradient.

    The LK loss (LK Losses: Direct Acceptance Rate Optimization for Speculative Decoding, arXiv 2602.23881).
    """
    log_p, log_q = teacher.log_probabilities, heads.log_probabilities
    log_smaller = jnp.minimum(log_p, log_q)
    reference = vocabulary.max(log_smaller)
    log_acceptance = reference + jnp.log(vocabulary.sum(jnp.exp(log_smaller - reference[..., None])))
    share = jnp.exp(log_smaller - log_acceptance[..., None])
    of_q, of_p = jnp.where(log_q < log_p, share, 0), jnp.where(log_q < log_p, 0, share)
    by_q = jnp.exp(log_q) * vocabulary.sum(of_q)[..., None] - of_q
    by_p = jnp.exp(log_p) * vocabulary.sum(of_p)[..., None] - of_p
    return -log_acceptance, by_q, by_p


def hybrid(teacher: Side, heads: Side, vocabulary: Vocabulary) -> Result:
    """w KL(teacher || head) + (1-w) TV with the weight w = exp(-3 (1-TV)) held constant (the same paper).

    KL while few drafts would be accepted, where TV has little gradient; TV once many are.
    """
    kl, tv = forward_kl(teacher, heads, vocabulary), total_variation(teacher, heads, vocabulary)
    weight = jnp.exp(-3 * (1 - tv[0]))
    value = weight * kl[0] + (1 - weight) * tv[0]
    by_q, by_p = (weight[..., None] * kl[i] + (1 - weight[..., None]) * tv[i] for i in (1, 2))
    return value, by_q, by_p


# The values of ``objective.kl``.
DIVERGENCES: dict[str, Callable[[Side, Side, Vocabulary], Result]] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "js": jensen_shannon,
    "tv": total_variation,
    "lk": negative_log_acceptance,
    "lk_hybrid": hybrid,
}
