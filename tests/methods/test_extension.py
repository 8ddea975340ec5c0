"""Looped extension: what is copied, what is frozen, what it costs, and what it refuses."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from mtpd_jax import evaluate, generate, train
from mtpd_jax.config import MeshConfig
from mtpd_jax.methods.partition import cut_heads, extend_heads
from mtpd_jax.model.backbone import LanguageModel
from mtpd_jax.model.layers import apply
from mtpd_jax.model.views import PackedRows
from mtpd_jax.runs.models import RunModel
from mtpd_jax.runs.origin import completed
from mtpd_jax.runs.workdir import open_workdir
from mtpd_jax.sharding import make_mesh
from mtpd_jax.training.optimizer import make_optimizer
from mtpd_jax.training.state import initial_state
from tests.builders import (
    assert_trees_close,
    gradients,
    method_on,
    model_and_parameters,
    packed_batch,
    replace,
    tiny_config,
)
from tests.runs.runs import assert_bitwise, lines, restored, stop_after


def extension_config(heads=5, frozen=2, **overrides):
    return tiny_config(
        objective__mode="extension", objective__source="elsewhere", objective__frozen_heads=frozen,
        heads__num_heads=heads, **overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base_config(text_file):
    return tiny_config(data__source="text", data__paths=(text_file,), optimizer__ema_decay=0.9)


@pytest.fixture(scope="module")
def base(base_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("loops") / "base"
    train.run(base_config, str(workdir))
    return workdir


@pytest.fixture(scope="module")
def longer_config(base, base_config):
    return replace(base_config, objective__mode="extension", objective__source=str(base), heads__num_heads=5)


@pytest.fixture(scope="module")
def extended(longer_config, tmp_path_factory):
    """Two heads extended to five."""
    workdir = tmp_path_factory.mktemp("loops") / "extended"
    assert train.run(longer_config, str(workdir)).finished
    return workdir


def evaluated(workdir):
    model = RunModel(open_workdir(str(workdir)))
    return jax.device_get(model.read(make_mesh(model.config.mesh)).parameters)


@pytest.mark.parametrize(("heads", "wanted"), [(1, 8), (4, 8), (3, 7)])
def test_new_heads_are_copies_in_turn(heads, wanted):
    _, parameters = model_and_parameters(tiny_config(heads__num_heads=heads))
    copied = extend_heads(parameters, wanted)
    for old, new in zip(jax.tree.leaves(parameters["heads"]), jax.tree.leaves(copied["heads"]), strict=True):
        assert new.shape[0] == wanted
        for j in range(1, wanted + 1):
            np.testing.assert_array_equal(new[j - 1], old[(j - 1) % heads])
    assert_bitwise({**copied, "heads": 0}, {**parameters, "heads": 0})


def test_split_and_merge_are_inverse():
    config = extension_config()
    _, parameters = model_and_parameters(config)
    extension, joint = method_on(config), method_on(tiny_config(heads__num_heads=5))
    trained, frozen = extension.split(parameters)
    assert set(trained) == {"heads"} and jax.tree.leaves(trained)[0].shape[0] == 3
    assert_bitwise(extension.merge(trained, frozen), parameters)
    assert joint.split(parameters) == (parameters, None) and joint.merge(parameters, None) is parameters


@pytest.mark.parametrize("pass_normed", [pytest.param(True, marks=pytest.mark.slow), False])
def test_two_parts_are_the_whole_model(pass_normed):
    config = extension_config(heads__pass_normed=pass_normed)
    model, parameters = model_and_parameters(config)
    above, below = (LanguageModel(model.config, dataclasses.replace(config.heads, num_heads=n)) for n in (3, 2))
    rows = jax.tree.map(lambda array: array[0], packed_batch(config))
    inputs = rows.tokens, rows.segment_ids, rows.positions
    whole = apply(model, parameters, *inputs)
    trained, frozen = cut_heads(parameters, 2)
    view = PackedRows.of(rows.segment_ids, rows.positions, model.config)
    states = apply(below, frozen, *inputs, view=view)
    parts = apply(above, {**frozen, **trained}, states, 3, *inputs[:2], view=view, method="further_heads")
    assert_trees_close((parts.main, parts.heads, parts.carried), (whole.main, whole.heads[2:], whole.carried), 1e-6)


@pytest.mark.parametrize(
    ("shape", "kl"), [pytest.param(None, "forward", marks=pytest.mark.slow), ((2, 2, 2, 1), "lk")], ids=str
)
def test_new_heads_have_the_gradient_of_joint_training(shape, kl):
    """The same terms in a joint objective whose other coefficients are zero; there, all heads are differentiated."""
    config = extension_config(objective__kl=kl, objective__alpha=(0.1, 0.2, 0.3), objective__beta=(0.5, 0.6, 0.7))
    joint = tiny_config(
        heads__num_heads=5, objective__kl=kl, objective__alpha=(0.0, 0.0, 0.1, 0.2, 0.3),
        objective__beta=(0.0, 0.0, 0.5, 0.6, 0.7),
    )  # fmt: skip
    _, parameters = model_and_parameters(config)
    batch = packed_batch(config)
    method = method_on(config, shape and make_mesh(MeshConfig(*shape)))
    compute = jax.jit(lambda trained, frozen: gradients(method, trained, batch, frozen))
    loss, sums, weights, found = compute(*method.split(parameters))
    whole = jax.jit(lambda parameters: gradients(method_on(joint), parameters, batch))(parameters)
    assert_trees_close(found["heads"], jax.tree.map(lambda stacked: stacked[2:], whole[3]["heads"]), 1e-5)
    assert_trees_close((sums.ce[1:], sums.kl, weights[1:]), (whole[1].ce[3:], whole[1].kl[2:], whole[2][3:]), 1e-5)
    main = float(whole[1].ce[0] / whole[2][0])  # constant, and so no part of what is minimised
    assert float(loss) == pytest.approx(float(whole[0]) - main, rel=1e-4)


def test_the_backward_pass_does_not_enter_what_is_frozen_or_detached():
    """FLOPs of the compiled gradients; one layer and one head of each kind, because a loop's body is counted once."""
    large = {"model__layers": 1, "model__width": 64, "model__mlp_width": 256, "model__vocabulary_size": 512}
    extension = extension_config(heads=2, frozen=1, objective__chunk_rows=8 * 32, objective__beta=0.0, **large)
    joint = tiny_config(heads__num_heads=1, objective__chunk_rows=8 * 32, objective__beta=0.0, **large)
    detached = replace(joint, objective__detach_trunk=True)

    def flops(config):
        _, parameters = model_and_parameters(config)
        batch, method = packed_batch(config), method_on(config)
        compute = jax.jit(lambda trained, frozen: gradients(method, trained, batch, frozen)[3])
        return compute.lower(*method.split(parameters)).compile().cost_analysis()["flops"] / batch.tokens.size

    def needed(config):
        return method_on(config).costs().flops_per_token

    # What the model needs: 6 per weight that is trained, 2 per weight that is not.
    for config in (joint, extension, detached):
        assert 0.9 < flops(config) / needed(config) < 1.2
    # The unembedding has no gradient from a head that is cut off from it: two of six per weight.
    saved = needed(joint) - needed(detached)
    assert saved == 2 * 512 * 64
    assert flops(joint) - flops(detached) == pytest.approx(saved, rel=0.2)
    everything_trained = dataclasses.replace(extension, objective=joint.objective)
    assert needed(extension) < 0.6 * needed(everything_trained)


@pytest.mark.optimised
def test_a_run_changes_new_heads_only(base, extended, longer_config):
    before, after = evaluated(base), evaluated(extended)
    copied = extend_heads(before, 5)
    assert_bitwise({**after, "heads": 0}, {**before, "heads": 0})
    for found, start in zip(jax.tree.leaves(after["heads"]), jax.tree.leaves(copied["heads"]), strict=True):
        np.testing.assert_array_equal(found[:2], start[:2])
        assert all(np.any(found[head] != start[head]) for head in range(2, 5))
    config = open_workdir(str(extended)).read_config()
    state, _ = restored(extended, config)
    new_heads = sum(leaf[2:].size for leaf in jax.tree.leaves(copied["heads"]))
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * new_heads  # Adam's two, of nothing else
    assert sum(leaf.size for leaf in jax.tree.leaves(state.average)) == new_heads
    training, evaluation = lines(extended)[0], lines(extended)[-1]
    assert "head_3/kl" in training and "head_1/kl" not in training
    assert "eval/head_1/kl" in evaluation and "eval/head_5/kl" in evaluation
    assert (extended / "tokenizer.json").read_text() == (base / "tokenizer.json").read_text()


@pytest.mark.slow
def test_text_that_the_trunk_was_trained_on_is_not_held_out(base, longer_config, tmp_path, text_file, capsys):
    """More documents held out of the same data are refused; other data are said, in training and in evaluation."""
    with pytest.raises(ValueError, match=r"validation_fraction = 0.4: expected at most 0.2, that of the run in"):
        train.run(replace(longer_config, data__validation_fraction=0.4), str(tmp_path / "more"))
    assert not (tmp_path / "more").exists()
    note = "trained on other documents"
    assert note not in capsys.readouterr().err
    (tmp_path / "other.txt").write_text(pathlib.Path(text_file).read_text().replace("cat", "car"))
    other = replace(longer_config, data__paths=(str(tmp_path / "other.txt"),), training__steps=5)
    train.run(other, str(tmp_path / "other"))
    assert note in capsys.readouterr().err
    evaluate.run(str(tmp_path / "other"), split_name="validation", batch_size=8)
    assert note in capsys.readouterr().err
    # And of a run on top of it, though its data are those that the other was trained on.
    again = replace(other, objective__source=str(tmp_path / "other"), heads__num_heads=6)
    train.run(again, str(tmp_path / "again"))
    assert note in capsys.readouterr().err
    evaluate.run(str(base), split_name="validation", batch_size=8)
    assert note not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.optimised
def test_an_extended_run_is_extended_and_resumed_without_its_source(extended, longer_config, tmp_path, monkeypatch):
    """5 to 7 heads, stopped on the way, gone on with after the run that it began from is moved, and gone: the same
    bits. Another run, or nothing, in its place is refused."""
    source = shutil.copytree(extended, tmp_path / "source")
    config = replace(longer_config, objective__source=str(source), heads__num_heads=7, training__micro_batches=2)
    config = replace(config, mesh__data=2, mesh__fsdp=2)
    assert train.run(config, str(tmp_path / "whole")).finished
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        assert train.run(config, str(stopped)).step == 10
    moved = source.rename(tmp_path / "moved")
    other = replace(open_workdir(str(moved)).read_config(), training__seed=1)
    shutil.copytree(moved, tmp_path / "other")
    open_workdir(str(tmp_path / "other")).write_config(other)
    for name in ("other", "nothing"):
        with pytest.raises(ValueError, match=rf"not the run that .* began from, which is '{source}'") as raised:
            train.run(replace(config, objective__source=str(tmp_path / name)), str(stopped))
        assert len(str(raised.value).splitlines()) == 1
    with monkeypatch.context() as patch:
        stop_after(patch, 15)
        assert train.run(replace(config, objective__source=str(moved)), str(stopped)).step == 15
    shutil.rmtree(moved)
    assert train.run(config, str(stopped)).finished
    resolved = open_workdir(str(stopped)).read_config()
    assert resolved.objective.frozen_heads == 5
    origins = [restored(tmp_path / name, resolved)[1]["origin"] for name in ("stopped", "whole")]
    assert origins[0] == origins[1] and len(origins[0]["sources"]) == 2  # the extended run's data, and its trunk's
    assert_bitwise(restored(stopped, resolved)[0], restored(tmp_path / "whole", resolved)[0])
    assert_bitwise(evaluated(tmp_path / "whole")["embedding"], evaluated(extended)["embedding"])


def test_a_restart_before_the_first_checkpoint_looks_at_its_source_again(base, longer_config, tmp_path):
    """config.json is written, and nothing else; meanwhile the run to extend has become another."""
    source = shutil.copytree(base, tmp_path / "source")
    config = replace(longer_config, objective__source=str(source))
    begun = open_workdir(str(tmp_path / "begun"))
    begun.write_config(replace(config, objective__frozen_heads=2))
    other = open_workdir(str(source)).read_config()
    open_workdir(str(source)).write_config(replace(other, heads__num_heads=3))
    with pytest.raises(ValueError, match="objective.frozen_heads differs"):
        train.run(config, str(begun.path))


def test_an_extended_run_decodes_as_plainly(extended):
    found = generate.run(str(extended), ["the cat sat"], max_new_tokens=12, compare=True)[0]
    assert found.identical
    assert len(found.acceptance.conditional) == 5


def test_a_new_state_is_the_copy(base, longer_config):
    """Before the first step, the state is that of the training-free loop."""
    config = replace(longer_config, objective__frozen_heads=2)
    method = method_on(config, make_mesh(config.mesh))
    state = initial_state(method, make_optimizer(config), evaluated(base))
    whole = method.merge(state.evaluated, state.frozen)
    assert_bitwise(jax.device_get(whole), extend_heads(evaluated(base), 5))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"heads__num_heads": 2}, ["heads.num_heads = 2", "more than the 2 heads"]),
        ({"objective__frozen_heads": 3}, ["objective.frozen_heads = 3", "has 2"]),
        ({"model__width": 48}, ["model.width = 48", "has 32"]),
        ({"heads__pass_normed": False}, ["heads.pass_normed = False", "has True"]),
        ({"objective__source": "/nowhere"}, ["/nowhere", "holds no run"]),
        ({"heads__kind": "recurrent"}, ["heads.kind", "cascade"]),
        ({"objective__detach_teacher": False}, ["objective.detach_teacher", "objective.mode = 'extension'"]),
        ({"objective__source": ""}, ["objective.source", "a workdir"]),
        ({"objective__mode": "joint"}, ["objective.source", "objective.mode = 'joint'"]),
        ({"objective__mode": "loop"}, ["objective.mode = 'loop'", "one of extension, joint"]),
        ({"objective__alpha": (0.1, 0.1)}, ["objective.alpha", "3 (the heads that are trained)"]),
        ({"tokenizer__path": "other.json"}, ["tokenizer.path", "takes the tokenizer of"]),
        ({"tokenizer__end_token": "<end>"}, ["tokenizer.end_token", "has '<|endoftext|>'"]),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_created(longer_config, tmp_path, overrides, words):
    tree = longer_config.to_dict()
    for name, value in overrides.items():
        section, field = name.split("__")
        tree[section][field] = value
    with pytest.raises(ValueError) as raised:
        train.run(type(longer_config).build(tree), str(tmp_path / "new"))
    assert all(word in str(raised.value) for word in words), raised.value
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_what_ends_a_text_is_taken_over(base, longer_config, tmp_path):
    """With the tokenizer, from the run that is extended, unless the new one says otherwise."""
    source, folder = tmp_path / "source", open_workdir(str(tmp_path / "new"))
    shutil.copytree(base, source)
    tree = json.loads((source / "config.json").read_text())
    tree["tokenizer"]["more_end_tokens"] = ["a", "b"]
    (source / "config.json").write_text(json.dumps(tree))
    config = replace(longer_config, objective__source=str(source))
    assert completed(config, folder).tokenizer.more_end_tokens == ("a", "b")
    config = replace(config, tokenizer__more_end_tokens=("c",))
    assert completed(config, folder).tokenizer.more_end_tokens == ("c",)


def test_a_run_without_a_checkpoint_cannot_be_extended(base, longer_config, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(base / name, empty / name)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        train.run(replace(longer_config, objective__source=str(empty)), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    assert json.loads((empty / "config.json").read_text())["heads"]["num_heads"] == 2
