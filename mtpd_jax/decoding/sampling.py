"""Turning logits into tokens: greedy, or sampling with temperature, top-k and top-p."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mtpd_jax.shapes import Array, Bool, Float, Int
from mtpd_jax.sharding import WHOLE, constrain
from mtpd_jax.validation import check_integer, check_number


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; by default the same for the main head and for drafts, which is best for acceptance.

    Attributes:
      temperature: divides the logits; 0 is greedy decoding.
      top_k: keep the k most probable tokens (and ties with the k-th); None keeps all.
      top_p: keep the fewest most probable tokens whose probabilities add up to at least p (and ties with the last);
        None keeps all.
      greedy_drafts: the heads draft their likeliest token instead of drawing one.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    greedy_drafts: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def of_drafts(self) -> "Sampling":
        """How drafts are chosen."""
        return GREEDY if self.greedy_drafts else self

    def validate(self) -> None:
        """Checks the values.

        Raises:
          ValueError: naming the value and what is allowed.
        """
        # Types first, then ranges.
        check_number("temperature", self.temperature)
        if self.top_k is not None:
            check_integer("top_k", self.top_k)
        if self.top_p is not None:
            check_number("top_p", self.top_p)
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature}: expected zero (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k}: expected at least one token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: expected a probability, more than zero and at most one")
        if self.greedy and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p need a temperature above zero: greedy decoding takes the likeliest token")


GREEDY = Sampling()


def probabilities(logits: Float[Array, "*rows V"], sampling: Sampling) -> Float[Array, "*rows V"]:
    """The distribution that tokens are drawn from: temperature, then top-k, then top-p, renormalised (float32)."""
    # Whole rows on every device that has a part of them. Sorts, blocks and draws go across a row, and what the
    # partitioner makes of those waits for the devices of other copies of the model, which may have nothing left to do.
    logits = constrain(logits.astype(jnp.float32), *("batch", *(None,) * (logits.ndim - 1)))
    # Differences first: however cold, the largest is 0 and the others fall to minus infinity, where quotients of large
    # numbers would all be infinite.
    coldest = float(jnp.finfo(jnp.float32).tiny)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / max(sampling.temperature, coldest)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    kept = jax.nn.softmax(logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        descending = -jnp.sort(-kept, axis=-1)
        # A token stays if those before it do not reach p yet; the first always does.
        stays = jnp.cumsum(descending, axis=-1) - descending < sampling.top_p
        smallest = jnp.min(jnp.where(stays, descending, jnp.inf), axis=-1, keepdims=True)
        kept = jnp.where(kept >= smallest, kept, 0)
        kept = kept / jnp.sum(kept, axis=-1, keepdims=True)
    return kept


def draw(keys: Array, weights: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Draws one token per row, with a key per row, in proportion to the weights.

    By inversion in two steps (our choice): first a block of about sqrt(V) tokens, then the token in it. Two uniform
    numbers do, where the largest of V perturbed logits takes V of them and as many logarithms, which on a CPU is more
    than all the rest of sampling; and together they are fine enough for the rarest tokens of a large vocabulary.
    """
    width = math.isqrt(weights.shape[1] - 1) + 1
    blocks = jnp.pad(weights, ((0, 0), (0, width * width - weights.shape[1]))).reshape(-1, width, width)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = invert(jnp.sum(blocks, axis=-1), uniform[:, 0])
    token = invert(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], uniform[:, 1])
    return block * width + token


def invert(weights: Float[Array, "B N"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """The first place at which the cumulative weights exceed a share, in [0, 1), of all; never one of no weight.

    Sums of different lengths round differently, so that a place without weight may seem to add to them.
    """
    upto = jnp.where(weights > 0, jnp.cumsum(weights, axis=1), 0)
    return jnp.argmax(upto > (uniform * jnp.max(upto, axis=1))[:, None], axis=1).astype(jnp.int32)


def fold(keys: Array, number: int | Int[Array, ""] | Int[Array, " B"]) -> Array:
    """Derives a new key per row from a number, shared or per row."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(jnp.asarray(number), keys.shape))


def choose(
    keys: Array, logits: Float[Array, "B V"], sampling: Sampling
) -> tuple[Int[Array, " B"], Float[Array, "B V"] | None]:
    """One token per row, and the distribution that it was drawn from (None if greedy)."""
    if sampling.greedy:
        return WHOLE.argmax(logits), None
    distribution = probabilities(logits, sampling)
    return draw(keys, distribution), distribution


def confidence(logits: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
    """The probability of the likeliest token, at temperature 1."""
    return jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))


def probability_of(
    tokens: Int[Array, " B"], logits: Float[Array, "B V"], distribution: Float[Array, "B V"] | None
) -> Float[Array, " B"]:
    """The probability of what ``choose`` chose, where it was drawn from; at temperature 1 if greedy."""
    if distribution is None:
        return confidence(logits)
    return jnp.take_along_axis(distribution, tokens[:, None], axis=1)[:, 0]


def accept_drafts(
    keys: Array,
    drafts: Int[Array, "B K"],
    count: Int[Array, " B"],
    draft_probabilities: Float[Array, "B K V"] | None,
    target: Float[Array, "B J V"],
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Speculative sampling: how many drafts stand, and the token after them (arXiv 2211.17192, theorem 1).

    Draft k, drawn from q_k, stands with probability min(1, p_k(draft) / q_k(draft)) while those before it do. The
    first that falls is replaced by a draw from max(p - q, 0), renormalised; if none falls, a bonus token comes from
    the row of p after them. What comes out is distributed exactly as draws from p, whatever q is.

    Args:
      keys: one per row.
      drafts: [B, K].
      count: [B]; how many drafts of each row were made. What follows them is ignored.
      draft_probabilities: [B, K, V]; q, the distributions that the drafts were really drawn from; None if each draft
        was certain.
      target: [B, K+1, V]; p, after the confirmed text and 0…K drafts.
    """
    num_drafts = drafts.shape[1]
    # What target and draft distributions gave each draft.
    p_of_draft = jnp.take_along_axis(target[:, :-1], drafts[:, :, None], axis=-1)[..., 0]
    if draft_probabilities is None:
        q_of_draft = jnp.ones_like(p_of_draft)
    else:
        q_of_draft = jnp.take_along_axis(draft_probabilities, drafts[:, :, None], axis=-1)[..., 0]
    # Each draft stands or falls by a draw of its own; after the first that falls none stands.
    uniform_BxK = jax.vmap(lambda key: jax.random.uniform(key, (num_drafts,)))(fold(keys, 0))
    made_BxK = jnp.arange(num_drafts)[None, :] < count[:, None]
    accepted = count_leading((uniform_BxK * q_of_draft < p_of_draft) & made_BxK)
    # The token after them: from what p has more of than q.
    p = jnp.take_along_axis(target, accepted[:, None, None], axis=1)[:, 0]
    # After the last draft nothing was proposed: q is zero there, and what is left over of p is p itself.
    at = jnp.minimum(accepted, num_drafts - 1)[:, None]
    if not num_drafts:
        q = jnp.zeros_like(p)
    elif draft_probabilities is None:
        q = jax.nn.one_hot(jnp.take_along_axis(drafts, at, axis=1)[:, 0], p.shape[-1])
    else:
        q = jnp.take_along_axis(draft_probabilities, at[:, :, None], axis=1)[:, 0]
    left_over = jnp.maximum(p - jnp.where((accepted < count)[:, None], q, 0), 0)
    # Rounding can reject a draft although p equals q; then nothing is left over, and p is right.
    left_over = jnp.where(jnp.sum(left_over, axis=-1, keepdims=True) > 0, left_over, p)
    return accepted, draw(fold(keys, 1), left_over)


def count_leading(flags: Bool[Array, "B K"]) -> Int[Array, " B"]:
    """How many flags at the beginning of each row are set."""
    return jnp.sum(jnp.cumprod(flags.astype(jnp.int32), axis=1), axis=1)
