"""Speculative decoding against plain decoding, and both against a reference without caches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtpd_jax.data.pipeline import Batch
from mtpd_jax.decoding import speculative
from mtpd_jax.decoding.decoder import Decoder
from mtpd_jax.decoding.plain import decoding_parameters, logits_of, prefill
from mtpd_jax.decoding.sampling import GREEDY, Sampling
from mtpd_jax.losses.objective import training_objective
from mtpd_jax.model.backbone import build_model
from mtpd_jax.training.step import gradients_of_batch
from tests.builders import model_and_parameters, random_parameters, tiny_config, with_micro_batches

END = 0
STEPS = 60


@functools.cache
def small_vocabulary(kind="cascade", trained=True):
    """A model of seven tokens with four heads, trained until the heads agree with it more often than not.

    ``validate`` would want more tokens; training is on a noisy chain, t -> 3t + 1 modulo 7.
    """
    config = tiny_config(heads__num_heads=4, heads__kind=kind, heads__pass_normed=kind == "cascade")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocabulary_size=7))
    model = build_model(config)
    parameters = random_parameters(model, seed=2, scale=0.4)
    if not trained:
        return model, parameters
    rng = np.random.default_rng(0)
    tokens = np.zeros((8, 40), np.int32)
    for i in range(1, 40):
        tokens[:, i] = np.where(rng.random(8) < 0.7, (3 * tokens[:, i - 1] + 1) % 7, rng.integers(0, 7, 8))
    batch = jax.tree.map(jnp.asarray, Batch(tokens, np.ones_like(tokens), np.tile(np.arange(40), (8, 1))))
    batch = with_micro_batches(batch, 1)
    optimizer, objective = optax.adam(3e-3), training_objective(config)

    @jax.jit
    def train(parameters):
        def step(carry, _):
            parameters, state = carry
            gradients = gradients_of_batch(model, objective, parameters, batch)[3]
            updates, state = optimizer.update(gradients, state)
            return (optax.apply_updates(parameters, updates), state), None

        return jax.lax.scan(step, (parameters, optimizer.init(parameters)), length=STEPS)[0][0]

    return model, train(parameters)


def forward(model, parameters):
    """All heads' logits for one unpadded text, [K+1, T, V], by the training path."""

    @jax.jit
    def run(tokens):
        row = tokens[None]
        hidden = model.apply({"params": parameters}, row, jnp.ones_like(row), jnp.arange(row.shape[1])[None])
        return logits_of(jnp.concatenate([hidden.main[None], hidden.heads])[:, 0], parameters)

    # Padding to one length, which causality makes harmless, compiles once.
    return lambda tokens: np.asarray(run(jnp.asarray(np.pad(tokens, (0, 64 - len(tokens))))))[:, : len(tokens)]


def reference_speculation(model, parameters, prompt, num_heads, max_new_tokens):
    """Greedy speculation as the definition says it, one whole forward pass per question asked."""
    logits, text, limit = forward(model, parameters), list(prompt), len(prompt) + max_new_tokens
    text.append(int(logits(text)[0, -1].argmax()))
    passes, tried, accepted, proposers = 0, [0] * num_heads, [0] * num_heads, [0]
    while text[-1] != END and len(text) < limit:
        n, drafts = len(text), []
        for k in range(1, num_heads + 1):
            drafts.append(int(logits(text + drafts)[k, n - 2].argmax()))
        choices = logits(text + drafts)[0, n - 1 :].argmax(-1)
        passes += 1
        for k in range(num_heads + 1):
            stands = k < num_heads and drafts[k] == choices[k]
            if k < num_heads:
                tried[k] += 1
                accepted[k] += stands
            text.append(int(choices[k]))
            proposers.append(k + 1 if stands else 0)
            if not stands or text[-1] == END or len(text) == limit:
                break
    return text[len(prompt) :], passes, tried, accepted, proposers


PROMPTS = [np.array(p, np.int32) for p in ([3], [1, 2], [5, 4, 3, 2, 1, 6, 6, 2, 3, 1], [2] * 33)]


@pytest.mark.parametrize("kind", ["cascade", "recurrent"])
@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_everything_against_a_reference_without_caches(num_heads, kind):
    """Tokens, who proposed them, passes, and how often each head was tried and accepted; a batch of four lengths."""
    model, parameters = small_vocabulary(kind)
    found = Decoder(model, parameters, END).run(PROMPTS, num_heads=num_heads, max_new_tokens=25)
    total = np.zeros(num_heads, int)
    for prompt, continuation in zip(PROMPTS, found, strict=True):
        tokens, passes, tried, accepted, proposers = reference_speculation(
            model, parameters, list(prompt), num_heads, 25
        )
        assert list(continuation.tokens) == tokens
        assert continuation.passes == passes
        assert list(continuation.tried) == tried
        assert list(continuation.accepted) == accepted
        assert list(continuation.proposers) == proposers
        total += accepted
    assert np.all(total > 0)  # else nothing was shown


@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize(("max_new_tokens", "trained"), [(2, True), (7, True), (40, True), (40, False)])
def test_speculative_equals_plain(num_heads, max_new_tokens, trained):
    """Rows of a batch end at different times, by end token or by length inside a block of accepted drafts."""
    model, parameters = small_vocabulary(trained=trained)
    decoder = Decoder(model, parameters, END)
    plain = decoder.run(PROMPTS, num_heads=0, max_new_tokens=max_new_tokens)
    found = decoder.run(PROMPTS, num_heads=num_heads, max_new_tokens=max_new_tokens)
    assert [c.tokens for c in found] == [c.tokens for c in plain]
    for continuation in plain:
        assert len(continuation.tokens) == max_new_tokens or continuation.tokens[-1] == END
        assert END not in continuation.tokens[:-1]
        assert continuation.passes == len(continuation.tokens) - 1


def test_always_rejected_drafts_lose_nothing(monkeypatch):
    """Drafts of a token that the main head never writes: every round confirms one token, and the text is the same."""
    model, parameters = model_and_parameters(tiny_config(heads__num_heads=4))
    plain = Decoder(model, parameters, END).run(PROMPTS, num_heads=0, max_new_tokens=20)
    never = next(token for token in range(1, 300) if all(token not in c.tokens for c in plain))
    monkeypatch.setattr(speculative, "choose", lambda keys, logits, _: (jnp.full(logits.shape[:1], never), None))
    found = Decoder(model, parameters, END).run(PROMPTS, num_heads=4, max_new_tokens=20)
    assert [c.tokens for c in found] == [c.tokens for c in plain]
    for continuation in found:
        assert continuation.accepted == (0, 0, 0, 0)
        assert continuation.tried == (continuation.passes, 0, 0, 0)
        assert continuation.passes == len(continuation.tokens) - 1


def test_perfect_drafts_are_all_accepted():
    """A model that always writes the same token is drafted perfectly, also past end-of-length by up to K."""
    model, parameters = small_vocabulary()
    parameters = jax.tree.map(jnp.zeros_like, parameters)  # all logits equal: the first index, always
    found = Decoder(model, parameters, end_id=6).run([PROMPTS[2]], num_heads=4, max_new_tokens=22)[0]
    assert found.tokens == (0,) * 22
    assert found.passes == 5  # 1 from prefill, 4 rounds of 5, 1 token
    assert found.tried == (5, 4, 4, 4) and found.accepted == found.tried
    assert found.proposers == (0, *(1, 2, 3, 4, 0) * 4, 1)


@pytest.mark.parametrize("kind", ["cascade", "recurrent"])
def test_draft_logits_equal_training_logits(kind):
    """Head by head, round by round, after acceptances and rejections of every length, for several prompts."""
    num_heads = 4
    model, parameters = small_vocabulary(kind)
    logits = forward(model, parameters)
    parameters = decoding_parameters(model, parameters)
    width = max(map(len, PROMPTS))
    prompts = jnp.asarray(np.stack([np.pad(p, (0, width - len(p))) for p in PROMPTS]))
    lengths = jnp.asarray([len(p) for p in PROMPTS], jnp.int32)
    keys = jax.vmap(jax.random.key)(jnp.arange(len(PROMPTS)))
    rows, cache, hidden = prefill(
        model, parameters, prompts, lengths, keys, num_heads=num_heads, max_new_tokens=24, end_id=-1, sampling=GREEDY
    )
    cascade = speculative.Cascade(model, num_heads)
    state = speculative.start_speculation(model, cascade, parameters, rows, cache, hidden)

    @jax.jit
    def one_round(state):
        drafts, head_caches = cascade.draft(parameters, state, keys, GREEDY)
        candidates, accepted, cache, hidden = speculative.verify(model, parameters, state, drafts, keys, GREEDY)
        return drafts, accepted, speculative.advance(state, candidates, accepted, cache, head_caches, hidden, -1)

    seen = set()
    while not bool(state.rows.finished.all()):
        before = jax.device_get(state.rows)
        drafts, accepted, state = one_round(state)
        for row in range(len(PROMPTS)):
            if before.finished[row]:
                continue
            n = int(before.length[row])
            text = [*before.tokens[row, :n], *np.asarray(drafts.tokens[row])]
            expected = logits(np.asarray(text))[1:, n - 2]
            error = np.abs(np.asarray(drafts.logits[row]) - expected).max()
            assert error <= 1e-5 * np.abs(expected).max(), (row, n, error)
            seen.add(int(accepted[row]))
    assert {0, 4} < seen  # rejected at once, all accepted, and something between


def test_parity_notices_stale_caches(monkeypatch):
    """The parity above can fail: heads that do not refresh their window draft from rejected tokens."""
    original = speculative.advance

    def keep_the_old_window(state, *arguments):
        return original(state, *arguments).replace(window=state.window)

    monkeypatch.setattr(speculative, "advance", keep_the_old_window)
    with pytest.raises(AssertionError):
        test_draft_logits_equal_training_logits("cascade")


def test_fewer_heads_than_the_model_has():
    model, parameters = small_vocabulary()
    two = Decoder(model, parameters, END).run(PROMPTS, num_heads=2, max_new_tokens=20)
    assert all(len(c.tried) == 2 and max(c.proposers) <= 2 for c in two)


def test_a_seed_reproduces_whatever_the_batch():
    model, parameters = small_vocabulary()
    decoder = Decoder(model, parameters, END)
    options = {"num_heads": 2, "max_new_tokens": 12, "sampling": Sampling(1.0)}
    together = decoder.run(PROMPTS, seed=5, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = decoder.run([prompt], seed=5, first_row=row, **options)[0]
        assert alone.tokens == together[row].tokens
    other = decoder.run(PROMPTS, seed=6, **options)
    assert [c.tokens for c in other] != [c.tokens for c in together]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([np.array([], np.int32)], {}, "prompt 1 is empty"),
        ([], {}, "no prompt"),
        (PROMPTS, {"num_heads": 5}, "heads = 5: expected 0 .* to 4"),
        (PROMPTS, {"num_heads": -1}, "heads = -1"),
        (PROMPTS, {"max_new_tokens": 0}, "max_new_tokens = 0"),
        (PROMPTS, {"sampling": Sampling(-1.0)}, "temperature = -1"),
        (PROMPTS, {"sampling": Sampling(1.0, top_p=0.0)}, "top_p = 0"),
        (PROMPTS, {"sampling": Sampling(1.0, top_k=0)}, "top_k = 0"),
        (PROMPTS, {"sampling": Sampling(0.0, top_k=3)}, "need a temperature"),
    ],
)
def test_bad_options_are_refused(prompts, options, message):
    model, parameters = small_vocabulary()
    with pytest.raises(ValueError, match=message):
        Decoder(model, parameters, END).run(prompts, **{"num_heads": 2, "max_new_tokens": 3, **options})
