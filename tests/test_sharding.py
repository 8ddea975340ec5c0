"""What the partitioner is told: constraints in the lowered step, and the traffic of the compiled one."""

import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from experiments.bench.tpu import LIBRARY, WITHOUT_SPARSECORE, collectives, topology_mesh
from mtpd_jax.config import MeshConfig
from mtpd_jax.data.pipeline import Batch
from mtpd_jax.methods.method import method_of
from mtpd_jax.sharding import RULES, batch_sharding, constrain, make_mesh, shardings_of, within
from mtpd_jax.training.optimizer import make_optimizer
from mtpd_jax.training.state import abstract_state, state_shardings
from mtpd_jax.training.step import make_step
from tests.builders import method_on, tiny_config


def lowered_step(config, mesh):
    """The step for a whole batch of this shape, and the state's abstract arrays."""
    method, optimizer = method_of(config, mesh), make_optimizer(config)
    state = abstract_state(method, optimizer)
    step = make_step(method, optimizer, state_shardings(state))
    shape = (1, config.training.batch_size, config.training.sequence_length)
    rows = [jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding(mesh)) for _ in range(3)]
    return step.lower(state, Batch(*rows)), state


@pytest.mark.parametrize("heads", [0, 4])
def test_the_lowered_step_holds_every_constraint(heads):
    """Forward and backward: the embedding; in each kind of block after attention, in and after the feed-forward layer;
    a head's projection. Scans have one body, whatever the number of layers and heads."""
    config = tiny_config(heads__num_heads=heads)
    for shape in ((2, 2, 2, 1), (1, 8, 1, 1)):
        text = lowered_step(config, make_mesh(MeshConfig(*shape)))[0].as_text()
        constraints = re.findall(r"sharding_constraint %\S+ <@mesh, \[(.*?)\]>", text)
        assert len(constraints) == text.count("sharding_constraint") == 2 * (4 + 4 * bool(heads))
        batch = {'{"data", "fsdp"}'} if shape[0] > 1 else {'{"data", "fsdp"}', '{"fsdp"}'}
        assert {constraint.split("}, ")[0] + "}" for constraint in constraints} <= batch  # rows are always split
    alone = lowered_step(config, make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1]))[0].as_text()
    assert "sharding_constraint" not in alone


def test_a_constraint_places_by_the_rules():
    mesh = make_mesh(MeshConfig(2, 2, 2, 1))
    values = np.zeros((8, 4, 6))

    def of(*axes):
        return jax.jit(within(mesh, lambda x: constrain(x, *axes)))(values).sharding.shard_shape(values.shape)

    assert of("batch", None, "mlp_width") == (2, 4, 3)
    assert of("batch", None, None) == (2, 4, 6)
    assert constrain(values, "batch", None, None) is values  # outside, there is no mesh to place it on
    with pytest.raises(RuntimeError, match="inside"):
        within(mesh, lambda: (_ for _ in ()).throw(RuntimeError("inside")).__next__())()
    assert constrain(values, "batch", None, None) is values  # nor after an error inside


def test_axes_that_collide_are_named():
    assert RULES.spec(None, "batch", "mlp_width") == PartitionSpec(None, ("data", "fsdp"), "tensor")
    assert RULES.spec("width", None, "head_size", "vocabulary") == PartitionSpec("fsdp", None, None, "tensor")
    with pytest.raises(ValueError, match="axes 'batch' and 'width' both lie on mesh axis 'fsdp'"):
        RULES.spec("batch", "width")
    with pytest.raises(ValueError, match="axes 'kv_heads' and 'vocabulary' both lie on mesh axis 'tensor'"):
        RULES.spec("kv_heads", None, "vocabulary")
    with pytest.raises(ValueError, match="axis 'mlp': expected one of batch, width"):
        RULES.spec("mlp")


def test_a_parameter_that_collides_or_does_not_divide_is_named():
    mesh = make_mesh(MeshConfig(1, 4, 2, 1))

    def boxed(shape, *axes):
        return {"layer": {"kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, np.float32), axes)}}

    placed = shardings_of(boxed((8, 6), "width", "mlp_width"), mesh)["layer"]["kernel"]
    assert placed.spec == PartitionSpec("fsdp", "tensor")
    with pytest.raises(ValueError, match=r"model.width = 6 \(of layer/kernel\): expected a multiple of mesh fsdp = 4"):
        shardings_of(boxed((6, 6), "width", "mlp_width"), mesh)
    with pytest.raises(ValueError, match="axes 'query_heads' and 'kv_heads' both lie on mesh axis 'tensor'"):
        shardings_of(boxed((8, 8), "query_heads", "kv_heads"), mesh)


def test_collectives_are_listed_with_their_bytes():
    text = """
  %a = bf16[2,8]{1,0} all-gather(bf16[1,8]{1,0} %x), channel_id=1
  %b = (f32[4]{0}, f32[4]{0}) all-reduce-start(f32[4]{0} %x), channel_id=2
  %c = f32[4]{0} all-reduce-done((f32[4]{0}, f32[4]{0}) %b)
  %d = (s32[], f8e4m3fn[6]{0}, pred[3]{0}) all-to-all(s32[] %x, f8e4m3fn[6] %y, pred[3] %z)
"""
    expected = [("all-gather", 32), ("all-reduce", 16), ("all-to-all", 4), ("all-to-all", 6), ("all-to-all", 3)]
    assert collectives(text) == expected
    assert [size for _, size in collectives(text, in_elements=True)] == [16, 4, 1, 6, 3]


def test_initial_parameters_are_drawn_for_no_mesh():
    """They are traced once per model, whatever mesh it is trained on: nothing in them may be for the first one's."""
    method = method_on(tiny_config(model__width=40), make_mesh(MeshConfig(-1, 1, 1, 1), jax.devices()))
    create = within(method.mesh, lambda key: method.initial_parameters(key, None))
    assert "sharding_constraint" not in str(jax.make_jaxpr(create)(jax.random.key(0)))


@pytest.mark.slow
@pytest.mark.skipif(not LIBRARY.exists(), reason="libtpu is not installed: make .cache/libtpu")
def test_on_a_tpu_only_parameters_and_their_gradients_travel():
    """A step over four chips with parameters and rows split, in which activations are larger than any parameter: each
    parameter is gathered for the forward pass and for the backward pass and its gradient summed, in bfloat16, and no
    activation is exchanged. Without constraints it is four times as much, with an all-to-all for every product."""
    config = tiny_config(
        heads__num_heads=2, model__width=256, model__mlp_width=512, model__query_heads=4, model__head_size=64,
        model__vocabulary_size=512, model__dtype="bfloat16", training__batch_size=16, training__sequence_length=256,
    )  # fmt: skip
    lowered, state = lowered_step(config, topology_mesh(fsdp=4))
    found = collectives(lowered.compile(compiler_options=WITHOUT_SPARSECORE).as_text())
    assert {"all-gather", "all-reduce"} <= {operation for operation, _ in found}
    assert "all-to-all" not in {operation for operation, _ in found}
    largest_weight = max(leaf.size for leaf in jax.tree.leaves(state.parameters))
    activation = 16 * 256 * 256
    assert max(size for _, size in found) <= 2 * largest_weight < 2 * activation  # bytes in bfloat16
    assert sum(size for _, size in found) < 4 * sum(leaf.size for leaf in jax.tree.leaves(state.parameters))
