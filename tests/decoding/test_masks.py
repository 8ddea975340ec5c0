"""A model that fills in masks: what is written, in how many passes, against references without caches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpd_jax.decoding.decoder import Decoder
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.sharding import data_mesh, replicated
from tests.builders import model_of, random_parameters, tiny_config
from tests.decoding.models import END, PROMPTS, forward, mask_model, small_vocabulary, with_vocabulary
from tests.decoding.test_distribution import LEVEL, SAMPLES, VOCABULARY, enumerate_texts, p_value, sample_texts

MASK = 7
SPANS = [
    ("confident", 5, 0.8),  # there are first tokens that are not sure enough, with a second one that is
    *(pytest.param(*one, marks=pytest.mark.slow) for one in [
        ("static", 3, 0.0), ("static", 1, 0.0), ("confident", 5, 0.3), ("confident", 3, 0.9999),
    ]),
]  # fmt: skip
VERIFIED = [
    (3, 0.4),
    *(pytest.param(*one, marks=pytest.mark.slow) for one in [(1, 0.0), (3, 0.0), (3, 0.9999), (6, 0.2)]),
]


def options_of(strategy, masks, confidence=0.0, new_tokens=25, sampling=None, **others):
    sampling = Sampling() if sampling is None else sampling
    named = {"min_confidence": confidence, "drafter": "masks", "strategy": strategy, **others}
    return Options(masks, new_tokens, sampling, **named)


def softmax(logits):
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


def leading(flags):
    return next((place for place, flag in enumerate(flags) if not flag), len(flags))


def write(text, new, limit):
    """Appends tokens up to a limit or an end; returns how many."""
    for number, token in enumerate(new, 1):
        text.append(int(token))
        if token == END or len(text) == limit:
            return number
    return len(new)


def reference_spans(model, parameters, prompt, masks, confidence, static, new_tokens):
    """A pass over all of the text and masks after it, again and again."""
    logits, text, limit = forward(model, parameters), list(prompt), len(prompt) + new_tokens
    text.append(int(logits(text)[0, -1].argmax()))
    passes, tried, accepted, proposers = 0, np.zeros(masks, int), np.zeros(masks, int), [0]
    while text[-1] != END and len(text) < limit:
        found = logits([*text, *[MASK] * masks])[0, len(text) - 1 :]
        sure = softmax(found).max(-1) >= confidence
        count = 1 + masks if static else max(1, leading(sure))
        taken = write(text, found.argmax(-1)[:count], limit)
        passes += 1
        accepted[: taken - 1] += 1
        tried[: taken - 1] += 1
        going = text[-1] != END and len(text) < limit
        tried[taken - 1 : taken] += going and taken == count
        proposers += range(taken)
    return text[len(prompt) :], passes, tried.tolist(), accepted.tolist(), proposers


def reference_verified(model, parameters, prompt, masks, confidence, new_tokens):
    """As the definition says it: guesses behind a text that was confirmed as a whole are verified in the next pass."""
    logits, text, limit = forward(model, parameters), list(prompt), len(prompt) + new_tokens
    text.append(int(logits(text)[0, -1].argmax()))
    passes, tried, accepted, proposers, pending = 0, np.zeros(masks, int), np.zeros(masks, int), [0], []
    while text[-1] != END and len(text) < limit:
        n, d = len(text), len(pending)
        found = logits([*text, *pending, *[MASK] * masks])[0, n - 1 :]
        choices = found.argmax(-1)
        stand = leading([pending[i] == choices[i] for i in range(d)])
        for draft in range(d):
            reached = draft <= stand and END not in pending[:draft] and n + draft < limit
            tried[draft] += reached
            accepted[draft] += reached and draft < stand
        taken = write(text, [*pending[:stand], choices[stand]], limit)
        proposers += [*range(1, stand + 1), 0][:taken]
        passes += 1
        guesses = choices[d + 1 : d + 1 + masks]
        sure = leading(softmax(found).max(-1)[d + 1 : d + 1 + masks] >= confidence)
        pending = [int(token) for token in guesses[:sure]] if stand == d else []
    return text[len(prompt) :], passes, tried.tolist(), accepted.tolist(), proposers


def compare(found, expected):
    assert (
        list(found.tokens),
        found.passes,
        list(found.tried),
        list(found.accepted),
        list(found.proposers),
    ) == expected


@pytest.mark.optimised
@pytest.mark.parametrize(("strategy", "masks", "confidence"), SPANS)
@pytest.mark.parametrize("scanned", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_spans_against_a_reference_without_caches(strategy, masks, confidence, scanned):
    """Tokens, passes, who wrote them, and what was taken of every span; a batch of many lengths."""
    model, parameters = mask_model()
    decoder = Decoder(model, parameters, [END], scanned=scanned)
    taken = np.zeros(masks, int)
    prompts = [*PROMPTS, *many_prompts(8)]
    for prompt, found in zip(prompts, decoder.run(prompts, options_of(strategy, masks, confidence)), strict=True):
        expected = reference_spans(model, parameters, prompt, masks, confidence, strategy == "static", 25)
        compare(found, expected)
        assert len(found.tokens) == 1 + found.passes + sum(found.accepted)
        taken += found.accepted
    assert bool(taken.sum() > 0) is (confidence < 0.9)


@pytest.mark.optimised
@pytest.mark.parametrize(("masks", "confidence"), VERIFIED)
def test_verified_spans_against_a_reference_without_caches(masks, confidence):
    model, parameters = mask_model()
    decoder, accepted, refused = Decoder(model, parameters, [END]), 0, 0
    prompts = [*PROMPTS, *many_prompts(8)]
    for prompt, found in zip(prompts, decoder.run(prompts, options_of("verified", masks, confidence)), strict=True):
        compare(found, reference_verified(model, parameters, prompt, masks, confidence, 25))
        accepted, refused = accepted + sum(found.accepted), refused + sum(found.tried) - sum(found.accepted)
    assert (accepted > 0) is (confidence < 0.9) and (refused > 0 or confidence)


def many_prompts(count):
    rng = np.random.default_rng(1)
    return [rng.integers(1, 7, rng.choice([1, 2, 5, 20])).astype(np.int32) for _ in range(count)]


def texts(continuations):
    return [continuation.tokens for continuation in continuations]


@pytest.mark.slow
@pytest.mark.optimised
def test_verified_text_is_what_the_model_writes_one_by_one():
    """90 prompts, in a queue of seven rows, whose texts end anywhere in a span; with and without confidence."""
    model, parameters = mask_model()
    decoder, prompts = Decoder(model, parameters, [END], scanned=True), many_prompts(90)
    plain, last = decoder.run(prompts, Options(0, 20), rows=7), set()
    for masks, confidence in [(1, 0.0), (3, 0.5), (7, 0.0)]:
        found = decoder.run(prompts, options_of("verified", masks, confidence, 20), rows=7)
        assert texts(found) == texts(plain), (masks, confidence)
        last |= {one.proposers[-1] for one in found}
    assert last >= {0, 1}
    assert {len(one.tokens) for one in plain} >= {5, 20}
    for strategy in ("static", "confident"):
        alone = decoder.run(prompts, options_of(strategy, 0, 0.0, 20), rows=7)
        assert texts(alone) == texts(plain)
        assert [one.passes for one in alone] == [one.passes for one in plain]


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_passes_of_one_width_are_equal_bit_for_bit(dtype):
    """Untrained: logits nearly tie, so that text would leave plain decoding's with the smallest rounding."""
    config = tiny_config(
        heads__num_heads=0, objective__mode="standalone", objective__source="-", objective__k_max=4,
        objective__regions=2, model__mask_embedding=True, model__dtype=dtype, model__context=256,
    )  # fmt: skip
    model = model_of(config)
    parameters = random_parameters(model)
    decoder, prompts = Decoder(model, parameters, [0]), [np.arange(5) + 40 * n for n in range(7)]
    shared = options_of("verified", 3, 0.0, 60).sharing_width(3)
    assert shared.width == 8
    plain, found = decoder.run(prompts, shared.with_drafts(0)), decoder.run(prompts, shared)
    assert texts(plain) == texts(found) and sum(sum(one.tried) for one in found) > 100
    assert len({token for one in plain for token in one.tokens}) > 8
    # So are those of spans of one token, which are plain decoding by another name.
    for strategy in ("static", "confident"):
        alone = options_of(strategy, 0, 0.0, 60, pass_width=shared.width)
        assert texts(decoder.run(prompts, alone)) == texts(plain), strategy


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "confidence"), [("verified", 0.0), ("confident", 0.5)])
def test_copies_of_a_model_fill_in_masks_the_same(strategy, confidence):
    """Three devices with a copy each share the rows."""
    model, parameters = mask_model()
    prompts = many_prompts(9)
    mesh = data_mesh(jax.devices()[1:4])
    options = options_of(strategy, 3, confidence, 12)
    alone = Decoder(model, parameters, [END]).run(prompts, options)
    assert sum(sum(one.accepted) for one in alone) > 5
    spread = Decoder(model, jax.device_put(parameters, replicated(mesh)), [END], mesh)
    assert texts(spread.run(prompts, options)) == texts(alone)


@pytest.mark.slow
def test_a_text_depends_on_nobody_beside_it():
    model, parameters = mask_model()
    decoder, prompts = Decoder(model, parameters, [END]), many_prompts(12)
    for options in (
        options_of("verified", 3, 0.3, 20, Sampling(1.0)), options_of("confident", 3, 0.5, 20, Sampling(1.0)),
        options_of("static", 2, 0.0, 20),
    ):  # fmt: skip
        together = decoder.run(prompts, options, rows=5, seed=4)
        alone = [decoder.run([prompt], options, seed=4, first_row=row)[0] for row, prompt in enumerate(prompts)]
        for one, other in zip(together, alone, strict=True):
            assert dataclasses.replace(one, seconds=0.0) == dataclasses.replace(other, seconds=0.0)


def masked_tiny_model():
    config = tiny_config(
        heads__num_heads=0, model__width=16, model__mlp_width=16, model__layers=1, objective__mode="standalone",
        objective__source="-", objective__k_max=4, objective__regions=2, model__mask_embedding=True,
    )  # fmt: skip
    model = model_of(with_vocabulary(config, VOCABULARY))
    return model, random_parameters(model, seed=6, scale=0.8)


@pytest.mark.optimised
@pytest.mark.parametrize(
    "options",
    [
        options_of("verified", 2, 0.0, 5, Sampling(1.0)),
        pytest.param(options_of("verified", 1, 0.0, 4, Sampling(0.5)), marks=pytest.mark.slow),
        options_of("verified", 3, 0.5, 6, Sampling(2.0, top_k=2)),
    ],
    ids=str,
)
def test_verified_samples_the_plain_distribution(options):
    """The guesses are certain, and fall as often as the model would have written something else."""
    model, parameters = masked_tiny_model()
    exact = enumerate_texts(model, parameters, options.sampling, options.max_new_tokens)
    counts, rows = sample_texts(model, parameters, options)
    accepted, refused = rows.accepted.sum(), (rows.tried - rows.accepted).sum()
    assert accepted > SAMPLES / 10 and refused > SAMPLES / 50
    assert p_value(counts, exact) > LEVEL


def test_a_pass_that_takes_one_token_draws_it():
    model, parameters = masked_tiny_model()
    options = options_of("confident", 2, 0.999, 4, Sampling(1.0))
    exact = enumerate_texts(model, parameters, options.sampling, options.max_new_tokens)
    counts, rows = sample_texts(model, parameters, options)
    assert not rows.accepted.sum() and p_value(counts, exact) > LEVEL


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (options_of("static", 2, 0.5), "min_confidence = 0.5: expected 0 with strategy = 'static'"),
        (options_of("static", 2, 0.0, sampling=Sampling(1.0)), "temperature = 1.0: expected 0 with strategy"),
        (options_of("confident", 2, 0.0), "min_confidence = 0: expected more with strategy = 'confident'"),
        (options_of("verified", 2, drafter="heads"), "drafter = 'heads': expected 'masks' with strategy = 'verified'"),
        (options_of("verified", 2, pass_width=4), "pass_width = 4: expected at least 5, for heads = 2"),
    ],
)
def test_what_cannot_be_is_said(options, message):
    model, parameters = mask_model(trained=False)
    with pytest.raises(ValueError, match=message):
        Decoder(model, parameters, [END]).run(PROMPTS, options)


def test_a_model_without_masks_is_told_so():
    model, parameters = small_vocabulary(trained=False)
    with pytest.raises(ValueError, match="drafter = 'masks': expected a model that was trained to fill in masks"):
        Decoder(model, parameters, [END]).run(PROMPTS, options_of("verified", 2))


def test_a_mask_is_no_token():
    """No logit is of it, and it is read as its own embedding, as scaled as the others."""
    model, parameters = mask_model(trained=False)
    rows = jnp.asarray([[1, 2, MASK, MASK]])
    states = model.apply({"params": parameters}, rows, jnp.ones_like(rows), jnp.arange(4)[None]).main
    other = {**parameters, "embedding": parameters["embedding"].at[5].set(parameters["mask_embedding"])}
    as_token = jnp.asarray([[1, 2, 5, 5]])
    expected = model.apply({"params": other}, as_token, jnp.ones_like(rows), jnp.arange(4)[None]).main
    np.testing.assert_array_equal(states, expected)
    # What a decoder's network says of a text has a logit for every token, and none for the mask.
    network, laid_out = Decoder(model, parameters, [END]).network(options_of("verified", 2))
    assert network.logits(laid_out, states).shape[-1] == MASK == parameters["embedding"].shape[0]
