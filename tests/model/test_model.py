"""Causality, packing, and the pieces of the model against independent forms."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpd_jax.decoding.decoder import Decoder
from mtpd_jax.decoding.options import Options
from mtpd_jax.model.backbone import LanguageModel, count_parameters
from mtpd_jax.model.feed_forward import FEED_FORWARDS, GatedMLP
from mtpd_jax.model.views import Rotation
from tests.builders import model_and_parameters, model_of, packed_batch, random_parameters, replace, tiny_config
from tests.model import reference


@pytest.mark.parametrize("kind", ["cascade", "recurrent"])
@pytest.mark.parametrize("pass_normed", [True, False])
def test_causality_by_gradient(kind, pass_normed):
    """Head k at position i depends on token i+k and on none after it; the main head on token i and none after it."""
    config = tiny_config(heads__kind=kind, heads__num_heads=3, heads__pass_normed=pass_normed)
    model, parameters = model_and_parameters(config)
    length = 10
    tokens = jnp.arange(1, length + 1)[None]
    ones, positions = jnp.ones_like(tokens), jnp.arange(length)[None]

    # A perturbation of each token's embedding stands in for the token, which has no gradient.
    def states(perturbation_VxD):
        changed = {**parameters, "embedding": parameters["embedding"] + perturbation_VxD}
        hidden = model.apply({"params": changed}, tokens, ones, positions)
        return jnp.concatenate([hidden.main[None], hidden.heads])[:, 0]  # [K+1, T, D]

    jacobian = jax.jit(jax.jacrev(lambda p: jnp.sum(states(p) ** 3, axis=-1)))(jnp.zeros((300, 32)))
    influence = np.abs(np.asarray(jacobian)).sum(-1)[:, :, 1 : length + 1]  # [K+1, position, token]
    for k in range(4):
        for i in range(length - k):
            seen = np.nonzero(influence[k, i])[0]
            assert seen.max() == i + k, (k, i)
            assert seen.min() == 0


@pytest.mark.parametrize("kind", ["cascade", "recurrent"])
def test_packed_equals_separate(kind):
    """Every head computes the same for a document in a packed row as for the document alone."""
    config = tiny_config(heads__kind=kind, heads__num_heads=3)
    model, parameters = model_and_parameters(config)
    batch = jax.tree.map(lambda array: array[0], packed_batch(config))
    apply = jax.jit(lambda *inputs: model.apply({"params": parameters}, *inputs))
    packed = apply(batch.tokens, batch.segment_ids, batch.positions)
    for row in range(4):
        for segment in range(1, 5):
            places = np.nonzero(np.asarray(batch.segment_ids[row]) == segment)[0]
            tokens = batch.tokens[row, places][None]
            alone = apply(tokens, jnp.ones_like(tokens), jnp.arange(len(places))[None])
            np.testing.assert_allclose(packed.main[row, places], alone.main[0], atol=2e-5)
            for k in range(1, 4):
                valid = places[: max(0, len(places) - k)]  # beyond, the look-ahead token is another document's
                np.testing.assert_allclose(
                    packed.heads[k - 1, row, valid], alone.heads[k - 1, 0, : len(valid)], atol=2e-5
                )


def test_changing_another_document_changes_nothing():
    config = tiny_config()
    model, parameters = model_and_parameters(config)
    batch = jax.tree.map(lambda array: array[0], packed_batch(config))
    other = jnp.where(batch.segment_ids == 2, (batch.tokens + 7) % 300, batch.tokens)

    def run(tokens):
        return jax.jit(model.apply)({"params": parameters}, tokens, batch.segment_ids, batch.positions).main

    kept = np.asarray(batch.segment_ids == 1)
    np.testing.assert_array_equal(np.asarray(run(batch.tokens))[kept], np.asarray(run(other))[kept])
    assert np.any(np.asarray(run(batch.tokens)) != np.asarray(run(other)))


def test_rotation_turns_dot_products_into_functions_of_distance():
    rng = np.random.default_rng(0)
    query, key = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 8)), jnp.float32)

    config = tiny_config(model__rope_theta=100.0).model

    def turned(x, position):
        return Rotation.of(jnp.array([[position]]), config).apply(x)

    def score(i, j):
        return float(jnp.sum(turned(query, i) * turned(key, j)))

    assert score(5, 2) == pytest.approx(score(15, 12), abs=1e-5)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)
    assert score(0, 0) == pytest.approx(float(jnp.sum(query * key)), abs=1e-6)


def test_rotation_of_llama_3_1_is_slower_where_it_was_slow():
    """The rule as its release states it, pair by pair: by wavelengths, in whole, not at all, or something between."""
    config = tiny_config(
        model__rope_theta=500_000.0, model__head_size=64, model__rope_llama3=(8.0, 1.0, 4.0, 8192.0)
    ).model
    expected = []
    for pair in range(32):
        frequency = 500_000.0 ** (-2 * pair / 64)
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(frequency)
        elif wavelength > 8192 / 1:
            expected.append(frequency / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    rotation = Rotation.of(jnp.array([[1]]), config)  # where no pair has turned further than arctan tells
    found = np.arctan2(rotation.sin, rotation.cos)[0, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    unscaled = [500_000.0 ** (-2 * pair / 64) for pair in range(32)]
    assert {0.125, 1.0} < {round(a / b, 6) for a, b in zip(expected, unscaled, strict=True)}  # and between


@pytest.mark.parametrize("wrong", [(8.0, 1.0, 4.0), (8.0, 4.0, 4.0, 8192.0), (8.0, 0.0, 4.0, 8192.0)])
def test_rope_scaling_that_says_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match=r"config.model.rope_llama3 = \("):
        tiny_config(model__rope_llama3=wrong)


def wide(parameters, index=None):
    """Parameters in float64; of one layer or head, where they are stacked."""
    return jax.tree.map(lambda leaf: np.asarray(leaf if index is None else leaf[index], np.float64), parameters)


def test_the_backbone_against_numpy():
    """Two layers, qkv biases and qk-norm, and the final norm after them."""
    config = tiny_config(model__qkv_bias=True, heads__num_heads=0)
    model, parameters = model_and_parameters(config)
    parameters["backbone"]["blocks"]["attention"]["qkv"]["bias"] += 0.3  # random parameters leave biases at zero
    tokens = jnp.array([[5, 9, 2, 7]])
    found = jax.jit(model.apply)({"params": parameters}, tokens, jnp.ones_like(tokens), jnp.arange(4)[None]).main[0]
    x = np.asarray(parameters["embedding"], np.float64)[tokens[0]] * np.sqrt(32)
    for layer in range(2):
        x = reference.block(x, wide(parameters["backbone"]["blocks"], layer))
    np.testing.assert_allclose(found, reference.norm(x, parameters["backbone"]["final_norm"]["scale"]), atol=5e-5)


@pytest.mark.parametrize("kind", ["cascade", "recurrent"])
@pytest.mark.parametrize("pass_normed", [True, False])
def test_two_heads_against_numpy(kind, pass_normed):
    """From the backbone's state after its final norm, [embedding, hidden] in this order, every norm in its place."""
    config = tiny_config(heads__kind=kind, heads__pass_normed=pass_normed)
    model, parameters = model_and_parameters(config)
    tokens = jnp.array([[5, 9, 2, 7, 11, 3, 250, 40]])
    hidden = jax.jit(model.apply)({"params": parameters}, tokens, jnp.ones_like(tokens), jnp.arange(8)[None])
    embedding, ids = np.asarray(parameters["embedding"], np.float64) * np.sqrt(32), np.asarray(tokens[0])
    # Beyond the document's end nothing is supervised: what stands there does not matter.
    ahead = np.stack([embedding[np.pad(ids[k:], (0, k))] for k in (1, 2)])
    modules = parameters["heads"]["head"]
    heads = [wide(modules)] * 2 if kind == "recurrent" else [wide(modules, k) for k in range(2)]
    expected = reference.cascade(np.asarray(hidden.main[0], np.float64), ahead, heads, pass_normed)
    for k in (1, 2):
        np.testing.assert_allclose(hidden.heads[k - 1, 0, : 8 - k], expected[k - 1, : 8 - k], atol=5e-5)


def test_remat_changes_nothing_but_is_on():
    config = tiny_config()
    batch = jax.tree.map(lambda array: array[0], packed_batch(config))
    _, parameters = model_and_parameters(config)

    def gradient(remat):
        model = model_of(replace(config, model__remat=remat))

        def loss(parameters):
            hidden = model.apply({"params": parameters}, batch.tokens, batch.segment_ids, batch.positions)
            return jnp.sum(hidden.main**3) + jnp.sum(hidden.heads**3)

        return jax.grad(loss)

    programs = {remat: str(jax.make_jaxpr(gradient(remat))(parameters)) for remat in (True, False)}
    assert "remat" in programs[True] or "checkpoint" in programs[True]
    assert "remat" not in programs[False] and "checkpoint" not in programs[False]
    on, off = jax.jit(gradient(True))(parameters), jax.jit(gradient(False))(parameters)
    for a, b in zip(jax.tree.leaves(on), jax.tree.leaves(off), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_parameters_by_kind():
    """A recurrent head has one module's parameters whatever K is; no heads, no head parameters."""

    def count(**overrides):
        _, parameters = model_and_parameters(tiny_config(**overrides))
        return count_parameters(parameters.get("heads", {})), parameters

    one, _ = count(heads__num_heads=1)
    three, _ = count(heads__num_heads=3)
    recurrent, _ = count(heads__num_heads=3, heads__kind="recurrent")
    none, parameters = count(heads__num_heads=0)
    assert three == 3 * one == 3 * recurrent > 0
    assert none == 0 and "heads" not in parameters


def test_untied_unembedding_is_its_own_matrix():
    _, parameters = model_and_parameters(tiny_config(model__tied_unembedding=False))
    assert parameters["unembedding"].shape == parameters["embedding"].shape


class CountingMLP(nn.Module):
    """A feed-forward layer that tells something of the pass, as a router does."""

    config: object
    weights = staticmethod(GatedMLP.weights)

    @nn.compact
    def __call__(self, x):
        out, _ = GatedMLP(self.config, name="experts")(x)
        return out, {"size": jnp.mean(jnp.abs(out)), "tokens": jnp.float32(x.shape[0] * x.shape[1])}


@pytest.mark.parametrize(
    ("remat", "num_heads"), [pytest.param(False, 2, marks=pytest.mark.slow), (True, 2), (False, 0)]
)
def test_the_feed_forward_layer_is_the_configs_and_its_statistics_are_handed_on(monkeypatch, remat, num_heads):
    """Layer by layer of the backbone, head by head; and decoding, which has no use for them, runs the same layer."""
    monkeypatch.setitem(FEED_FORWARDS, "counting", CountingMLP)
    config = tiny_config(model__remat=remat, heads__num_heads=num_heads)
    plain = model_of(config)
    model = LanguageModel(dataclasses.replace(plain.config, feed_forward="counting"), config.heads)
    parameters = random_parameters(model)
    rows = jax.tree.map(lambda array: array[0], packed_batch(config))
    hidden = jax.jit(model.apply)({"params": parameters}, rows.tokens, rows.segment_ids, rows.positions)
    backbone, heads = hidden.statistics
    assert backbone["size"].shape == (2,) and len(set(backbone["size"].tolist())) == 2
    assert backbone["tokens"].tolist() == [8 * 32] * 2
    assert heads is None if not num_heads else heads["tokens"].tolist() == [8 * 32] * 2
    without = jax.jit(plain.apply)({"params": random_parameters(plain)}, rows.tokens, rows.segment_ids, rows.positions)
    assert without.statistics == (None, None)
    decoder = Decoder(model, jax.device_put(parameters, jax.devices()[0]), [0])
    prompts, options = [np.array([3, 1, 2], np.int32)], Options(num_heads, 8)
    written = decoder.run(prompts, options)[0].tokens
    text = list(prompts[0])
    for token in written:  # as the whole model would go on
        tokens = jnp.asarray(np.pad(text, (0, 32 - len(text))))[None]
        main = jax.jit(model.apply)({"params": parameters}, tokens, jnp.ones_like(tokens), jnp.arange(32)[None]).main
        assert int(jnp.argmax(main[0, len(text) - 1] @ parameters["embedding"].T)) == token
        text.append(token)
