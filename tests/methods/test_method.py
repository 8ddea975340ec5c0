"""What a training method is: the step's key; what is random in a step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from mtpd_jax.data.pipeline import put_on_devices
from mtpd_jax.sharding import batch_sharding
from mtpd_jax.training.optimizer import make_optimizer
from mtpd_jax.training.state import abstract_state, initial_state, state_shardings
from mtpd_jax.training.step import make_step
from tests.builders import method_on, packed_batch, step_context, tiny_config, with_micro_batches


def steps_seen(config, number=3):
    """The keys that counts and losses of a method's steps are given, and for which rows."""
    method, optimizer, seen = method_on(config), make_optimizer(config), {"count": [], "loss": []}

    def spy(name):
        real = getattr(method, name)

        def wrapped(*arguments):
            rows = next(one for one in arguments if hasattr(one, "segment_ids"))
            context = arguments[-1]
            told = context.step, *(jax.random.key_data(key).ravel() for key in (context.key, context.row_keys))
            jax.debug.callback(
                lambda step, key, own, token: seen[name].append((int(step), *key.tolist(), *own.tolist(), int(token))),
                *told, rows.tokens[0, 0],
            )  # fmt: skip
            return real(*arguments)

        return wrapped

    method.count, method.loss = spy("count"), spy("loss")
    step = make_step(method, optimizer, state_shardings(abstract_state(method, optimizer)))
    state = initial_state(method, optimizer)
    batch = put_on_devices(with_micro_batches(packed_batch(config), 2), batch_sharding(method.mesh))
    for _ in range(number):
        state, result = step(state, batch)
    jax.block_until_ready((state, result))
    jax.effects_barrier()
    return seen


def test_a_step_has_a_key_of_its_own_and_so_have_its_parts():
    """Of the seed, the step and the row in the whole batch; a count and a loss of the same rows are given the same."""
    config = tiny_config(training__micro_batches=2, heads__num_heads=0)
    seen = steps_seen(config)
    assert sorted(seen["count"]) == sorted(seen["loss"]) and len(set(seen["count"])) == 6
    expected = set()
    for step in range(3):
        key, of_rows = jax.random.split(jax.random.fold_in(jax.random.key(config.training.seed), step))
        rows = [jax.random.key_data(jax.random.fold_in(of_rows, row)).tolist() for row in range(8)]
        parts = [itertools.chain(*rows[:4]), itertools.chain(*rows[4:])]
        expected |= {(step, *jax.random.key_data(key).tolist(), *part) for part in parts}
    assert {told[:-1] for told in seen["loss"]} == expected
    other = steps_seen(tiny_config(training__micro_batches=2, heads__num_heads=0, training__seed=1), number=1)
    assert not {told[1:-1] for told in other["loss"]} & {told[1:-1] for told in seen["loss"]}


def test_weights_are_sums_of_what_the_parts_count():
    config = tiny_config(training__micro_batches=2)
    method, batch = method_on(config), with_micro_batches(packed_batch(config), 2)
    parts = [method.count(jax.tree.map(lambda array, i=i: array[i], batch), step_context()) for i in range(2)]
    whole = method.count(jax.tree.map(lambda array: array.reshape(-1, 32), batch), step_context())
    np.testing.assert_array_equal(jnp.stack(parts).sum(0), whole)
