"""The n-th largest logit of each row: exact, without sorting and without gathers.

A search over the monotone integer keys of float32 numbers. Every pass over the row counts the entries above a few
pivots and narrows the bracket that holds the answer. One pivot halves the range of keys, so that 32 passes always
suffice; the others are put where the counts so far say that the answer is, which takes 4 to 9 passes for logits.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mtpd_jax.shapes import Array, Float, Int, UInt32
from mtpd_jax.sharding import WHOLE, LastAxis

_SIGN = np.uint32(1 << 31)

# Where pivots lie around the expected place, in units of its uncertainty. On accelerators a pass costs what reading
# the logits costs, with 11 pivots as with one; on a CPU every pivot is a loop of its own. By measurement.
_OFFSETS_ON_CPU = (0.0,)
_OFFSETS_ON_ACCELERATOR = (4.0, 2.0, 1.0, 0.5, 0.2, -0.2, -0.5, -1.0, -2.0, -4.0)
# One pivot in the middle halves the range of 32-bit keys: whatever the numbers are, this many passes settle a row.
_MOST_PASSES = 32
# The expected place is off by about this much times the square of the bracket's extent in log odds.
_CURVATURE = 1e-3


def ordered_key(values: Float[Array, "*rows"]) -> UInt32[Array, "*rows"]:
    """Maps float32 numbers to integers whose order is theirs; minus zero comes right before zero, NaN at the ends."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)


def value_of_key(keys: UInt32[Array, "*rows"]) -> Float[Array, "*rows"]:
    """The inverse of ``ordered_key``, but that subnormal numbers become zero: not every device tells them from it."""
    values = jax.lax.bitcast_convert_type(jnp.where(keys >= _SIGN, keys ^ _SIGN, ~keys), jnp.float32)
    return jnp.where(jnp.abs(values) < jnp.finfo(jnp.float32).tiny, 0.0, values)


@struct.dataclass
class _Bracket:
    """Keys between which the answer lies: at least n entries reach ``low``, fewer reach ``high``."""

    low: UInt32[Array, " P"]
    high: UInt32[Array, " P"]
    at_low: Float[Array, " P"]
    at_high: Float[Array, " P"]

    def unsettled(self, n: int) -> Array:
        """Where more passes are needed."""
        return (self.at_low != n) & (self.high - self.low > 1)

    def narrowed(self, pivot: Array, count: Array, n: int) -> "_Bracket":
        """Takes in that ``count`` entries reach the pivot."""
        inside = (pivot > self.low) & (pivot < self.high)
        raises, lowers = inside & (count >= n), inside & (count < n)
        return _Bracket(
            jnp.where(raises, pivot, self.low),
            jnp.where(lowers, pivot, self.high),
            jnp.where(raises, count, self.at_low),
            jnp.where(lowers, count, self.at_high),
        )


def _pivots(bracket: _Bracket, n: int, size: int, offsets: tuple[float, ...]) -> list[Array]:
    """The middle of the bracket's keys, and places around where interpolation expects the answer."""

    def log_odds(count: Array | int) -> Array:
        return jnp.log((count + 0.5) / (size - count + 0.5))

    # How far the bracket reaches, in log odds of the rank.
    extent = log_odds(bracket.at_low) - log_odds(bracket.at_high)
    # The log odds of a rank are nearly linear in the logit; within a bracket, ranks scatter as in a binomial draw.
    variance = (bracket.at_low - n) * (n - bracket.at_high) / (bracket.at_low - bracket.at_high)
    scatter = jnp.sqrt(jnp.maximum(variance, 0)) * (1 / (n + 0.5) + 1 / (size - n + 0.5))
    uncertainty = scatter + _CURVATURE * extent**2
    expected = log_odds(bracket.at_low) - log_odds(n)
    # Places around the expected one, by the values at the ends; and the middle, which always halves what is left.
    start, end = value_of_key(bracket.low), value_of_key(bracket.high)
    places = [jnp.clip((expected - offset * uncertainty) / extent, 0, 1) for offset in offsets]
    guesses = [ordered_key(start + (end - start) * place) for place in places]
    return [
        bracket.low + (bracket.high - bracket.low) // 2,
        *(jnp.clip(guess, bracket.low + 1, bracket.high - 1) for guess in guesses),
    ]


def nth_largest(values: Float[Array, "P V"], n: int, vocabulary: LastAxis = WHOLE) -> Float[Array, " P"]:
    """A threshold per row such that ``values >= threshold`` marks the n largest entries and all ties with the n-th.

    It is the n-th largest value itself where that has ties, and otherwise a number between it and the next one below.

    Args:
      values: [P, V] in float32. NaN counts as smaller than everything; +-infinity are numbers like others;
        subnormal numbers may count as zero.
      n: 1…V.
      vocabulary: which part of the rows ``values`` is.
    """
    return search(values, n, vocabulary)[0]


def search(
    values: Float[Array, "P V"], n: int, vocabulary: LastAxis = WHOLE
) -> tuple[Float[Array, " P"], Int[Array, ""]]:
    """What ``nth_largest`` returns, and the number of counting passes that the slowest row took."""
    size = vocabulary.size(values)
    offsets = _OFFSETS_ON_CPU if vocabulary.on_cpu else _OFFSETS_ON_ACCELERATOR

    def narrow(state: tuple[_Bracket, Array]) -> tuple[_Bracket, Array]:
        bracket, passes = state
        pivots = _pivots(bracket, n, size, offsets)
        counts = [vocabulary.count(values >= value_of_key(pivot)[:, None]) for pivot in pivots]
        for pivot, count in zip(pivots, counts, strict=True):
            bracket = bracket.narrowed(pivot, count, n)
        return bracket, passes + 1

    zero = jnp.zeros(values.shape[0], jnp.float32)
    # A row with NaN has no bounds to begin from: backends give NaN for its minimum, or leave it out, and then the
    # minimum of nothing else is infinity, above the maximum.
    smallest, largest = vocabulary.min(values), vocabulary.max(values)
    ordered = smallest <= largest
    # The bracket begins at the row's own bounds, the upper one left out.
    low = ordered_key(jnp.where(ordered, smallest, -jnp.inf))
    high = ordered_key(jnp.where(ordered, largest, jnp.inf)) + 1
    start = _Bracket(low, high, zero + size, zero), jnp.zeros((), jnp.int32)

    def goes_on(state: tuple[_Bracket, Array]) -> Array:
        bracket, passes = state
        return jnp.any(bracket.unsettled(n)) & (passes < _MOST_PASSES)

    # As long as any row's threshold is open; bounded, whatever a backend makes of its values.
    bracket, passes = jax.lax.while_loop(goes_on, narrow, start)
    return value_of_key(bracket.low), passes
