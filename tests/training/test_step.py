"""The sharded, accumulated step against the same step on one device in one piece."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtpd_jax.config import MeshConfig
from mtpd_jax.data.pipeline import put_on_devices
from mtpd_jax.sharding import batch_sharding, check_batch, make_mesh
from mtpd_jax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer
from mtpd_jax.training.state import abstract_state, initial_state, state_shardings
from mtpd_jax.training.step import make_step, newest_share
from tests.builders import (
    assert_trees_close,
    gradients,
    method_on,
    model_of,
    packed_batch,
    random_parameters,
    replace,
    tiny_config,
    uneven_batch,
    with_micro_batches,
)

SHAPES = [(2, 2, 2, 1), *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(8, 1, 1, 1), (1, 4, 2, 1)])]


def one_step(config, mesh, batch, parameters):
    """Loss, gradients, and the parameters after one SGD step, as NumPy arrays."""
    method, optimizer = method_on(config, mesh), optax.sgd(0.5)
    shardings = state_shardings(abstract_state(method, optimizer))
    # Copied first: the step donates its state.
    placed = jax.device_put(jax.tree.map(np.array, parameters), shardings.parameters)
    on_devices = put_on_devices(batch, batch_sharding(mesh))
    compute = jax.jit(lambda p, b: gradients(method, p, b))
    loss, sums, weights, by_parameters = jax.device_get(compute(placed, on_devices))
    state = initial_state(method, optimizer).replace(parameters=placed)
    state, result = make_step(method, optimizer, shardings)(state, on_devices)
    assert float(result.loss) == pytest.approx(float(loss), rel=1e-6)
    return loss, (sums, weights), by_parameters, jax.device_get(state.parameters)


@pytest.fixture(scope="module")
def reference():
    config = tiny_config()
    parameters = random_parameters(model_of(config))
    batch = uneven_batch(config)
    mesh = make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    return config, parameters, batch, one_step(config, mesh, batch, parameters)


def supervised(batch):
    """Supervised tokens per head of a batch, counted in a loop."""
    counts = np.zeros(3, int)
    for row in np.asarray(batch.segment_ids).reshape(-1, 32):
        for segment in set(row) - {0}:
            counts += [max(0, int((row == segment).sum()) - 1 - k) for k in range(3)]
    return counts


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eight_devices_equal_one(reference, shape):
    config, parameters, batch, expected = reference
    found = one_step(config, make_mesh(MeshConfig(*shape)), batch, parameters)
    assert_trees_close(found, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_one_batch(reference, parts):
    """The parts hold different numbers of supervised tokens; weighting each part alone would not give this."""
    config, parameters, batch, expected = reference
    config = replace(config, training__micro_batches=parts)
    mesh = make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    cut = with_micro_batches(batch, parts)
    counts = [supervised(jax.tree.map(lambda array, part=part: array[part], cut)) for part in range(parts)]
    assert len({tuple(count / count.sum()) for count in counts}) == parts  # else nothing is shown
    found = one_step(config, mesh, cut, parameters)
    assert found[1][1].tolist() == supervised(batch).tolist()
    assert_trees_close(found, expected, 1e-5)


@pytest.mark.parametrize(
    ("kl", "parts"),
    [
        ("lk", 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("forward", 1), ("forward", 4), ("lk", 1)]),
    ],
)
def test_heads_without_a_supervised_token_have_no_loss_and_no_gradient(kl, parts):
    """Documents of two tokens, one of three: all steps have a main loss, head 1 has one token, head 2 has none."""
    config = tiny_config(objective__kl=kl)
    rows = ((2,) * 16, (2, 2), (3,), (1,), (2,), (2,), (1, 1), (2,))
    batch = with_micro_batches(packed_batch(config, rows=rows), parts)
    method = method_on(config)
    parameters = random_parameters(method.model)
    loss, sums, weights, found = jax.jit(lambda p: gradients(method, p, batch))(parameters)
    assert weights.tolist() == [23, 1, 0] and supervised(batch).tolist() == [23, 1, 0]
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((loss, sums, found)))
    terms = method.terms(sums, weights)
    assert terms["head_2/ce"].mean() is terms["head_2/kl"].mean() is None
    ce, (one, kl_one) = terms["main/ce"].mean(), (terms[f"head_1/{name}"].mean() for name in ("ce", "kl"))
    assert float(loss) == pytest.approx(ce + 0.15 * one + 0.5 * kl_one, rel=1e-5)
    assert np.any(np.asarray(found["heads"]["head"]["projection"]["kernel"][0]))
    assert not any(np.any(np.asarray(leaf[1])) for leaf in jax.tree.leaves(found["heads"]))


def test_what_a_step_reports(reference):
    """Tokens without padding, and the norm of the gradient, which is neither clipped nor what Adam makes of it."""
    config, parameters, batch, (_, _, by_parameters, _) = reference
    config = replace(config, optimizer__clip_norm=1e-3)
    mesh = make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    method, optimizer = method_on(config, mesh), make_optimizer(config)
    shardings = state_shardings(abstract_state(method, optimizer))
    state = initial_state(method, optimizer)
    state = state.replace(parameters=jax.tree.map(lambda leaf: jax.numpy.array(leaf), parameters))
    step = make_step(method, optimizer, shardings)
    _, result = step(state, put_on_devices(batch, batch_sharding(mesh)))
    assert int(result.tokens) == sum(map(sum, ((32,), (1, 2, 1), (2, 2), (20, 11), (3, 3, 3), (1,), (7,), (30, 2))))
    squares = sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(by_parameters))
    assert float(result.grad_norm) == pytest.approx(np.sqrt(squares), rel=1e-5) and np.sqrt(squares) > 1e-2


def test_accumulation_over_devices(reference):
    config, parameters, batch, expected = reference
    config = replace(config, training__micro_batches=2)
    found = one_step(config, make_mesh(MeshConfig(2, 2, 2, 1)), with_micro_batches(batch, 2), parameters)
    assert_trees_close(found, expected, 1e-5)


def test_state_is_sharded_and_work_is_divided(reference):
    """Parameters and optimizer state are split as the rules say, and a device does its share of the FLOPs."""
    config, _, batch, _ = reference
    optimizer = make_optimizer(config)

    def flops_and_bytes(mesh):
        method = method_on(config, mesh)
        state = abstract_state(method, optimizer)
        on_devices = put_on_devices(batch, batch_sharding(mesh))
        step = make_step(method, optimizer, state_shardings(state))
        compiled = step.lower(state, on_devices).compile()
        local = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state))
        return compiled.cost_analysis()["flops"], local

    one = flops_and_bytes(make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1]))
    split = flops_and_bytes(make_mesh(MeshConfig(1, 8, 1, 1)))
    assert split[1] < one[1] / 6
    assert split[0] < one[0] / 4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_step_keeps_the_shardings_and_compiles_once(reference, shape):
    config, _, batch, _ = reference
    mesh, optimizer = make_mesh(MeshConfig(*shape)), make_optimizer(config)
    method = method_on(config, mesh)
    abstract = abstract_state(method, optimizer)
    step = make_step(method, optimizer, state_shardings(abstract))
    state, on_devices = initial_state(method, optimizer), put_on_devices(batch, batch_sharding(mesh))
    begun = state
    for _ in range(2):
        state, _ = step(state, on_devices)
    assert step._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(begun))  # donated: there is never a second state
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)


def test_clipping_bounds_the_global_norm(reference):
    """With plain SGD in place of Adam, the change of the parameters is the clipped gradient."""
    config, parameters, _, _ = reference
    slope = jax.grad(lambda p: sum(jnp.sum(100 * leaf**2) for leaf in jax.tree.leaves(p)))(parameters)
    optimizer = make_optimizer(replace(config, optimizer__clip_norm=0.5))
    huge, _ = optimizer.update(jax.tree.map(lambda g: 1e4 * g, slope), optimizer.init(parameters), parameters)
    usual, _ = optimizer.update(slope, optimizer.init(parameters), parameters)
    assert_trees_close(huge, usual, 1e-4)  # both were clipped to the same gradient
    state = optimizer.update(slope, optimizer.init(parameters), parameters)[1]
    assert float(optax.global_norm(state[1][0].mu)) == pytest.approx(0.1 * 0.5, rel=1e-4)  # (1 - b1) * clipped


@pytest.mark.slow
def test_plain_mtp_costs_what_a_dense_step_costs(reference):
    """FLOPs of the compiled gradients, in one chunk, because the compiler counts a loop's body once."""
    config, parameters, batch, _ = reference

    def flops(objective_config, heads):
        config = replace(reference[0], objective__chunk_rows=8 * 32, heads__num_heads=heads, **objective_config)
        method = method_on(config)
        p = parameters if heads else {name: value for name, value in parameters.items() if name != "heads"}
        compute = jax.jit(lambda p: gradients(method, p, batch)[3])
        return compute.lower(p).compile().cost_analysis()["flops"]

    def dense_flops(heads):
        model = model_of(replace(config, heads__num_heads=heads))
        p = parameters if heads else {name: value for name, value in parameters.items() if name != "heads"}

        def loss(p):
            hidden = model.apply({"params": p}, batch.tokens[0], batch.segment_ids[0], batch.positions[0])
            states = jnp.concatenate([hidden.main[None], hidden.heads])
            return -jnp.mean(jax.nn.log_softmax(states @ p["embedding"].T)[..., 0])

        return jax.jit(jax.grad(loss)).lower(p).compile().cost_analysis()["flops"]

    for heads in (2, 0):
        assert flops({"objective__beta": 0.0}, heads) < 1.1 * dense_flops(heads)
    assert flops({"objective__beta": 0.0}, 2) < 0.99 * flops({"objective__beta": 0.5, "objective__top_n": 300}, 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mesh__data": 16}, "must multiply to the number of devices"),
        (
            {"mesh__data": 1, "mesh__tensor": 8},
            "model.query_heads = 4 .* a multiple of mesh tensor = 8",
        ),
        ({"mesh__data": 1, "mesh__fsdp": 3, "training__batch_size": 9}, r"config.model.width = 32 .* mesh fsdp = 3"),
        (
            {"mesh__data": 1, "mesh__tensor": 2, "model__vocabulary_size": 301},
            "vocabulary_size = 301 .of .*embedding",
        ),
        ({"mesh__data": 8, "training__micro_batches": 2}, "batch_size"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(config, overrides, message):
    config = replace(config, **overrides)
    with pytest.raises(ValueError, match=message):
        mesh = make_mesh(config.mesh)
        check_batch(mesh, config.training)
        abstract_state(method_on(config, mesh), make_optimizer(config))


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_schedules(name):
    config = tiny_config(optimizer__schedule=name, optimizer__warmup_steps=5, optimizer__final_fraction=0.1)
    rates = np.array([learning_rate_schedule(config)(step) for step in range(21)])
    assert rates[0] == pytest.approx(3e-3 / 5) and rates[4] == pytest.approx(3e-3)
    assert rates[20] == pytest.approx(3e-4, rel=1e-3)
    assert np.all(np.diff(rates[5:]) <= 0)
    if name == "wsd":  # constant but for the last fifth
        np.testing.assert_allclose(rates[5:17], 3e-3, rtol=1e-6)
        assert rates[18] < 3e-3


def test_matrices_are_decayed_and_norms_are_not(config):
    parameters = random_parameters(model_of(tiny_config(model__qkv_bias=True)))
    mask = decay_mask(parameters)
    flat = {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(mask)}
    for path, decayed in flat.items():
        assert decayed == (not path.endswith("['scale']") and not path.endswith("['bias']")), path
    assert len(set(flat.values())) == 2


def test_the_average_is_that_of_the_parameters_trained():
    """Weights decay^age of the steps done, and none for what the parameters began with."""
    config = tiny_config(optimizer__ema_decay=0.75)
    mesh, optimizer = make_mesh(MeshConfig(-1, 1, 1, 1)), make_optimizer(config)
    method = method_on(config, mesh)
    state = initial_state(method, optimizer)
    step = make_step(method, optimizer, state_shardings(abstract_state(method, optimizer)))
    trained = []
    for _ in range(4):
        state, _ = step(state, put_on_devices(packed_batch(config), batch_sharding(mesh)))
        trained.append(jax.device_get(state.parameters))
        weights = 0.75 ** np.arange(len(trained))[::-1]
        expected = jax.tree.map(lambda *leaves, weights=weights: np.average(leaves, axis=0, weights=weights), *trained)
        assert_trees_close(jax.device_get(state.average), expected, 1e-6)
    assert state.evaluated is state.average


def test_the_average_of_one_step_is_that_step():
    """Whatever the decay: float32 does not tell 0.999999 from 1 by much."""
    for decay in (0.5, 0.999, 0.999999):
        assert float(newest_share(decay, jnp.asarray(1))) == 1
        assert float(newest_share(decay, jnp.asarray(10**8))) == pytest.approx(1 - decay, rel=1e-5)
