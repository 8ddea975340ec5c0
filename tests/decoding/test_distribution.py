"""Sampled speculative output against the exactly enumerated distribution of a tiny model."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mtpd_jax.decoding import sampling as sampling_module
from mtpd_jax.decoding import speculative
from mtpd_jax.decoding.plain import logits_of
from mtpd_jax.decoding.sampling import Sampling, accept_drafts, draw, fold, probabilities
from mtpd_jax.decoding.speculative import make_speculative
from mtpd_jax.model.backbone import build_model
from tests.builders import random_parameters, tiny_config

VOCABULARY, NEW, SAMPLES, END = 4, 5, 20_000, 3
PROMPT = (1, 2, 0)


def tiny_model(num_heads):
    config = tiny_config(heads__num_heads=num_heads, model__width=16, model__mlp_width=16, model__layers=1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocabulary_size=VOCABULARY))
    model = build_model(config)
    return model, random_parameters(model, seed=1, scale=0.8)


def enumerate_texts(model, parameters, sampling):
    """Probability of every continuation: up to NEW tokens, cut after the end token."""
    texts = jnp.asarray([(*PROMPT, *tail) for tail in itertools.product(range(VOCABULARY), repeat=NEW)])
    positions = jnp.broadcast_to(jnp.arange(texts.shape[1]), texts.shape)
    hidden = model.apply({"params": parameters}, texts, jnp.ones_like(texts), positions).main
    steps = np.asarray(probabilities(logits_of(hidden, parameters), sampling), np.float64)
    exact: dict[tuple[int, ...], float] = {}
    for row, text in enumerate(np.asarray(texts)):
        tail = tuple(int(token) for token in text[len(PROMPT) :])
        if END in tail[:-1]:  # written once, for the shortest way to end it
            cut = tail.index(END) + 1
            if any(tail[cut:]):
                continue
            tail = tail[:cut]
        exact[tail] = float(np.prod([steps[row, len(PROMPT) - 1 + i, token] for i, token in enumerate(tail)]))
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    return exact


def sample_texts(model, parameters, num_heads, sampling):
    loop = make_speculative(model, num_heads=num_heads, max_new_tokens=NEW, end_id=END, sampling=sampling)
    prompts = jnp.broadcast_to(jnp.asarray(PROMPT), (SAMPLES, len(PROMPT)))
    keys = jax.random.split(jax.random.key(7), SAMPLES)
    rows = jax.device_get(loop(parameters, prompts, jnp.full(SAMPLES, len(PROMPT), jnp.int32), keys))
    counts: dict[tuple[int, ...], int] = {}
    for row in range(SAMPLES):
        tail = tuple(int(token) for token in rows.tokens[row, len(PROMPT) : rows.length[row]])
        counts[tail] = counts.get(tail, 0) + 1
    return counts, rows


def p_value(counts, exact):
    """Chi-squared over texts; those expected fewer than 10 times share one cell."""
    assert all(exact.get(text, 0) > 0 for text in counts), "a text of probability zero was written"
    expected = {text: SAMPLES * probability for text, probability in exact.items()}
    common = [text for text in expected if expected[text] >= 10]
    observed = [counts.get(text, 0) for text in common]
    wanted = [expected[text] for text in common]
    if SAMPLES - sum(wanted) > 1:
        observed.append(SAMPLES - sum(observed))
        wanted.append(SAMPLES - sum(wanted))
    return scipy.stats.chisquare(observed, np.array(wanted) * (sum(observed) / sum(wanted))).pvalue


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.5), Sampling(2.0, top_k=3), Sampling(1.0, top_p=0.8)], ids=str
)
def test_speculation_samples_the_plain_distribution(num_heads, sampling):
    model, parameters = tiny_model(num_heads)
    exact = enumerate_texts(model, parameters, sampling)
    counts, rows = sample_texts(model, parameters, num_heads, sampling)
    assert rows.accepted.sum() > SAMPLES / 10 and (rows.tried - rows.accepted).sum() > SAMPLES / 10
    assert p_value(counts, exact) > 1e-3


def accept_always(keys, drafts, draft_probabilities, target):
    return jnp.full(drafts.shape[:1], drafts.shape[1]), draw(fold(keys, 1), target[:, -1])


def no_residual(keys, drafts, draft_probabilities, target):
    accepted, _ = accept_drafts(keys, drafts, draft_probabilities, target)
    after = jnp.take_along_axis(target, accepted[:, None, None], axis=1)[:, 0]
    return accepted, draw(fold(keys, 1), after)


def scored_at_another_temperature(keys, drafts, draft_probabilities, target):
    sharper = draft_probabilities**2 / jnp.sum(draft_probabilities**2, axis=-1, keepdims=True)
    return accept_drafts(keys, drafts, sharper, target)


@pytest.mark.parametrize("wrong", [accept_always, no_residual, scored_at_another_temperature])
def test_a_wrong_acceptance_rule_is_caught(monkeypatch, wrong):
    model, parameters = tiny_model(2)
    monkeypatch.setattr(speculative, "accept_drafts", wrong)
    counts, _ = sample_texts(model, parameters, 2, Sampling(1.0))
    assert p_value(counts, enumerate_texts(model, parameters, Sampling(1.0))) < 1e-6


def test_probabilities_against_numpy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 9)) * 2
    for top_k, top_p in [(None, None), (4, None), (None, 0.7), (5, 0.6), (20, 1.0)]:
        found = sampling_module.probabilities(jnp.asarray(logits, jnp.float32), Sampling(0.7, top_k, top_p))
        for row in range(3):
            p = np.exp(logits[row] / 0.7)
            order = np.argsort(-p)
            p[order[top_k or 9 :]] = 0
            p /= p.sum()
            if top_p is not None:
                before = np.cumsum(p[order]) - p[order]
                p[order[before >= top_p]] = 0
                p /= p.sum()
            np.testing.assert_allclose(found[row], p, atol=1e-6)
