"""Sampled speculative output against the exactly enumerated distribution of a tiny model.

A test of K heads writes K+3 tokens, so that the row after a full acceptance and the round after it are reached. Texts
are compared by chi-squared at level 1e-3, with enough samples to notice a distance of 0.15 (Cohen's w, which is a total
variation of about 0.06) with a probability of more than 0.99; the test computes that power.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mtpd_jax.decoding import sampling as sampling_module
from mtpd_jax.decoding.batch import make_decode, prefill
from mtpd_jax.decoding.drafters import chain, heads
from mtpd_jax.decoding.network import Network
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.sampling import Sampling, accept_drafts, choose, draw, fold, invert, probabilities
from mtpd_jax.decoding.stops import Stops
from mtpd_jax.decoding.strategies import speculative
from mtpd_jax.decoding.strategies.speculative import Speculative
from tests.builders import model_of, platform, random_parameters, tiny_config
from tests.decoding.models import all_logits, with_vocabulary

VOCABULARY, SAMPLES, END = 3, 12_000, 2
PROMPT = (1, 0)
LEVEL, DISTANCE, POWER = 1e-3, 0.15, 0.99


def tiny_model(shared=False):
    kind = {"heads__kind": "recurrent", "heads__cache": "shared"} if shared else {}
    config = tiny_config(heads__num_heads=4, model__width=16, model__mlp_width=16, model__layers=1, **kind)
    model = model_of(with_vocabulary(config, VOCABULARY))
    return model, random_parameters(model, seed=6, scale=0.8)


def enumerate_texts(model, parameters, sampling, new_tokens):
    """Probability of every continuation, cut after the end token, from one pass of the training path."""
    texts = jnp.asarray([(*PROMPT, *tail) for tail in itertools.product(range(VOCABULARY), repeat=new_tokens)])
    positions = jnp.broadcast_to(jnp.arange(texts.shape[1]), texts.shape)
    hidden = jax.jit(model.apply)({"params": parameters}, texts, jnp.ones_like(texts), positions)
    steps = np.asarray(probabilities(all_logits(parameters, hidden)[0], sampling), np.float64)
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


def sample_texts(model, parameters, options):
    """Counts of texts over a batch of equal prompts, and the rows."""
    network = Network(model, platform(), scanned=True)
    loop = make_decode(network, options, len(PROMPT), SAMPLES)
    prompts = jnp.broadcast_to(jnp.asarray(PROMPT), (SAMPLES, len(PROMPT)))
    keys = jax.random.split(jax.random.key(8), SAMPLES)
    lengths = jnp.full(SAMPLES, len(PROMPT), jnp.int32)
    count, stops = jnp.full(1, SAMPLES), Stops((END,))
    rows = jax.device_get(loop(network.parameters(parameters), prompts, lengths, keys, count, stops))
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
    freedom = len(wanted) - 1
    critical = scipy.stats.chi2.isf(LEVEL, freedom)
    assert scipy.stats.ncx2.sf(critical, freedom, SAMPLES * DISTANCE**2) > POWER
    return scipy.stats.chisquare(observed, np.array(wanted) * (sum(observed) / sum(wanted))).pvalue


PROPOSERS = {
    "heads": lambda k: {*range(1, k + 1)},
    "lookup": lambda k: {-1},
    "both": lambda k: {-1, *range(1, k + 1)},
}

CASES = [
    Options(2, 5, Sampling(1.0)),
    Options(2, 5, Sampling(2.0, top_p=0.9)),
    Options(2, 5, Sampling(1.0), min_confidence=0.6),
    Options(2, 6, Sampling(1.0), drafter="lookup"),
    Options(2, 7, Sampling(1.0), drafter="both"),
]
MORE_CASES = [
    *(Options(k, k + 3, Sampling(temperature)) for k in (1, 2, 4) for temperature in (0.5, 1.0, 2.0)),
    Options(2, 5, Sampling(2.0, top_k=2)),
    Options(4, 7, Sampling(2.0, top_k=2)),
    Options(4, 7, Sampling(2.0, top_p=0.9)),
    Options(2, 5, Sampling(2.0, greedy_drafts=True)),
    Options(4, 7, Sampling(1.0), min_confidence=0.1),
    Options(6, 9, Sampling(0.5)),  # looped
]


def name_of(options):
    sampling = options.sampling
    extra = [sampling.top_k, sampling.top_p, "greedy drafts" * sampling.greedy_drafts, options.min_confidence]
    return " ".join(map(str, [options.drafter, options.num_drafts, sampling.temperature, *filter(None, extra)]))


@pytest.mark.optimised
@pytest.mark.parametrize(
    "options",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES if case not in CASES)],
    ids=name_of,
)
def test_speculation_samples_the_plain_distribution(options):
    model, parameters = tiny_model()
    exact = enumerate_texts(model, parameters, options.sampling, options.max_new_tokens)
    counts, rows = sample_texts(model, parameters, options)
    accepted, rejected = rows.accepted.sum(), (rows.tried - rows.accepted).sum()
    assert accepted > SAMPLES / 10 and rejected > SAMPLES / 50
    assert rows.accepted[..., -1].sum() > 0 or options.adaptive  # whole blocks, and so bonus tokens
    proposers = set(np.unique(rows.proposer)) - {0}
    expected = PROPOSERS[options.drafter](options.num_drafts)
    assert proposers == expected
    inside = (rows.tokens == END) & (rows.proposer != 0) & (rows.proposer != options.num_drafts)
    # An end token inside a block; but none can be copied, where there was none before.
    assert inside.sum() > 0 or options.num_drafts == 1 or options.drafter == "lookup"
    assert p_value(counts, exact) > LEVEL


@pytest.mark.optimised
@pytest.mark.parametrize(
    "options",
    [
        Options(4, 7, Sampling(1.0)),
        pytest.param(Options(2, 5, Sampling(1.0), min_confidence=0.5), marks=pytest.mark.slow),
    ],
)
def test_a_shared_cache_samples_the_plain_distribution(options):
    """Each depth draws with a key of its own: drafts that share one are no draws from what they say."""
    model, parameters = tiny_model(shared=True)
    counts, rows = sample_texts(model, parameters, options)
    assert rows.accepted.sum() > SAMPLES / 10 and (rows.tried - rows.accepted).sum() > SAMPLES / 50
    exact = enumerate_texts(model, parameters, options.sampling, options.max_new_tokens)
    assert p_value(counts, exact) > LEVEL


def accept_always(keys, drafts, count, q, target):
    return count, draw(fold(keys, 1), target[:, -1])


def no_residual(keys, drafts, count, q, target):
    accepted, _ = accept_drafts(keys, drafts, count, q, target)
    after = jnp.take_along_axis(target, accepted[:, None, None], axis=1)[:, 0]
    return accepted, draw(fold(keys, 1), after)


def bonus_from_the_row_before(keys, drafts, count, q, target):
    accepted, own = accept_drafts(keys, drafts, count, q, target)
    return accepted, jnp.where(accepted == drafts.shape[1], draw(fold(keys, 1), target[:, -2]), own)


def draft_at_another_temperature(keys, logits, sampling):
    """Draws at half the temperature, and reports the distribution at the one that was asked for."""
    token, _ = choose(keys, logits, dataclasses.replace(sampling, temperature=sampling.temperature / 2))
    return token, probabilities(logits, sampling)


MUTANTS = [
    pytest.param(speculative, "accept_drafts", accept_always, marks=pytest.mark.slow),
    (speculative, "accept_drafts", no_residual),
    (speculative, "accept_drafts", bonus_from_the_row_before),
    pytest.param(heads, "choose", draft_at_another_temperature, marks=pytest.mark.slow),
    pytest.param(chain, "choose", draft_at_another_temperature, marks=pytest.mark.slow),
    pytest.param(chain, "fold", lambda keys, number: fold(keys, 1), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("module", "name", "mutant"), MUTANTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_wrong_rule_is_noticed(monkeypatch, module, name, mutant):
    model, parameters = tiny_model(shared=module is chain)
    monkeypatch.setattr(module, name, mutant)
    counts, _ = sample_texts(model, parameters, Options(2, 5, Sampling(1.0)))
    assert p_value(counts, enumerate_texts(model, parameters, Sampling(1.0), 5)) < 1e-9


@pytest.mark.parametrize("sampling", [Sampling(2.0, top_k=2), Sampling(2.0, top_p=0.6), Sampling(0.5)], ids=str)
def test_drafts_are_drawn_as_the_main_heads_tokens_are(sampling):
    """From the heads' logits by the same temperature, top-k and top-p. With others the text would be distributed the
    same, and drafts rejected more often: no test of the text would notice."""
    model, parameters = tiny_model()
    options = Options(2, 5, sampling)
    network = Network(model, platform(), scanned=True)
    laid_out = network.parameters(parameters)
    prompts, lengths = jnp.broadcast_to(jnp.asarray(PROMPT), (64, 2)), jnp.full(64, 2, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 64)
    strategy = Speculative(network, options)
    batch = prefill(strategy, laid_out, prompts, lengths, keys, Stops((END,)), 2)
    drafts, _ = strategy.drafter.draft(laid_out, batch.rows, batch.state.drafter, keys)
    greedy = dataclasses.replace(options, sampling=dataclasses.replace(sampling, greedy_drafts=True))
    likeliest, _ = heads.Heads(network, greedy).draft(laid_out, batch.rows, batch.state.drafter, keys)
    assert likeliest.probabilities is None
    np.testing.assert_array_equal(likeliest.tokens, np.asarray(likeliest.logits).argmax(-1))
    found = np.asarray(drafts.probabilities)
    np.testing.assert_allclose(found, probabilities(drafts.logits, sampling), atol=1e-6)
    drawn = np.take_along_axis(found, np.asarray(drafts.tokens)[..., None], axis=-1)
    assert np.all(drawn > 0) and len(np.unique(drafts.tokens)) > 1
    left_out = (found == 0).sum(-1)
    assert (left_out > 0).any() == (sampling.top_k is not None or sampling.top_p is not None)


@pytest.mark.parametrize("temperature", [1e-6, 1e-8, 1e-30, 1e-38, 1e-45, 1e-300])
def test_however_cold_it_is_the_likeliest_token_that_is_drawn(temperature):
    """Quotients of logits by such temperatures are infinite, and two infinities have no difference."""
    logits = jnp.asarray([[300.0, -2.0, 301.0, 0.0], [-1e30, -2e30, -1e31, -3e38], [0.0, 1e-4, -1e-4, 0.0]])
    for top_k, top_p in ((None, None), (3, 0.9), (4, 1.0)):
        found = probabilities(logits, Sampling(temperature, top_k, top_p))
        np.testing.assert_array_equal(found, np.eye(4)[[2, 0, 1]])
    drawn = draw(jax.random.split(jax.random.key(0), 3), probabilities(logits, Sampling(temperature)))
    assert drawn.tolist() == [2, 0, 1]


@pytest.mark.parametrize("size", [1, 2, 7, 16, 50])
def test_draws_follow_the_weights(size):
    """Whatever the number of tokens, and with some that have no weight; the weights need not add up to 1."""
    weights = np.random.default_rng(size).exponential(size=size) ** 2
    weights[1::3] = 0
    keys = jax.random.split(jax.random.key(3), SAMPLES)
    drawn = draw(keys, jnp.broadcast_to(jnp.asarray(5 * weights, jnp.float32), (SAMPLES, size)))
    counts = {(token,): count for token, count in enumerate(np.bincount(drawn).tolist()) if count}
    exact = {(token,): weight for token, weight in enumerate((weights / weights.sum()).tolist())}
    assert (counts == {(0,): SAMPLES}) if size < 3 else p_value(counts, exact) > LEVEL


def test_inversion_against_numpy():
    rng = np.random.default_rng(0)
    weights = rng.exponential(size=(500, 40)) * rng.integers(2, size=(500, 40))
    uniform = rng.uniform(size=500)
    expected = [
        np.searchsorted(np.cumsum(row), share * row.sum(), side="right")
        for row, share in zip(weights, uniform, strict=True)
    ]
    found = invert(jnp.asarray(weights, jnp.float32), jnp.asarray(uniform, jnp.float32))
    assert np.mean(np.asarray(found) == expected) > 0.998  # but for a share that rounds to the other side


@pytest.mark.parametrize("share", [0.0, 2.0**-23, 1 - 2.0**-23])
def test_what_has_no_weight_is_never_drawn(share):
    """Not at either end, nor where cumulative sums of a thousand tokens round differently over it."""
    rng = np.random.default_rng(1)
    weights = rng.exponential(size=(2000, 1000)) * (rng.uniform(size=(2000, 1000)) < 0.2)
    found = np.asarray(invert(jnp.asarray(weights, jnp.float32), jnp.full(2000, share)))
    assert np.all(weights[np.arange(2000), found] > 0)
    ends = [np.flatnonzero(row)[0 if share < 0.5 else -1] for row in weights]
    assert np.mean(found == ends) > 0.9


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
