"""Decoding with copies of a model, each split over devices of its own: the copies have nothing to tell each other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpd_jax.config import MeshConfig
from mtpd_jax.decoding.decoder import Decoder
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.evaluation.agreement import count_agreement
from mtpd_jax.sharding import make_mesh, shardings_of
from tests.decoding.models import PROMPTS, mask_model, small_vocabulary

PARTS = 2
NEVER = 7  # was seen, so that hardly a text ends before its limit


def decoders(model, parameters):
    """With one device; and with two copies, each of which two devices share."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=PARTS), jax.devices()[1 : 1 + 2 * PARTS])
    row = jnp.zeros((1, 8), jnp.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), row, row, row)["params"]
    split = jax.device_put(parameters, shardings_of(boxed, mesh))
    whole, half = (tree["embedding"].addressable_shards[0].data.size for tree in (parameters, split))
    assert whole == PARTS * half
    assert nn.meta.unbox(boxed)["embedding"].shape == parameters["embedding"].shape
    return Decoder(model, parameters, [NEVER]), Decoder(model, split, [NEVER], mesh)


def written(continuations):
    return [(one.tokens, one.proposers, one.passes, one.tried, one.accepted) for one in continuations]


OPTIONS = {
    "adaptive": Options(3, 20, min_confidence=0.5),
    "greedy": Options(3, 20),
    "lookup": Options(2, 20, Sampling(0.7), drafter="lookup"),
    "sampled": Options(2, 20, Sampling(1.0), drafter="both"),
    "top k and p": Options(2, 20, Sampling(1.3, top_k=5, top_p=0.9)),
    "verified": Options(3, 20, Sampling(0.8), drafter="masks", strategy="verified"),
    "confident": Options(3, 20, Sampling(0.8), min_confidence=0.5, drafter="masks", strategy="confident"),
}


@pytest.mark.parametrize(
    "name", [name if name == "sampled" else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS]
)
def test_copies_run_as_long_as_their_own_texts_take(name):
    """One copy writes two texts after each other, the other one: did one of them wait for the other, neither would end,
    and XLA ends the process."""
    options = OPTIONS[name]
    model, parameters = (mask_model if options.drafter == "masks" else small_vocabulary)(trained=False, vocabulary=8)
    alone, parts = decoders(model, parameters)
    expected, found = (decoder.run(PROMPTS[:3], options, rows=2, seed=5) for decoder in (alone, parts))
    assert written(found) == written(expected) and min(one.passes for one in found) > 2
    assert all("all-reduce(" in program.as_text() for program in parts._compiled.values())


@pytest.mark.slow
def test_heads_agree_as_often_with_a_model_in_parts():
    """Counted by one of the copies, text by text."""
    found = []
    for decoder in decoders(*small_vocabulary(vocabulary=8)):
        texts = decoder.run(PROMPTS[:2], Options(0, 20))
        found.append(count_agreement(decoder, PROMPTS[:2], texts, 3))
    np.testing.assert_array_equal(found[1], found[0])
    agreed, counted = found[0]
    assert np.all(agreed > 0) and np.all(agreed < counted)


def test_one_of_the_copies_streams():
    model, parameters = small_vocabulary(trained=False, vocabulary=8)
    alone, parts = decoders(model, parameters)
    options = Options(2, 20, Sampling(1.0))
    assert written(parts.stream(PROMPTS[0], options)) == written(alone.stream(PROMPTS[0], options))
