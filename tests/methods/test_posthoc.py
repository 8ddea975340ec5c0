"""Heads on a frozen backbone: what is stored, where the backbone comes from, and what is refused."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpd_jax import evaluate, generate, open_run, train
from mtpd_jax.conversion import from_hf, to_hf
from mtpd_jax.model.layers import apply
from mtpd_jax.runs.checkpoint import restore_parameters
from mtpd_jax.runs.models import OtherBackboneError, RunModel, backbone_digest, open_model
from mtpd_jax.runs.workdir import open_workdir
from mtpd_jax.sharding import data_mesh
from tests.builders import (
    assert_trees_close,
    method_on,
    model_and_parameters,
    replace,
    tiny_config,
)
from tests.interop.folders import retensor
from tests.runs.runs import assert_bitwise, lines, restored, stop_after


@pytest.fixture(scope="module")
def base_config(text_file):
    return tiny_config(
        data__source="text", data__paths=(text_file,), model__context=64, model__scale_embedding=False,
        training__steps=10, heads__num_heads=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(base_config, tmp_path_factory):
    """A backbone without heads."""
    workdir = tmp_path_factory.mktemp("posthoc") / "base"
    train.run(base_config, str(workdir))
    return workdir


@pytest.fixture(scope="module")
def config(base, text_file):
    """Ten steps of two recurrent heads with one cache; of the model nothing is said."""
    fields = {"vocabulary_size": 32_768, "width": 768, "layers": 12, "query_heads": 12, "kv_heads": 4, "head_size": 64,
              "mlp_width": 2048, "dtype": "auto"}  # fmt: skip
    return tiny_config(
        objective__mode="posthoc", objective__source=str(base), data__source="text", data__paths=(text_file,),
        training__steps=10, evaluation__every_steps=5, evaluation__prompts=6, heads__kind="recurrent",
        heads__cache="shared", **{f"model__{name}": value for name, value in fields.items()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def heads(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("posthoc") / "heads"
    assert train.run(config, str(workdir)).finished
    return workdir


def parameters_of(path):
    return jax.device_get(open_model(str(path)).read(data_mesh(jax.devices()[:1])).parameters)


def bytes_in(folder):
    return sum(path.stat().st_size for path in pathlib.Path(folder).rglob("*") if path.is_file())


def test_the_model_is_the_backbones_and_stays_bit_for_bit(base, heads):
    """In memory and on disk, where only the heads are, and the backbone's digest."""
    before, after = parameters_of(base), parameters_of(heads)
    assert_bitwise({**after, "heads": 0}, {**before, "heads": 0})
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(after["heads"]["head"]["block"]["attention"]["out"]))
    folder = open_workdir(str(heads))
    stored, model = folder.read_config(), open_workdir(str(base)).read_config().model
    assert stored.model == dataclasses.replace(model, dtype="auto")
    step = max((heads / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert {item.name for item in step.iterdir() if item.is_dir()} == {"parameters", "optimizer", "progress"}
    (trained, frozen), record = restore_parameters(folder, method_on(stored)).tree, restored(heads, stored)[1]
    assert set(trained) == {"heads"} and frozen is None
    assert set(record["origin"]["backbone"]) == {"path", "step", "digest"}
    assert not any("backbone" in name or name == "embedding" for name in record["digests"])


def test_a_digest_knows_every_bit_but_those_of_heads():
    _, parameters = model_and_parameters(tiny_config())
    digest = backbone_digest(parameters)
    assert backbone_digest({**parameters, "heads": jax.tree.map(lambda leaf: leaf + 1, parameters["heads"])}) == digest
    for path in ("embedding", "backbone"):
        leaves, structure = jax.tree.flatten(parameters[path])
        for number, leaf in enumerate(leaves):
            other = leaf.at[(0,) * leaf.ndim].set(jnp.nextafter(leaf[(0,) * leaf.ndim], jnp.inf))
            changed = structure.unflatten([*leaves[:number], other, *leaves[number + 1 :]])
            assert backbone_digest({**parameters, path: changed}) != digest


def test_its_greedy_text_is_the_backbones(base, heads):
    found = generate.run(str(heads), ["the cat sat"], max_new_tokens=12, compare=True)[0]
    plain = generate.run(str(base), ["the cat sat"], max_new_tokens=12)[0]
    assert found.identical and found.tokens == plain.tokens and len(found.acceptance.conditional) == 2


@pytest.mark.slow
def test_another_backbone_is_refused_and_a_moved_one_is_named(base, base_config, heads, tmp_path, capsys):
    """By its bits: not by its name, nor by its config."""
    moved = shutil.copytree(base, tmp_path / "moved")
    mine = shutil.copytree(heads, tmp_path / "heads")
    record = json.loads((mine / "config.json").read_text())
    assert record["objective"]["source"] == str(base)
    other = tmp_path / "other"
    train.run(replace(base_config, training__seed=1), str(other))
    small = tmp_path / "small"
    train.run(replace(base_config, model__width=16, training__steps=2, optimizer__warmup_steps=1), str(small))
    first = generate.run(str(mine), ["the cat"], max_new_tokens=8)[0]
    assert generate.run(str(mine), ["the cat"], max_new_tokens=8, backbone=str(moved))[0].tokens == first.tokens
    with pytest.raises(OtherBackboneError, match=r"other: not the backbone .*--other_backbone"):
        open_run(str(mine), backbone=str(other))
    with pytest.raises(OtherBackboneError, match="of another shape"):
        open_run(str(mine), backbone=str(small), other_backbone=True)
    with pytest.raises(ValueError, match="nowhere: the backbone .* name that folder with --backbone") as raised:
        open_run(str(mine), backbone=str(tmp_path / "nowhere"))
    assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(ValueError, match="expected neither, for .* has its own"):
        open_run(str(base), backbone=str(moved))
    capsys.readouterr()
    open_run(str(mine), backbone=str(moved), other_backbone=True)  # which it is not
    assert not capsys.readouterr().err
    fitted = open_run(str(mine), backbone=str(other), other_backbone=True)
    assert "heads 1 to 2 choose the token that it chooses in" in capsys.readouterr().err
    assert_bitwise({**fitted.parameters, "heads": 0}, {**parameters_of(other), "heads": 0})
    assert_bitwise(fitted.parameters["heads"], parameters_of(heads)["heads"])
    to_hf(str(mine), str(tmp_path / "x"), format="backbone", backbone=str(other), other_backbone=True, dry_run=True)
    assert "heads 1 to 2 choose the token that it chooses in" in capsys.readouterr().err


def test_a_backbone_whose_bits_changed_is_refused(base, config, heads, tmp_path):
    """As where its run was trained on: the checkpoint that the heads know is gone."""
    changed = tmp_path / "base"
    shutil.copytree(base, changed)
    train.run(replace(open_workdir(str(base)).read_config(), training__steps=12, checkpoint__keep=1), str(changed))
    with pytest.raises(OtherBackboneError, match="not the backbone that the heads were trained on"):
        open_run(str(heads), backbone=str(changed))


@pytest.mark.slow
@pytest.mark.optimised
def test_a_run_is_resumed_bit_for_bit_wherever_its_backbone_lies(base, config, heads, tmp_path, monkeypatch):
    source = shutil.copytree(base, tmp_path / "source")
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert train.run(replace(config, objective__source=str(source)), str(stopped)).step == 5
    moved = source.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="not the run that .* began from"):
        train.run(replace(config, objective__source=str(tmp_path / "nothing")), str(stopped))
    assert train.run(replace(config, objective__source=str(moved)), str(stopped)).finished
    mine = open_workdir(str(heads)).read_config()
    trees = [restored(path, open_workdir(str(path)).read_config())[0] for path in (stopped, heads)]
    assert trees[0].frozen is None and mine.objective.mode == "posthoc"
    assert_bitwise(*trees)
    assert open_run(str(stopped)).step == open_run(str(heads)).step  # and it says so from here on


@pytest.mark.slow
def test_a_second_stage_finds_a_backbone_that_was_moved(base, config, tmp_path):
    """Where it is named; the run that it starts from knows only where that lay."""
    source = shutil.copytree(base, tmp_path / "source")
    first = replace(config, objective__source=str(source), training__steps=2, optimizer__warmup_steps=1)
    assert train.run(first, str(tmp_path / "first")).finished
    moved = str(source.rename(tmp_path / "moved"))
    second = replace(first, objective__source=str(tmp_path / "first"), objective__initial_heads="source")
    with pytest.raises(ValueError, match="where it lies elsewhere, name that folder with --backbone"):
        train.run(second, str(tmp_path / "second"))
    assert not (tmp_path / "second").exists()
    assert train.run(second, str(tmp_path / "second"), backbone=moved).finished
    assert open_run(str(tmp_path / "second")).step == 2
    with pytest.raises(ValueError, match="expected neither, for .* has its own backbone"):
        open_run(str(base), other_backbone=True)
    with pytest.raises(ValueError, match="expected neither, for .* has its own backbone"):
        train.run(replace(first, objective__source=str(base)), str(tmp_path / "third"), backbone=moved)


# Where it comes from.


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """The backbone as a folder of Hugging Face's libraries."""
    path = tmp_path_factory.mktemp("folders") / "backbone"
    to_hf(str(base), str(path), format="backbone")
    return path


@pytest.mark.slow
@pytest.mark.optimised
def test_a_folder_serves_as_its_import_does(folder, config, tmp_path):
    """Bit for bit: the same heads, from the folder and from the run that it was imported as; what says how the
    tokenizer is used comes along."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    from_hf(str(folder), str(tmp_path / "imported"))
    found = []
    for source in (folder, tmp_path / "imported"):
        workdir = tmp_path / f"on_{source.name}"
        assert train.run(replace(config, objective__source=str(source)), str(workdir)).finished
        assert open_run(str(workdir)).template is not None
        found.append(parameters_of(workdir))
        assert RunModel(open_workdir(str(workdir))).config.context == 64
    assert_bitwise(*found)


@pytest.mark.slow
def test_what_an_import_would_say_of_a_folder_is_said(folder, config, tmp_path, capsys):
    odd = shutil.copytree(folder, tmp_path / "odd")
    settings = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**settings, "attention_sinks": 4}))
    assert train.run(replace(config, objective__source=str(odd), training__steps=2, optimizer__warmup_steps=1),
                     str(tmp_path / "run")).finished  # fmt: skip
    said = capsys.readouterr().err
    assert "settings that are not known here, taken to change nothing: attention_sinks" in said
    for more in ({"objective__source_checkpoint": "newest"}, {}):
        with pytest.raises(ValueError, match="expected neither a checkpoint nor a backbone"):
            where = {} if more else {"backbone": str(folder)}
            train.run(replace(config, objective__source=str(odd), **more), str(tmp_path / "other"), **where)


@pytest.mark.slow
def test_a_backbone_stays_in_the_numbers_that_it_is_stored_in(folder, config, tmp_path):
    """bfloat16, in memory and in what decoding is held to; the heads are float32."""
    half = shutil.copytree(folder, tmp_path / "half")

    def to_bfloat16(tensors):
        tensors.update({name: np.asarray(value, jnp.bfloat16) for name, value in tensors.items()})

    retensor(half, to_bfloat16)
    workdir = tmp_path / "run"
    assert train.run(replace(config, objective__source=str(half)), str(workdir)).finished
    parameters = parameters_of(workdir)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(parameters["heads"])} == {"float32"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves({**parameters, "heads": {}})} == {"bfloat16"}
    assert open_workdir(str(workdir)).read_config().model.weights == "bfloat16"


@pytest.mark.slow
def test_a_second_stage_begins_with_the_firsts_heads(base, config, heads, tmp_path):
    """And knows the backbone itself, so that the first may be deleted."""
    first = shutil.copytree(heads, tmp_path / "first")
    second = replace(config, objective__source=str(first), objective__initial_heads="source", training__steps=5,
                     optimizer__learning_rate=1e-30, optimizer__weight_decay=0.0)  # fmt: skip
    assert train.run(second, str(tmp_path / "second")).finished
    assert_trees_close(parameters_of(tmp_path / "second")["heads"], parameters_of(heads)["heads"], 1e-6)
    shutil.rmtree(first)
    assert open_run(str(tmp_path / "second")).step == 5
    record = restored(tmp_path / "second", open_workdir(str(tmp_path / "second")).read_config())[1]
    assert record["origin"]["backbone"]["path"] == str(base) and len(record["origin"]["sources"]) == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model__width": 48}, ["model.width = 48", "has 32; leave it out"]),
        ({"training__sequence_length": 128}, ["training.sequence_length = 128", "at most 64"]),
        ({"objective__source": "/nowhere"}, ["/nowhere", "holds no run"]),
        ({"objective__source": ""}, ["objective.source", "a workdir, or a folder"]),
        ({"objective__initial_heads": "source"}, ["heads.num_heads = 2", "0, with objective.initial_heads"]),
        ({"heads__num_heads": 0}, ["heads.num_heads = 0", "at least one"]),
        ({"objective__alpha": 0.0, "objective__beta": 0.0}, ["objective.beta = 0.0", "something to learn"]),
        ({"heads__kind": "cascade"}, ["heads.cache = 'shared'", "per_depth"]),
        ({"heads__weights": "bfloat16"}, ["heads.weights", "float32, for it is trained"]),
        ({"data__validation_fraction": 0.4}, ["validation_fraction = 0.4", "at most 0.2"]),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_created(config, tmp_path, overrides, words):
    tree = config.to_dict()
    for name, value in overrides.items():
        section, field = name.split("__")
        tree[section][field] = value
    with pytest.raises(ValueError) as raised:
        train.run(type(config).build(tree), str(tmp_path / "new"))
    assert all(word in str(raised.value) for word in words), raised.value
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_what_is_exported_has_no_heads_that_nobody_else_can_run(heads, tmp_path):
    """A shared cache is no cascade: the formats of others refuse it, and the backbone alone is written."""
    with pytest.raises(ValueError, match=r"heads.cache = 'shared'"):
        to_hf(str(heads), str(tmp_path / "hf"))
    to_hf(str(heads), str(tmp_path / "backbone"), format="backbone")
    assert "heads" not in parameters_of(tmp_path / "backbone")


@pytest.mark.slow
def test_scores_are_those_of_the_whole_model(heads):
    """Teacher-forced scores take the chains of every position; agreement on its own text the decoder's network."""
    run = open_run(str(heads))
    scored = run.score(["the cat sat on a mat and saw one more big dog"])[0]
    tokens = jnp.asarray(run.tokenizer.encode_document("the cat sat on a mat and saw one more big dog"))[None]
    hidden = apply(run.trained.model, run.parameters, tokens, jnp.ones_like(tokens), jnp.arange(tokens.shape[1])[None])
    logits = jnp.einsum("kbtd,vd->kbtv", hidden.heads, run.parameters["embedding"])
    ce = -jax.nn.log_softmax(logits)[1, 0, jnp.arange(tokens.shape[1] - 3), tokens[0, 3:]]
    np.testing.assert_allclose(scored.ce[2, 2:], ce, rtol=1e-4, atol=1e-4)
    report = evaluate.run(str(heads), split_name="validation", limit=3)
    assert len(report.text["validation"].heads) == 2
    assert "head_1/kl" in lines(heads)[0]
