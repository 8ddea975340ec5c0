"""Prompt lookup against its definition, alone and beside the heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpd_jax.decoding.batch import prefill
from mtpd_jax.decoding.decoder import Decoder
from mtpd_jax.decoding.drafters.lookup import look_up
from mtpd_jax.decoding.network import Network
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.decoding.stops import Stops
from mtpd_jax.decoding.strategies.speculative import Speculative
from tests.builders import model_and_parameters, platform, tiny_config
from tests.decoding.models import CONTEXT, END, PROMPTS, forward, small_vocabulary


def by_definition(text, count):
    """What followed the newest of the longest matches, one to three tokens long; a copy may go on into itself."""
    for size in (3, 2, 1):
        for place in range(len(text) - 1, size - 1, -1):
            if text[place - size : place] == text[len(text) - size :]:
                copied = list(text)
                for step in range(count):
                    copied.append(copied[place + step])
                return copied[len(text) :]
    return None


def test_look_up_by_its_definition():
    rng = np.random.default_rng(0)
    rows, slots = 200, 30
    tokens, lengths = rng.integers(0, 4, (rows, slots)), rng.integers(1, slots - 5, rows)
    tokens[:20] = np.arange(slots)  # nothing stands twice
    found, there = look_up(jnp.asarray(tokens), jnp.asarray(lengths), 5)
    matched = set()
    for row, length in enumerate(lengths):
        expected = by_definition(tokens[row, :length].tolist(), 5)
        assert bool(there[row]) == (expected is not None)
        if expected is not None:
            assert found[row].tolist() == expected
        matched.add(expected is not None)
    assert matched == {True, False}


@pytest.mark.optimised
@pytest.mark.parametrize("drafter", [pytest.param("lookup", marks=pytest.mark.slow), "both"])
def test_what_is_copied_loses_nothing(drafter):
    """Greedy text is plain decoding's, in fewer passes; where who is better drafts, it is no worse than the heads."""
    model, parameters = small_vocabulary(trained=False)  # heads are no good, and text repeats itself
    decoder = Decoder(model, parameters, [END])
    options = Options(4, 40, drafter=drafter)
    plain, heads, found = (
        decoder.run(PROMPTS, each) for each in (Options(0, 40), Options(4, 40), options)
    )  # fmt: skip
    assert [one.tokens for one in found] == [one.tokens for one in plain]
    copied = [token == -1 for one in found for token in one.proposers]
    assert sum(copied) > 20 and sum(one.passes for one in found) < 0.9 * sum(one.passes for one in heads)
    for one in found:
        assert len(one.tokens) == 1 + one.passes + sum(one.accepted) or one.tokens[-1] == END or one.proposers[-1]
        assert sum(1 for proposer in one.proposers if proposer) == sum(one.accepted)


def reference_copying(model, parameters, prompt, drafts, new_tokens):
    """Greedy text with drafts from ``by_definition``: tokens, passes, and how often each place was tried and stood."""
    logits, text, limit = forward(model, parameters), list(prompt), len(prompt) + new_tokens
    text.append(int(logits(text)[0, -1].argmax()))
    passes, tried, accepted = 0, [0] * drafts, [0] * drafts
    while text[-1] != END and len(text) < limit:
        passes += 1
        copied = by_definition(text, drafts) or []
        for k in range(drafts + 1):
            choice = int(logits(text)[0, -1].argmax())
            stands = k < len(copied) and copied[k] == choice
            if k < len(copied):
                tried[k] += 1
                accepted[k] += stands
            text.append(choice)
            if not stands or text[-1] == END or len(text) == limit:
                break
    return tuple(text[len(prompt) :]), passes, tuple(tried), tuple(accepted)


def test_counts_of_what_is_copied():
    model, parameters = small_vocabulary()
    found = Decoder(model, parameters, [END]).run(PROMPTS, Options(3, 25, drafter="lookup"))
    for prompt, one in zip(PROMPTS, found, strict=True):
        expected = reference_copying(model, parameters, prompt.tolist(), 3, 25)
        assert (one.tokens, one.passes, one.tried, one.accepted) == expected
    assert sum(one.accepted[0] for one in found) > 5


def test_a_model_without_heads_copies():
    config = tiny_config(heads__num_heads=0, model__context=CONTEXT)
    decoder = Decoder(*model_and_parameters(config), [-1])
    plain, found = (decoder.run(PROMPTS, options) for options in (Options(0, 30), Options(4, 30, drafter="lookup")))
    assert [one.tokens for one in found] == [one.tokens for one in plain]
    with pytest.raises(ValueError, match="trained without heads"):
        decoder.check(PROMPTS, Options(4, 30, drafter="both"))


def test_who_drafts_best_is_told_from_the_text_that_was_written():
    """By turns where both are right, and the lookup alone where the heads never are."""
    decoder = Decoder(*small_vocabulary(), [-1])
    found = decoder.run(PROMPTS, Options(4, 60, drafter="both"))
    assert {0, -1} < {proposer for one in found for proposer in one.proposers}
    bad = Decoder(*small_vocabulary(trained=False), [-1]).run(PROMPTS, Options(4, 60, drafter="both"))
    late = [proposer for one in bad for proposer in one.proposers[30:]]
    assert late.count(-1) > 0.5 * len(late)


def test_the_better_one_of_the_rounds_before_drafts():
    """Two rows of the same text, in which heads and lookup have different records; what is confirmed changes them."""
    model, parameters = small_vocabulary()
    network = Network(model, platform(), scanned=True)
    strategy, laid_out = Speculative(network, Options(2, 8, drafter="both")), network.parameters(parameters)
    prompts = jnp.tile(jnp.array([3, 1, 2, 4, 6, 5, 3, 1, 2, 4, 6, 5]), (2, 1))
    keys, lengths = jax.random.split(jax.random.key(0), 2), jnp.full(2, 12)
    batch = prefill(strategy, laid_out, prompts, lengths, keys, Stops((-1,)), 12)
    record = jnp.array([[1.0, 0.5], [0.5, 1.0]])
    drafts, state = strategy.drafter.draft(laid_out, batch.rows, batch.state.drafter.replace(record=record), keys)
    assert drafts.proposers.tolist() == [[1, 2], [-1, -1]]
    copied = state.drafts[:, 1]
    assert drafts.tokens[1].tolist() == copied[1].tolist() != state.drafts[1, 0].tolist()
    place = int(batch.rows.length[0])
    tokens = batch.rows.tokens.at[:, place : place + 2].set(copied)
    after = dataclasses.replace(batch.rows, tokens=tokens, length=batch.rows.length + 2)
    confirmed = strategy.drafter.confirm(state, batch.rows, after, jnp.zeros((2, 3, model.config.width)))
    assert (confirmed.record[:, 1] > record[:, 1]).all() and confirmed.record[0, 0] < record[0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(2, 4, drafter="nowhere"), "drafter = 'nowhere': expected one of .*lookup"),
        (Options(2, 4, strategy="hope"), "strategy = 'hope': expected one of .*speculative"),
        (Options(2, 4, min_confidence=0.5, drafter="lookup"), "min_confidence = 0.5: expected 0 with drafter"),
    ],
)
def test_bad_drafters_are_refused(options, message):
    decoder = Decoder(*small_vocabulary(), [END])
    with pytest.raises(ValueError, match=message):
        decoder.run(PROMPTS, options)


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["lookup", "both"])
def test_a_seed_reproduces_what_is_copied_whatever_the_batch(drafter):
    decoder = Decoder(*small_vocabulary(), [END])
    options = Options(2, 12, Sampling(1.0), drafter=drafter)
    together = decoder.run(PROMPTS, options, seed=5)
    for row, prompt in enumerate(PROMPTS):
        alone = decoder.run([prompt], options, seed=5, first_row=row)[0]
        assert dataclasses.replace(alone, seconds=0.0) == dataclasses.replace(together[row], seconds=0.0)
