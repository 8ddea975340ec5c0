"""Rows that are finished take the next prompt: the same texts, whatever is decoded beside them, in fewer rounds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpd_jax.decoding import batch as batch_module
from mtpd_jax.decoding.decoder import Decoder
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.decoding.stops import transitions_of
from mtpd_jax.evaluation.speed import rounds_of_batches, rounds_of_queue
from mtpd_jax.model.cache import empty_cache
from mtpd_jax.sharding import data_mesh, replicated
from tests.builders import model_of, tiny_config
from tests.decoding.models import END, PROMPTS, small_vocabulary


def prompts_of(count):
    rng = np.random.default_rng(2)
    return [rng.integers(1, 7, rng.choice([1, 2, 5, 20])).astype(np.int32) for _ in range(count)]


def untimed(continuations):
    return [dataclasses.replace(one, seconds=0.0) for one in continuations]


@pytest.mark.optimised
@pytest.mark.parametrize(
    "options",
    [
        Options(3, 20),
        Options(2, 20, Sampling(1.0)),
        pytest.param(Options(3, 20, min_confidence=0.5), marks=pytest.mark.slow),
        pytest.param(Options(3, 20, drafter="both"), marks=pytest.mark.slow),
    ],
    ids=["greedy", "sampled", "adaptive", "both"],
)
def test_what_is_written_does_not_depend_on_the_queue(options):
    """23 prompts of unequal length, four and nine rows at a time, against each alone: text, counts, everything."""
    decoder, prompts = Decoder(*small_vocabulary(), [END]), prompts_of(23)
    alone = [decoder.run([prompt], options, seed=4, first_row=row)[0] for row, prompt in enumerate(prompts)]
    assert len({len(one.tokens) for one in alone}) > 5
    for rows in (4, 9) if options == Options(3, 20) else (4,):  # written to the caches one by one, or together
        assert untimed(decoder.run(prompts, options, rows=rows, seed=4)) == untimed(alone)


def test_stop_strings_of_one_text_are_not_carried_to_the_next():
    """The row's next prompt begins anew, though the last text ended within a match."""
    decoder, prompts, options = Decoder(*small_vocabulary(), [END]), prompts_of(12), Options(2, 20)
    table = transitions_of([b"", b"x", b"y", b"xy", b"z", b"yz", b"zx"], ["zxyx", "yyyyyy"])
    alone = [decoder.run([prompt], options, transitions=table)[0] for prompt in prompts]
    assert untimed(decoder.run(prompts, options, rows=2, transitions=table)) == untimed(alone)


@pytest.mark.optimised
def test_devices_have_queues_of_their_own():
    """Three devices with two rows each, and prompts that they cannot share evenly."""
    model, parameters = small_vocabulary()
    mesh = data_mesh(jax.devices()[1:4])
    three = Decoder(model, jax.device_put(parameters, replicated(mesh)), [END], mesh)
    one, options = Decoder(model, parameters, [END]), Options(2, 20, Sampling(1.0))
    prompts = prompts_of(20)
    assert untimed(three.run(prompts, options, rows=6, seed=1)) == untimed(one.run(prompts, options, seed=1))


def test_as_many_places_on_more_devices_are_another_program():
    """Eight prompts, one at a time or two on two devices: the arrays have the same shapes."""
    model, parameters = small_vocabulary()
    mesh = data_mesh(jax.devices()[1:3])
    two = Decoder(model, jax.device_put(parameters, replicated(mesh)), [END], mesh)
    prompts, options = prompts_of(8), Options(0, 20)
    assert untimed(two.run(prompts, options, rows=1)) == untimed(two.run(prompts, options, rows=2))
    assert len(two._compiled) == 2


def counted_rounds(decoder, prompts, options, rows, monkeypatch):
    """How many rounds a queue takes: rounds of the whole batch, whoever is finished in it."""
    rounds, real = [], batch_module.one_round

    def counting(strategy, parameters, batch, stops):
        jax.debug.callback(lambda: rounds.append(1))
        return real(strategy, parameters, batch, stops)

    with monkeypatch.context() as patch:
        patch.setattr(batch_module, "one_round", counting)
        found = decoder.run(prompts, options, rows=rows)
        jax.effects_barrier()
    return len(rounds), found


def test_a_queue_takes_the_rounds_that_the_speed_model_says(monkeypatch):
    """From the passes of every prompt: fewer than batches that wait for their longest."""
    decoder, prompts, options = Decoder(*small_vocabulary(), [END]), prompts_of(16), Options(2, 20)
    rounds, found = counted_rounds(decoder, prompts, options, 4, monkeypatch)
    passes = [one.passes for one in found]
    assert rounds == rounds_of_queue(passes, 4)
    assert sum(passes) / 4 <= rounds < rounds_of_batches(passes, 4)


def test_rounds_by_hand():
    passes = [5, 1, 1, 1, 4, 2]
    assert rounds_of_batches(passes, 2) == 5 + 1 + 4
    assert rounds_of_queue(passes, 2) == 7  # 5 and 2 in one row, 1 1 1 4 in the other
    assert rounds_of_queue([3], 4) == 3 and rounds_of_batches([3, 2], 4) == 3


@pytest.mark.parametrize("stack", [None, 3])
@pytest.mark.parametrize("batch", [3, 12])
def test_a_row_of_a_cache_is_put_into_its_place(stack, batch):
    """All layers and heads of one row, and nothing else."""
    config = model_of(tiny_config()).config

    def filled(rows, first):
        cache = empty_cache(rows, 6, config, np.dtype(np.float32), stack)
        return jax.tree.map(lambda leaf: first + jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape), cache)

    whole, alone = filled(batch, 0), filled(1, 10_000)
    found = whole.put_row(jnp.int32(1), alone)
    for new, old, one in zip(*(jax.tree.leaves(cache) for cache in (found, whole, alone)), strict=True):
        leading = () if stack is None else (stack,)
        new, old = (leaf.reshape(*leading, config.kv_heads, batch, *leaf.shape[-2:]) for leaf in (new, old))
        axis = len(leading) + 1
        np.testing.assert_array_equal(jnp.take(new, 1, axis), one.reshape(jnp.take(new, 1, axis).shape))
        others = np.delete(np.arange(batch), 1)
        np.testing.assert_array_equal(jnp.take(new, others, axis), jnp.take(old, others, axis))


def test_fewer_prompts_than_rows():
    decoder, options = Decoder(*small_vocabulary(), [END]), Options(2, 12)
    assert untimed(decoder.run(PROMPTS, options, rows=99)) == untimed(decoder.run(PROMPTS, options))
