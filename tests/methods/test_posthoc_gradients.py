"""What heads on a frozen backbone are taught, by which gradients, and from which beginnings."""

import dataclasses

import jax
import numpy as np
import pytest

from mtpd_jax.config import MeshConfig
from mtpd_jax.model.backbone import LanguageModel
from mtpd_jax.sharding import make_mesh
from tests.builders import (
    assert_trees_close,
    gradients,
    method_on,
    model_and_parameters,
    packed_batch,
    random_parameters,
    tiny_config,
)
from tests.runs.runs import assert_bitwise

KINDS = {
    "cascade": {"heads__kind": "cascade"},
    "recurrent": {"heads__kind": "recurrent"},
    "shared": {"heads__kind": "recurrent", "heads__cache": "shared"},
}
MORE = [("cascade", "tv"), ("recurrent", "forward"), ("shared", "forward")]


def posthoc_config(**overrides):
    return tiny_config(objective__mode="posthoc", objective__source="elsewhere", **overrides)


@pytest.mark.parametrize(
    ("kind", "kl"),
    [("cascade", "forward"), ("shared", "lk"), *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE)],
)
def test_heads_have_the_gradient_of_joint_training_that_is_cut_off(kind, kl):
    """The same loss beside a trunk that gets no gradient from it; the heads' own is the same, and there is no other."""
    weights = {
        "objective__alpha": (0.1, 0.2), "objective__beta": (0.5, 0.6), "objective__kl": kl, **KINDS[kind]
    }  # fmt: skip
    config, joint = posthoc_config(**weights), tiny_config(objective__detach_trunk=True, **weights)
    _, parameters = model_and_parameters(config)
    batch, method = packed_batch(config), method_on(config)
    trained, frozen = method.split(parameters)
    assert set(trained) == {"heads"} and "heads" not in frozen
    assert_bitwise(method.merge(trained, frozen), parameters)
    found = jax.jit(lambda trained, frozen: gradients(method, trained, batch, frozen))(trained, frozen)
    whole = jax.jit(lambda parameters: gradients(method_on(joint), parameters, batch))(parameters)
    assert set(found[3]) == {"heads"}
    assert_trees_close(found[3]["heads"], whole[3]["heads"], 1e-5)
    assert_trees_close((found[1].ce, found[1].kl, found[2]), (whole[1].ce, whole[1].kl, whole[2]), 1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 2, 1), pytest.param((1, 4, 1, 1), marks=pytest.mark.slow)])
def test_on_a_mesh_the_gradient_is_the_same(shape):
    config = posthoc_config(**KINDS["shared"])
    _, parameters = model_and_parameters(config)
    batch = packed_batch(config)
    results = []
    for mesh in (None, make_mesh(MeshConfig(*shape))):
        method = method_on(config, mesh)
        step = jax.jit(lambda trained, frozen, method=method: gradients(method, trained, batch, frozen))
        results.append(step(*method.split(parameters)))
    assert_trees_close(results[1][3], results[0][3], 1e-5)
    assert float(results[1][0]) == pytest.approx(float(results[0][0]), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_backbone_is_never_differentiated(kind):
    """FLOPs of the compiled gradients, of one layer and one depth, against the formula: 2 per frozen weight, 6 else."""
    large = {"model__layers": 1, "model__width": 64, "model__mlp_width": 256, "model__vocabulary_size": 512}
    config = posthoc_config(heads__num_heads=1, objective__chunk_rows=8 * 32, objective__beta=0.0, **large,
                            objective__alpha=1.0, **KINDS[kind])  # fmt: skip
    _, parameters = model_and_parameters(config)
    batch, method = packed_batch(config), method_on(config)
    compute = jax.jit(lambda trained, frozen: gradients(method, trained, batch, frozen)[3])
    flops = compute.lower(*method.split(parameters)).compile().cost_analysis()["flops"] / batch.tokens.size
    needed = method.costs().flops_per_token
    assert 0.9 < flops / needed < 1.2
    trained = method_on(tiny_config(heads__num_heads=1, **large)).costs().flops_per_token
    assert needed < 0.65 * trained


def test_what_is_taught_by_default_is_the_backbones_distribution():
    """At every depth alike, and nothing of the data's labels."""
    assert posthoc_config(heads__num_heads=3).objective.coefficients(3) == ((0.0,) * 3, (1 / 3,) * 3)
    given = posthoc_config(objective__alpha=0.5, objective__beta=(0.51, 0.31)).objective
    assert given.coefficients(2) == ((0.5, 0.5), (0.51, 0.31))


@pytest.mark.parametrize("kind", KINDS)
def test_heads_may_begin_as_the_backbones_last_block(kind):
    """Its block and final norm, on the sum of both inputs: what the backbone makes of such a stream, run by itself."""
    config = posthoc_config(objective__initial_heads="last_block", **KINDS[kind])
    method = method_on(config)
    source = random_parameters(LanguageModel(method.model.config, dataclasses.replace(config.heads, num_heads=0)))
    whole = method.initial_parameters(jax.random.key(0), source)
    shared = kind != "cascade"
    head = jax.tree.map(lambda leaf: leaf if shared else leaf[1], whole["heads"]["head"])
    last = jax.tree.map(lambda leaf: leaf[-1], source["backbone"]["blocks"])
    assert_bitwise(head["block"], last)
    assert_bitwise(head["output_norm"], source["backbone"]["final_norm"])
    assert_bitwise({**whole, "heads": 0}, {**source, "heads": 0})
    both = np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)
    projected = np.concatenate(both, axis=-1) @ np.asarray(head["projection"]["kernel"])
    np.testing.assert_allclose(projected, both[0] + both[1], rtol=1e-5)
