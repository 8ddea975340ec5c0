"""Text that is written some rounds at a time is the text that is written at once."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from mtpd_jax.decoding.decoder import Decoder
from mtpd_jax.decoding.options import MASKS, Options
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.decoding.stops import transitions_of
from mtpd_jax.sharding import data_mesh, replicated
from tests.decoding.models import END, PROMPTS, small_vocabulary


def untimed(continuation):
    return dataclasses.replace(continuation, seconds=0.0)


@pytest.mark.parametrize(
    ("options", "rounds"),
    [
        (Options(3, 20), 1),
        (Options(3, 20), 3),
        (Options(2, 20, Sampling(1.0)), 3),
        (Options(3, 20, min_confidence=0.5), 1),
    ],
    ids=["greedy", "greedy by three", "sampled", "adaptive"],
)
def test_a_stream_ends_with_what_is_written_at_once(options, rounds):
    """Counts included; and on its way it holds what comes first, longer every time."""
    decoder, prompt = Decoder(*small_vocabulary(), [END]), PROMPTS[0]
    whole = decoder.run([prompt], options, seed=8)[0]
    parts = list(decoder.stream(prompt, options, seed=8, rounds=rounds))
    assert untimed(parts[-1]) == untimed(whole)
    assert len(parts) == 1 + -(-whole.passes // rounds) and len(parts) > 2
    for number, part in enumerate(parts):
        assert part.tokens == whole.tokens[: len(part.tokens)] and part.passes == min(number * rounds, whole.passes)
    assert [len(part.tokens) for part in parts] == sorted({len(part.tokens) for part in parts})
    assert all(0 < before.seconds < after.seconds for before, after in itertools.pairwise(parts))


def test_a_text_that_ends_with_its_first_token_is_one_part():
    decoder, prompt = Decoder(*small_vocabulary(), list(range(7))), PROMPTS[0]
    (part,) = decoder.stream(prompt, Options(2, 8))
    assert len(part.tokens) == 1 and part.passes == 0


def test_stop_strings_end_a_stream():
    decoder, prompt, options = Decoder(*small_vocabulary(), [END]), PROMPTS[0], Options(2, 20)
    written = decoder.run([prompt], options)[0].tokens
    texts = [bytes([97 + token]) for token in range(7)]
    stop = "".join(texts[token].decode() for token in written[3:6])
    table = transitions_of(texts, [stop])
    parts = list(decoder.stream(prompt, options, transitions=table, rounds=1))
    assert untimed(parts[-1]) == untimed(decoder.run([prompt], options, transitions=table)[0])
    assert len(parts[-1].tokens) < len(written)


def test_one_of_three_copies_streams():
    model, parameters = small_vocabulary()
    options = Options(2, 20)
    alone = list(Decoder(model, parameters, [END]).stream(PROMPTS[0], options))
    mesh = data_mesh(jax.devices()[1:4])
    three = Decoder(model, jax.device_put(parameters, replicated(mesh)), [END], mesh)
    assert [untimed(one) for one in three.stream(PROMPTS[0], options)] == [untimed(one) for one in alone]


def test_what_cannot_be_decoded_is_refused_before_anything_runs():
    decoder = Decoder(*small_vocabulary(), [END])
    with pytest.raises(ValueError, match="is empty"):
        next(decoder.stream(np.zeros(0, np.int32), Options(2, 8)))
    with pytest.raises(ValueError, match="rounds"):
        next(decoder.stream(PROMPTS[0], Options(2, 8), rounds=0))
    with pytest.raises(ValueError, match="fill in masks"):
        next(decoder.stream(PROMPTS[0], Options(2, 8, drafter=MASKS, strategy="verified")))
