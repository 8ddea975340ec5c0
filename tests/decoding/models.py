"""Models of a few tokens that the decoding tests share, and decoding as its definition says it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtpd_jax.data.pipeline import Batch
from mtpd_jax.model.backbone import unembedding_of
from tests.builders import gradients, method_on, random_parameters, tiny_config, with_micro_batches

END, CONTEXT = 0, 4096
PROMPTS = [np.array(p, np.int32) for p in ([3], [1, 2], [5, 4, 3, 2, 1, 6, 6, 2, 3, 1], [2] * 33)]
_STEPS = 60


def with_vocabulary(config, vocabulary):
    """The config with fewer tokens than ``validate`` allows."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocabulary_size=vocabulary))


@functools.cache
def small_vocabulary(kind="cascade", trained=True, num_heads=4, vocabulary=7):
    """A model of seven tokens, trained until its heads agree with it more often than not.

    Training is on a noisy chain, t -> 3t + 1 modulo 7. The kind ``shared`` is a recurrent head with one cache. A larger
    vocabulary has tokens that are never seen.
    """
    shared = kind == "shared"
    config = tiny_config(
        heads__num_heads=num_heads, heads__kind="recurrent" if shared else kind, heads__pass_normed=kind == "cascade",
        heads__cache="shared" if shared else "per_depth", model__context=CONTEXT,
    )  # fmt: skip
    config = with_vocabulary(config, vocabulary)
    method = method_on(config)
    model = method.model
    parameters = random_parameters(model, seed=2, scale=0.4)
    if trained:
        parameters = _train(method, parameters)
    return model, parameters


@functools.cache
def mask_model(trained=True, vocabulary=7):
    """A model of seven tokens without heads, trained on the same chain to fill in up to three masks."""
    config = tiny_config(
        heads__num_heads=0, objective__mode="standalone", objective__source="-", objective__labels="data",
        objective__k_max=4, objective__regions=4, objective__prefix_weight=1.0, model__mask_embedding=True,
        model__context=CONTEXT, training__sequence_length=40,
    )  # fmt: skip
    method = method_on(with_vocabulary(config, vocabulary))
    parameters = random_parameters(method.model, seed=2, scale=0.4)
    return method.model, _train(method, parameters, 5 * _STEPS) if trained else parameters


def _train(method, parameters, steps=_STEPS):
    rng = np.random.default_rng(0)
    tokens = np.zeros((8, 40), np.int32)
    for i in range(1, 40):
        tokens[:, i] = np.where(rng.random(8) < 0.7, (3 * tokens[:, i - 1] + 1) % 7, rng.integers(0, 7, 8))
    batch = jax.tree.map(jnp.asarray, Batch(tokens, np.ones_like(tokens), np.tile(np.arange(40), (8, 1))))
    batch = with_micro_batches(batch, 1)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def run(parameters):
        def step(carry, number):
            parameters, state = carry
            updates, state = optimizer.update(gradients(method, parameters, batch, step=number)[3], state)
            return (optax.apply_updates(parameters, updates), state), None

        return jax.lax.scan(step, (parameters, optimizer.init(parameters)), jnp.arange(steps))[0][0]

    return run(parameters)


def all_logits(parameters, hidden):
    """Every head's logits, [K+1, B, T, V], from what the training path returns."""
    states = jnp.concatenate([hidden.main[None], hidden.heads])
    return jnp.einsum("jbtd,vd->jbtv", states, unembedding_of(parameters))


def forward(model, parameters):
    """All heads' logits for one unpadded text, [K+1, T, V], by the training path."""

    @jax.jit
    def run(tokens):
        row = tokens[None]
        hidden = model.apply({"params": parameters}, row, jnp.ones_like(row), jnp.arange(row.shape[1])[None])
        return all_logits(parameters, hidden)[:, 0]

    # Padding to one length, which causality makes harmless, compiles once.
    return lambda tokens: np.asarray(run(jnp.asarray(np.pad(tokens, (0, 128 - len(tokens))))))[:, : len(tokens)]


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
