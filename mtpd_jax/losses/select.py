"""The n-th largest logit of each row: exact, without sorting and without gathers.

A search over the monotone integer keys of float32 numbers. Every pass over the row counts the entries above a few
pivots and narrows the bracket that holds the answer. One pivot halves the range of keys, so that 32 passes always
suffice; the others are put where the counts so far say that the answer is, which for logits takes 4 to 8 passes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mtpd_jax.losses.vocabulary import Vocabulary
from mtpd_jax.shapes import Array, Float, UInt32

_SIGN = np.uint32(1 << 31)

# Where pivots lie around the expected place, in units of its uncertainty. On accelerators a pass costs what reading
# the logits costs, with 7 pivots as with one; on a CPU every pivot is a loop of its own. Our choice, by simulation.
_OFFSETS_ON_CPU = (0.0,)
_OFFSETS_ON_ACCELERATOR = (3.0, 1.0, 0.3, -0.3, -1.0, -3.0)
# The expected place is off by about this much times the square of the bracket's extent in log odds.
_CURVATURE = 1e-3


def ordered_key(values: Float[Array, "*rows"]) -> UInt32[Array, "*rows"]:
    """Maps float32 numbers to integers whose order is theirs; minus zero comes right before zero, NaN at the ends."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)


def value_of_key(keys: UInt32[Array, "*rows"]) -> Float[Array, "*rows"]:
    """The inverse of ``ordered_key``."""
    return jax.lax.bitcast_convert_type(jnp.where(keys >= _SIGN, keys ^ _SIGN, ~keys), jnp.float32)


def nth_largest(
    values: Float[Array, "P V"],
    n: int,
    vocabulary: Vocabulary = Vocabulary(),
) -> Float[Array, " P"]:
    """A threshold per row such that ``values >= threshold`` marks the n largest entries and all ties with the n-th.

    It is the n-th largest value itself where that has ties, and otherwise a number between it and the next one below.

    Args:
      values: [P, V] in float32. NaN counts as smaller than everything; +-infinity are numbers like others.
      n: 1…V.
      vocabulary: which part of the rows ``values`` is.
    """
    size = vocabulary.size(values)
    offsets = _OFFSETS_ON_CPU if jax.default_backend() == "cpu" else _OFFSETS_ON_ACCELERATOR

    def log_odds(count: Array | float) -> Array:
        return jnp.log((count + 0.5) / (size - count + 0.5))

    def unsettled(bracket: tuple[Array, ...]) -> Array:
        low, high, at_low, _ = bracket
        return (at_low != n) & (high - low > 1)

    def pivots(bracket: tuple[Array, ...]) -> list[Array]:
        low, high, at_low, at_high = bracket
        extent = log_odds(at_low) - log_odds(at_high)
        # The log odds of a rank are nearly linear in the logit; within a bracket, ranks scatter as in a binomial draw.
        scatter = jnp.sqrt((at_low - n) * (n - at_high) / (at_low - at_high)) * (1 / (n + 0.5) + 1 / (size - n + 0.5))
        uncertainty = scatter + _CURVATURE * extent**2
        start, end = value_of_key(low), value_of_key(high)
        places = [jnp.clip((log_odds(at_low) - log_odds(n) - o * uncertainty) / extent, 0, 1) for o in offsets]
        guesses = [jnp.clip(ordered_key(start + (end - start) * place), low + 1, high - 1) for place in places]
        return [low + (high - low) // 2, *guesses]

    def narrow(bracket: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, at_low, at_high = bracket
        open_ = unsettled(bracket)
        found = pivots(bracket)
        counts = [vocabulary.count(values >= value_of_key(pivot)[:, None]) for pivot in found]
        for pivot, count in zip(found, counts, strict=True):
            raises, lowers = open_ & (count >= n) & (pivot > low), open_ & (count < n) & (pivot < high)
            low, at_low = jnp.where(raises, pivot, low), jnp.where(raises, count, at_low)
            high, at_high = jnp.where(lowers, pivot, high), jnp.where(lowers, count, at_high)
        return low, high, at_low, at_high

    zero = jnp.zeros(values.shape[0], jnp.float32)
    bracket = ordered_key(vocabulary.min(values)), ordered_key(vocabulary.max(values)) + 1, zero + size, zero
    return value_of_key(jax.lax.while_loop(lambda b: jnp.any(unsettled(b)), narrow, bracket)[0])
