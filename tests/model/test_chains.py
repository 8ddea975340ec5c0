"""Heads with one cache, in training: who sees whom, against attention written out token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpd_jax.model import chains
from mtpd_jax.model.backbone import LanguageModel
from tests.builders import model_of, random_parameters, tiny_config

SEGMENTS = np.array([[1] * 5 + [2] * 6 + [0], [1] * 12])


def written_out(query, keys, values, segments):
    """Attention of the deepest of ``keys``' depths, query by query; keys and values: [depth, B, T, G, H]."""
    query, keys, values = (np.asarray(part, np.float64) for part in (query, keys, values))
    batch, length, groups, per_group, size = query.shape
    found = np.zeros_like(query)
    for b, i, g, r in np.ndindex(batch, length, groups, per_group):
        seen = [(0, j) for j in range(i + 1) if segments[b, j] == segments[b, i]]
        seen += [(depth, i) for depth in range(1, len(keys))]
        scores = np.array([query[b, i, g, r] @ keys[depth][b, j, g] for depth, j in seen]) / np.sqrt(size)
        weights = np.exp(scores - scores.max())
        mixed = sum(w * values[depth][b, j, g] for w, (depth, j) in zip(weights, seen, strict=True))
        found[b, i, g, r] = mixed / weights.sum()
    return found


@pytest.mark.parametrize(("queries", "length"), [(12, 12), (4, 12), (4, 11)])
@pytest.mark.parametrize("depths", [2, 4])
def test_attention_to_a_chain_is_what_it_says(depths, queries, length, monkeypatch):
    """Also where a few queries are taken at a time, which need not divide the length, with their gradients."""
    monkeypatch.setattr(chains, "_SCORES", queries * 6 * length)
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, length, 2, 3, 4)).astype(np.float32)
    keys, values = rng.standard_normal((2, depths, 2, length, 2, 4)).astype(np.float32)
    segments = SEGMENTS[:, :length]

    def attended(query, keys, values):
        entries = list(zip(keys, values, strict=True))
        return chains.attend_to_chain(query, entries[0], tuple(entries[1:]), jnp.asarray(segments))

    query, keys, values = (jnp.asarray(part) for part in (query, keys, values))
    np.testing.assert_allclose(attended(query, keys, values), written_out(query, keys, values, segments), atol=1e-5)
    # The gradient, against finite differences of the form that is written out.
    by = rng.standard_normal(query.shape).astype(np.float32)
    gradient = jax.grad(lambda keys: jnp.sum(attended(query, keys, values) * by))(keys)
    step = rng.standard_normal(keys.shape).astype(np.float32)
    ends = [np.sum(written_out(query, keys + sign * 1e-2 * step, values, segments) * by) for sign in (1, -1)]
    np.testing.assert_allclose(jnp.sum(gradient * step), (ends[0] - ends[1]) / 2e-2, rtol=2e-2)


def test_no_more_scores_are_kept_than_those_of_a_few_queries(monkeypatch):
    def memory(queries, depths=1):
        monkeypatch.setattr(chains, "_SCORES", queries * 1024)
        row = jnp.ones((1, 1024, 1, 1, 8))
        entry = (row[:, :, 0], row[:, :, 0])

        def loss(query):
            for _ in range(depths):
                query = chains.attend_to_chain(query, entry, (entry,), jnp.ones((1, 1024), jnp.int32))
            return jnp.sum(query)

        return jax.jit(jax.grad(loss)).lower(row).compile().memory_analysis().temp_size_in_bytes

    assert memory(64) < memory(1024) / 4
    # Nor are they kept from depth to depth, where all queries are one block.
    assert memory(1024, 4) - memory(1024, 2) < 1.5 * 4 * 1024**2  # which would be twice that of one depth


def shared_model(**fields) -> LanguageModel:
    return model_of(tiny_config(heads__num_heads=3, heads__kind="recurrent", heads__cache="shared", **fields))


@pytest.mark.parametrize("position", [pytest.param(3, marks=pytest.mark.slow), 5, 8])
def test_a_chain_sees_its_own_tokens_ahead_and_nobody_elses(position):
    """By the gradient of head k's state at a position: of text up to t_{i+k}, within the document, and not one more."""
    model = shared_model()
    parameters = random_parameters(model)
    tokens, segments = jnp.arange(1, 13)[None], jnp.asarray(SEGMENTS[:1])
    positions = jnp.asarray([[*range(5), *range(6), 0]])

    @jax.jit
    @jax.jacrev
    def by_table(table):
        states = model.apply({"params": {**parameters, "embedding": table}}, tokens, segments, positions).heads
        return jnp.sum(states[:, 0, position], axis=-1)

    for k, gradient in enumerate(by_table(parameters["embedding"]), 1):
        read = {int(token) for token in np.nonzero(np.abs(gradient).max(axis=1))[0]} - {0}
        first, end = (1, 5) if position < 5 else (6, 11)
        assert read == set(range(first, min(position + 1 + k, end) + 1))


def test_depths_share_weights_and_not_their_entries():
    """The parameters are those of one module, whichever cache it has; what is made of them is not the same, but for
    depth 1."""
    shared, apart = shared_model(), model_of(tiny_config(heads__num_heads=3, heads__kind="recurrent"))
    parameters = random_parameters(shared)
    assert jax.tree.map(jnp.shape, parameters) == jax.tree.map(jnp.shape, random_parameters(apart))
    tokens = jnp.arange(24).reshape(2, 12)
    inputs = tokens, jnp.ones_like(tokens), jnp.tile(jnp.arange(12), (2, 1))
    one, other = (jax.jit(model.apply)({"params": parameters}, *inputs).heads for model in (shared, apart))
    np.testing.assert_allclose(one[0], other[0], atol=1e-5)
    assert all(np.abs(one[k] - other[k]).max() > 1e-2 for k in (1, 2))


@pytest.mark.slow
def test_recomputed_activations_change_nothing():
    tokens = jnp.arange(24).reshape(2, 12)
    inputs = tokens, jnp.ones_like(tokens), jnp.tile(jnp.arange(12), (2, 1))

    def squares(model, parameters):
        return jnp.sum(model.apply({"params": parameters}, *inputs).heads ** 2)

    models = [shared_model(model__remat=remat) for remat in (False, True)]
    parameters = random_parameters(models[0])
    # A head at each of three depths, and the backbone's scanned block.
    traced = [str(jax.make_jaxpr(lambda part, model=model: squares(model, part))(parameters)) for model in models]
    assert (
        traced[1].count("name=checkpoint")
        + traced[1].count("remat2[")
        - (traced[0].count("name=checkpoint") + traced[0].count("remat2["))
        >= 4
    )
    plain, again = (jax.grad(lambda part, model=model: squares(model, part))(parameters) for model in models)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4), plain, again)
