"""Small configs, parameters and batches that tests share."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from configs import base
from mtpd_jax.config import Config, sections
from mtpd_jax.data.pipeline import Batch
from mtpd_jax.editing import change
from mtpd_jax.fields import defaults_of
from mtpd_jax.methods.method import Method, StepContext, method_of
from mtpd_jax.model.backbone import LanguageModel, build_model
from mtpd_jax.platform import Platform, platform_of
from mtpd_jax.sharding import data_mesh, within
from mtpd_jax.training.step import gradients_of_batch

_TINY: dict[str, dict[str, Any]] = {
    "data": {"packages": False, "shuffle_window": 8, "validation_fraction": 0.2},
    "model": {
        "vocabulary_size": 300,
        "width": 32,
        "layers": 2,
        "query_heads": 4,
        "kv_heads": 2,
        "head_size": 8,
        "mlp_width": 48,
        "dtype": "float32",
    },
    "heads": {"num_heads": 2},
    "objective": {"top_n": 20},
    "optimizer": {"warmup_steps": 2, "learning_rate": 3e-3},
    "training": {"steps": 20, "batch_size": 8, "sequence_length": 32},
    "checkpoint": {"every_steps": 10},
    "logging": {"every_steps": 5},
    "evaluation": {"every_steps": 10, "documents": 2},
}


def tiny_config(**overrides: Any) -> Config:
    """The base config shrunk, with overrides written ``section__field=value``."""
    config = base.get_config()
    for section, values in _TINY.items():
        config[section].update(values)
    change(config, _flat(overrides))
    return Config.build(config.to_dict())


def _flat(overrides: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("__", "."): value for name, value in overrides.items()}


def platform() -> Platform:
    """That of this machine."""
    return platform_of(jax.devices()[0])


def model_of(config: Config) -> LanguageModel:
    """The model of a config, for one device of this machine."""
    return build_model(config, platform())


def method_on(config: Config, mesh: Mesh | None = None) -> Method:
    """The method of a config; without a mesh, on one device."""
    return method_of(config, data_mesh(jax.devices()[:1]) if mesh is None else mesh)


def step_context() -> StepContext:
    """That of the first rows of a first step."""
    return StepContext(jnp.int32(0), jax.random.key(0), jax.random.split(jax.random.key(1), 8))


def gradients(method: Method, trained: Any, batch: Batch, frozen: Any = None, step: Any = 0) -> Any:
    """Loss, sums, weights and gradients of a [micro-batch, B, T] batch, as a step forms them."""
    return within(method.mesh, gradients_of_batch)(method, trained, frozen, batch, jnp.int32(step))


def random_parameters(model: LanguageModel, seed: int = 0, scale: float = 1.0) -> Any:
    """Parameters in which nothing is zero, so that every path through the model matters."""
    rng = np.random.default_rng(seed)

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = rng.standard_normal(leaf.shape, np.float32)
        of_norm = path[-1].key == "scale"
        return jnp.asarray(1 + 0.1 * noise if of_norm else scale * model.config.width**-0.5 * noise, leaf.dtype)

    return jax.tree.map_with_path(fill, _shapes(model))


@functools.cache
def _shapes(model: LanguageModel) -> Any:
    """Those of the parameters; by tracing alone, since compiling how they are drawn takes a second."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens, tokens, tokens))["params"]


def model_and_parameters(config: Config, seed: int = 0, scale: float = 1.0) -> tuple[LanguageModel, Any]:
    model = model_of(config)
    return model, random_parameters(model, seed, scale)


def packed_batch(config: Config, seed: int = 0, rows: tuple[tuple[int, ...], ...] | None = None) -> Batch:
    """A [1, B, T] batch; row r holds documents of the lengths ``rows[r]``, and padding after them.

    Without ``rows``, every row holds the same lengths in another order.
    """
    batch, length = config.training.batch_size, config.training.sequence_length
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, config.model.vocabulary_size, (batch, length)).astype(np.int32)
    segment_ids, positions = np.zeros((2, batch, length), np.int32)
    for row in range(batch):
        start = 0
        for number, size in enumerate(np.roll((11, 4, 9, 1), row) if rows is None else rows[row], 1):
            segment_ids[row, start : start + size] = number
            positions[row, start : start + size] = np.arange(size)
            start += size
    tokens[segment_ids == 0] = 0
    return Batch(*(jnp.asarray(array)[None] for array in (tokens, segment_ids, positions)))


def uneven_batch(config: Config) -> Batch:
    """A batch no two parts of which are supervised alike; documents of one or two tokens teach the heads nothing."""
    return packed_batch(config, rows=((32,), (1, 2, 1), (2, 2), (20, 11), (3, 3, 3), (1,), (7,), (30, 2)))


def with_micro_batches(batch: Batch, parts: int) -> Batch:
    return jax.tree.map(lambda array: array.reshape(parts, -1, array.shape[-1]), batch)


def replace(config: Config, **overrides: Any) -> Config:
    """A copy of a config with overrides written ``section__field=value``."""
    tree = config.to_dict()
    for path, value in _flat(overrides).items():
        section, field = path.split(".")
        declared = sections()[section]
        if field == declared.tag:
            known = [declared.tag, *defaults_of(declared.cases[value])]
            tree[section] = {name: old for name, old in tree[section].items() if name in known}
        tree[section][field] = value
    return Config.build(tree)


def assert_trees_close(left: Any, right: Any, tolerance: float) -> None:
    """Every leaf agrees within ``tolerance`` of the right one's norm."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        difference = np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64))
        norm = np.linalg.norm(np.asarray(b, np.float64))
        assert difference <= tolerance * max(norm, 1e-12), (jax.tree_util.keystr(path), difference, norm)
