"""The n-th largest logit by search, against sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from experiments.accelerator.kernels import rows_of_logits
from mtpd_jax.losses import select
from mtpd_jax.losses.select import nth_largest, ordered_key, value_of_key
from mtpd_jax.sharding import LastAxis

PLATFORMS = [LastAxis(None, on_cpu=True), LastAxis(None, on_cpu=False)]
search = jax.jit(nth_largest, static_argnums=(1, 2))


def by_sorting(values, n):
    return values >= np.sort(values, axis=1)[:, -n, None]


@example([0.0] * 15 + [1.0], 2, PLATFORMS[0])  # the answer's key is next to those of the subnormal numbers
@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.integers(-5, 5).map(float)
        | st.floats(-(2.0**90), 2.0**90, width=32, allow_subnormal=False)
        | st.sampled_from([np.inf, -np.inf]),
        min_size=16,
        max_size=16,
    ),
    st.sampled_from([1, 2, 5, 15, 16]),
    st.sampled_from(PLATFORMS),
)
def test_marks_the_n_largest_and_all_ties(values, n, vocabulary):
    row = np.asarray([values], np.float32)
    row = np.where(np.abs(row) < 1e-30, 0, row)  # denormals are flushed by XLA on CPU
    np.testing.assert_array_equal(
        row >= np.asarray(search(jnp.asarray(row), n, vocabulary))[:, None], by_sorting(row, n)
    )


@pytest.mark.parametrize("vocabulary", PLATFORMS, ids=str)
def test_rows_of_logits(vocabulary):
    """Bell curves, heavy tails, a lone peak, few distinct values, equal values: each in its own number of passes."""
    size = 5_000
    values = rows_of_logits(size)
    for n in (1, 7, 500, size - 1, size):
        threshold = np.asarray(search(jnp.asarray(values), n, vocabulary))
        np.testing.assert_array_equal(values >= threshold[:, None], by_sorting(values, n), err_msg=str(n))


def test_keys_are_ordered_as_the_numbers_are():
    values = np.array([-np.inf, -1e30, -2.0, -1e-30, -0.0, 0.0, 1e-30, 0.5, 3e38, np.inf], np.float32)
    keys = np.asarray(ordered_key(jnp.asarray(values)), np.int64)
    assert (np.diff(keys) > 0).all()
    np.testing.assert_array_equal(value_of_key(ordered_key(jnp.asarray(values))), values)


class LeavesNanOut(LastAxis):
    """What XLA makes of a minimum and a maximum on CPUs, depending on the program around them."""

    def min(self, values):
        return jnp.min(jnp.where(jnp.isnan(values), jnp.inf, values), axis=-1)

    def max(self, values):
        return jnp.max(jnp.where(jnp.isnan(values), -jnp.inf, values), axis=-1)


@pytest.mark.parametrize("vocabulary", [*PLATFORMS, LeavesNanOut(None, True), LeavesNanOut(None, False)], ids=str)
def test_nan_ends_the_search(vocabulary):
    """Rows with NaN need not have an answer, but the rows beside them do."""
    values = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    values[1, 3], values[2], values[3, 1:], values[4, 0] = np.nan, np.nan, np.nan, -np.nan
    threshold, passes = jax.jit(select.search, static_argnums=(1, 2))(jnp.asarray(values), 9, vocabulary)
    np.testing.assert_array_equal(values[:1] >= np.asarray(threshold[:1])[:, None], by_sorting(values[:1], 9))
    assert threshold[2] == -np.inf
    assert passes <= 32


def test_no_counts_keep_the_search_going():
    """Counts that contradict each other never settle a row: no input has such, but its end must not depend on that."""

    class Inconsistent(LastAxis):
        def min(self, values):
            return jnp.full(values.shape[0], -1.0)

        def max(self, values):
            return jnp.full(values.shape[0], 1e30)

        def count(self, values):
            return jnp.full(values.shape[0], jnp.nan)

    assert select.search(jnp.zeros((1, 40)), 9, Inconsistent(None, True))[1] == 32
