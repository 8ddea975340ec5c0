"""``shift`` against a loop over positions."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpd_jax.model.shift import shift


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans(), st.integers(-4, 4))
def test_against_a_loop(lengths, padded, by):
    """Rows of one length, whose end is padding or another document."""
    segment_ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    rest = np.full(22 - segment_ids.size, 0 if padded else len(lengths) + 1)
    segment_ids = np.concatenate([segment_ids, rest])[None]
    values = np.arange(1, segment_ids.size + 1)[None]
    moved, valid = shift(jnp.asarray(values), jnp.asarray(segment_ids), by)
    for i in range(segment_ids.size):
        j = i + by
        same = 0 <= j < segment_ids.size and segment_ids[0, j] == segment_ids[0, i] != 0
        assert valid[0, i] == same
        assert moved[0, i] == (values[0, j] if same else 0)


def test_trailing_axes_move_along():
    values = jnp.arange(12.0).reshape(1, 3, 4)
    moved, _ = shift(values, jnp.ones((1, 3), jnp.int32), 1)
    np.testing.assert_array_equal(moved[0, :2], values[0, 1:])
