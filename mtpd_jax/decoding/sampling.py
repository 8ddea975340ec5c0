"""Turning logits into tokens: greedy, or sampling with temperature, top-k and top-p."""

import dataclasses

import jax
import jax.numpy as jnp

from mtpd_jax.losses.vocabulary import WHOLE
from mtpd_jax.shapes import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the same for the main head and for drafts.

    Attributes:
      temperature: divides the logits; 0 is greedy decoding.
      top_k: keep the k most probable tokens (and ties with the k-th); None keeps all.
      top_p: keep the fewest most probable tokens whose probabilities add up to at least p; None keeps all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def validate(self) -> None:
        """Checks the values.

        Raises:
          ValueError: naming the value and what is allowed.
        """
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
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    kept = jax.nn.softmax(logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        order = jnp.argsort(-kept, axis=-1)
        descending = jnp.take_along_axis(kept, order, axis=-1)
        # A token stays if those before it do not reach p yet; the first always does.
        stays = jnp.cumsum(descending, axis=-1) - descending < sampling.top_p
        back = jnp.argsort(order, axis=-1)
        kept = jnp.where(jnp.take_along_axis(stays, back, axis=-1), kept, 0)
        kept = kept / jnp.sum(kept, axis=-1, keepdims=True)
    return kept


def draw(keys: Array, weights: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Draws one token per row, with a key per row, in proportion to the weights."""
    return jax.vmap(jax.random.categorical)(keys, jnp.log(weights)).astype(jnp.int32)


def fold(keys: Array, number: int | Int[Array, " B"]) -> Array:
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


def accept_drafts(
    keys: Array, drafts: Int[Array, "B K"], draft_probabilities: Float[Array, "B K V"], target: Float[Array, "B J V"]
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Speculative sampling: how many drafts stand, and the token after them (arXiv 2211.17192, theorem 1).

    Draft k, drawn from q_k, stands with probability min(1, p_k(draft) / q_k(draft)) while those before it do. The
    first that falls is replaced by a draw from max(p - q, 0), renormalised; if none falls, a bonus token comes from
    the last row of p. What comes out is distributed exactly as draws from p, whatever q is.

    Args:
      keys: one per row.
      drafts: [B, K].
      draft_probabilities: [B, K, V]; q, the distributions that the drafts were really drawn from.
      target: [B, K+1, V]; p, after the confirmed text and 0…K drafts.
    """
    num_drafts = drafts.shape[1]
    q_of_draft = jnp.take_along_axis(draft_probabilities, drafts[:, :, None], axis=-1)[..., 0]
    p_of_draft = jnp.take_along_axis(target[:, :-1], drafts[:, :, None], axis=-1)[..., 0]
    uniform_BxK = jax.vmap(lambda key: jax.random.uniform(key, (num_drafts,)))(fold(keys, 0))
    accepted = count_leading(uniform_BxK * q_of_draft < p_of_draft)
    p = jnp.take_along_axis(target, accepted[:, None, None], axis=1)[:, 0]
    # After the last draft nothing was proposed: q is zero there, and what is left over of p is p itself.
    padded_q = jnp.pad(draft_probabilities, ((0, 0), (0, 1), (0, 0)))
    left_over = jnp.maximum(p - jnp.take_along_axis(padded_q, accepted[:, None, None], axis=1)[:, 0], 0)
    # Rounding can reject a draft although p equals q; then nothing is left over, and p is right.
    left_over = jnp.where(jnp.sum(left_over, axis=-1, keepdims=True) > 0, left_over, p)
    return accepted, draw(fold(keys, 1), left_over)


def count_leading(flags: Bool[Array, "B K"]) -> Int[Array, " B"]:
    """How many flags at the beginning of each row are set."""
    return jnp.sum(jnp.cumprod(flags.astype(jnp.int32), axis=1), axis=1)
