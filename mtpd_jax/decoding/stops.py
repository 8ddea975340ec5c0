"""What ends a text: end tokens, and stop strings, which may begin and end inside of tokens.

Stop strings are looked for while the text is written. An automaton reads the bytes of every token (Aho and Corasick,
1975): its state is how much of a string the text ends with. What a whole token does to a state is a table.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct

from mtpd_jax.shapes import Array, Bool, Int

# Stop strings together; the table has a row of V entries for each byte. Our choice.
_MOST_BYTES = 1024
_SMALLEST_TABLE = 16


@struct.dataclass
class Stops:
    """What ends a text.

    Attributes:
      end_ids: tokens that do.
      transitions: [A, V]; the state of the automaton after a token, from the state before it; 0 is where a text begins,
        and A the state in which a stop string has been written. None without stop strings.
    """

    end_ids: tuple[int, ...] = struct.field(pytree_node=False)
    # Ahead-of-time compilation makes such a tree of other things than arrays.
    transitions: Any = None

    def find(
        self, tokens: Int[Array, "B T"], state: Int[Array, " B"]
    ) -> tuple[Bool[Array, "B T"], Int[Array, "B T"] | None]:
        """Which tokens end a text, and the automaton's state after each of them.

        Args:
          tokens: [B, T]; what would be written next.
          state: [B]; before them.
        """
        # End tokens by themselves; strings by what the text would end with.
        ends = jnp.zeros(tokens.shape, bool)
        for end_id in self.end_ids:
            ends |= tokens == end_id
        if self.transitions is None:
            return ends, None
        if not tokens.shape[1]:
            return ends, tokens
        matched, states = self.transitions.shape[0], []
        for token in jnp.moveaxis(tokens, 1, 0):  # a few
            # What comes after a match is not written.
            state = self.transitions[jnp.minimum(state, matched - 1), token]
            states.append(state)
        states = jnp.stack(states, axis=1)
        return ends | (states == matched), states


def transitions_of(token_bytes: Sequence[bytes], strings: Sequence[str]) -> np.ndarray:
    """The table of ``Stops``, [A, V] int32.

    Args:
      token_bytes: what each id writes.
      strings: none of them empty.

    Raises:
      ValueError: a string is empty, or they are too long together.
    """
    if not all(strings):
        raise ValueError("stop = '': expected a text that is not empty")
    # The automaton of bytes, then what whole tokens do to its states.
    wanted = [string.encode("utf-8", errors="surrogatepass") for string in strings]
    if sum(map(len, wanted)) > _MOST_BYTES:
        raise ValueError(f"stop: {sum(map(len, wanted))} bytes: expected at most {_MOST_BYTES} in all stop strings")
    by_byte = _automaton(wanted)
    # All tokens take a step at once, byte by byte; a shorter one stays where it is.
    lengths = np.array([len(token) for token in token_bytes])
    padded = np.zeros((len(token_bytes), max(lengths.max(initial=0), 1)), np.uint8)
    for token, written in zip(padded, token_bytes, strict=True):
        token[: len(written)] = np.frombuffer(written, np.uint8)
    states = np.repeat(np.arange(len(by_byte) - 1)[:, None], len(token_bytes), axis=1)
    for place in range(padded.shape[1]):
        states = np.where(place < lengths, by_byte[states, padded[:, place]], states)
    # Few different sizes of tables are ever compiled for.
    matched, size = len(states), max(_SMALLEST_TABLE, 1 << (len(states) - 1).bit_length())
    states[states == matched] = size
    return np.pad(states, ((0, size - matched), (0, 0)), constant_values=size).astype(np.int32)


def _automaton(wanted: Sequence[bytes]) -> np.ndarray:
    """The state after a byte, [A+1, 256]: states are beginnings of strings, shortest first; the last is a match."""
    beginnings = sorted({text[:end] for text in wanted for end in range(len(text) + 1)} - set(wanted), key=len)
    # A beginning that holds another string whole is never come to: the match comes first.
    number = {beginning: state for state, beginning in enumerate(beginnings)}
    found = len(beginnings)
    # A match stays one; from anywhere else the longest end that may still become one.
    table = np.full((found + 1, 256), found)
    for beginning, state in number.items():
        for byte in range(256):
            text = beginning + bytes([byte])
            if not any(text.endswith(string) for string in wanted):
                table[state, byte] = next(number[text[cut:]] for cut in range(len(text) + 1) if text[cut:] in number)
    return table
