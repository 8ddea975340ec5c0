"""Every bad value is refused with its name."""

import dataclasses
import json
import pathlib

import pytest

from configs import base
from mtpd_jax.config import Config, ObjectiveConfig, differences
from mtpd_jax.editing import change, fit_cases
from mtpd_jax.fields import Section, field, flat, read_section
from mtpd_jax.methods.joint import JointConfig
from tests.builders import replace, tiny_config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.source", "http"),
        ("data.validation_fraction", 1.0),
        ("data.validation_fraction", -0.1),
        ("data.packages", 3),
        ("data.paths", ("a",)),
        ("objective.source", "somewhere"),
        ("objective.frozen_heads", 2),
        ("model.attention", "flash"),
        ("model.vocabulary_size", 100),
        ("model.head_size", 7),
        ("model.dtype", "float16"),
        ("model.layers", 0),
        ("model.layers", 2.5),
        ("model.remat", "yes"),
        ("heads.kind", "medusa"),
        ("heads.num_heads", -1),
        ("objective.alpha", -0.1),
        ("objective.alpha", (0.1,)),
        ("objective.beta", float("nan")),
        ("objective.temperature", 0.0),
        ("objective.top_n", 0),
        ("optimizer.learning_rate", float("inf")),
        ("optimizer.schedule", "step"),
        ("optimizer.b2", 1.0),
        ("optimizer.warmup_steps", 100),
        ("training.micro_batches", 3),
        ("training.sequence_length", 3),
        ("mesh.expert", 2),
        ("training.seed", 2**32),
        ("training.steps", 2**31),
    ],
)
def test_bad_values_are_named(field, value):
    section, name = field.split(".")
    with pytest.raises(ValueError, match=rf"config\.{section}\.{name}"):
        tree = tiny_config().to_dict()
        tree[section][name] = value
        Config.build(tree)


def test_what_is_left_out_has_its_default_and_what_is_unknown_is_named():
    tree = base.get_config().to_dict()
    assert Config.build({}) == Config.build(tree)
    del tree["model"]["width"]
    assert Config.build(tree).model.width == 768
    tree["model"]["depth"] = 3
    with pytest.raises(ValueError, match=r"config\.model\.depth: no such field; fields of config.model are vocab"):
        Config.build(tree)
    with pytest.raises(ValueError, match=r"config\.modle: no such field; fields of config are data, tokenizer"):
        Config.build({"modle": {}})
    with pytest.raises(ValueError, match=r"config\.model = 3: expected a section"):
        Config.build({"model": 3})


def test_the_fields_of_a_section_depend_on_its_case():
    """Those of another case are refused by name, unless they say nothing."""
    text = Config.build({"data": {"source": "text", "paths": ["a"], "packages": True}})
    assert text.data.source == "text" and text.data.paths == ("a",) and not hasattr(text.data, "packages")
    with pytest.raises(ValueError, match=r"packages = False: .* data.source = 'text': only 'python' reads it"):
        Config.build({"data": {"source": "text", "paths": ["a"], "packages": False}})
    with pytest.raises(ValueError, match=r"data.field = 'x': .* 'jsonl' or 'tfds' reads it"):
        Config.build({"data": {"source": "text", "paths": ["a"], "field": "x"}})
    with pytest.raises(ValueError, match=r"objective.mode = 'loop': expected one of "):
        Config.build({"objective": {"mode": "loop"}})


def test_a_config_that_is_edited_has_the_fields_of_its_cases():
    tree = base.get_config()
    tree.data.update(packages=False)
    change(tree, {"data.source": "jsonl", "data.paths": ("a",), "objective.mode": "extension"})
    assert "packages" not in tree.data and tree.data.field == "text" and tree.data.validation_fraction == 0.02
    assert tree.objective.frozen_heads is None and "detach_trunk" not in tree.objective
    with pytest.raises(TypeError):  # None stands for an integer
        tree.objective.frozen_heads = "three"
    tree.objective.frozen_heads = 3
    with pytest.raises(ValueError, match=r"config.objective.detach_trunk: no such field"):
        change(tree, {"objective.detach_trunk": True})
    # A file that says the case after its fields, as short diffs do.
    tree = base.get_config()
    tree.objective.update(mode="extension", source="x")
    fit_cases(tree, {})
    assert Config.of(tree).objective.source_run == "x" and "detach_trunk" not in tree.objective


def test_cases_are_registered_once_and_only_where_there_are_cases():
    with pytest.raises(TypeError, match="'joint' is taken"):

        class Again(ObjectiveConfig, case="joint"):
            pass

    with pytest.raises(TypeError, match="'b' is taken, or of a section that has no cases"):

        class Lost(Section, case="b"):
            pass

    assert Config.build({}).objective == JointConfig()


def test_tuples_are_checked_element_by_element_or_as_a_whole():
    assert Config.build({"heads": {"num_heads": 0}, "objective": {"alpha": []}}).objective.alpha == ()
    with pytest.raises(ValueError, match=r"objective.alpha = \(\): expected one number or 4"):
        Config.build({"objective": {"alpha": []}})
    with pytest.raises(ValueError, match=r"objective.beta = \(1.0, -1.0\): expected a finite number, zero or more"):
        Config.build({"heads": {"num_heads": 2}, "objective": {"beta": [1, -1]}})
    with pytest.raises(ValueError, match=r"data.paths = \(\): expected at least one file"):
        Config.build({"data": {"source": "text"}})


@pytest.mark.parametrize("stored", [[1], None, 3, "x", {}, {"model": 3}, {"init": {"workdir": "x"}}])
def test_what_is_no_stored_config_is_refused(stored):
    with pytest.raises(ValueError, match="config"):
        Config.stored(stored)


STORED = pathlib.Path(__file__).parent / "stored_configs"


@pytest.mark.parametrize("path", sorted(STORED.glob("*.json")), ids=lambda path: path.stem)
def test_configs_that_earlier_versions_stored_are_read(path):
    """Fields that are new mean what the run did; those that moved are found; none is lost, and no other is let in."""
    tree = json.loads(path.read_text())
    config = Config.stored(tree)
    found = dict(flat(config.to_dict()))
    moved = {"init.workdir": "objective.source", "init.num_heads": "objective.frozen_heads"}
    for name, value in flat(tree):
        name, value = moved.get(name, name), "extension" if value == "loop" else value
        if name in found:
            assert found[name] == (tuple(value) if isinstance(value, list) else value), name
    of_other_cases = {"packages", "paths", "separator", "field", "name", "split", "directory"}
    of_other_cases |= {"source", "frozen_heads", "detach_teacher", "detach_trunk"}
    lost = {moved.get(name, name) for name, _ in flat(tree)} - found.keys()
    assert {name.partition(".")[2] for name in lost} <= of_other_cases
    assert Config.stored(config.to_dict()) == config
    for section, name in (("model", "width"), ("objective", "mode"), ("training", None)):
        less = json.loads(path.read_text())
        del (less[section] if name else less)[name or section]
        with pytest.raises(ValueError, match=f"config.{section}{'.' + name if name else ''} is missing"):
            Config.stored(less)
        more = json.loads(path.read_text())
        more[section]["depth"] = 3
        with pytest.raises(ValueError, match=rf"config\.{section}\.depth: no such field"):
            Config.stored(more)


def test_a_stored_config_says_where_it_starts_from_once():
    tree = Config.build({"objective": {"mode": "extension", "source": "a"}}).to_dict()
    assert Config.stored(tree).objective.source_run == "a"
    with pytest.raises(ValueError, match=r"init.workdir: is there as config.objective.source, too"):
        Config.stored({**tree, "init": {"workdir": "b", "num_heads": 2}})
    old = json.loads((STORED / "extension.json").read_text())
    assert Config.stored(old).model.attention == "dense"  # whatever the default is now


def test_a_field_that_is_not_stored_means_what_was_done_before():
    """Whatever its default is now."""

    @dataclasses.dataclass(frozen=True)
    class Later(Section):
        old: int = field(1)
        new: str = field("faster", as_before="as it was")

    assert read_section(Later, {"old": 3}, "config.later", stored=True) == Later(3, "as it was")
    assert read_section(Later, {"old": 3}, "config.later", stored=False) == Later(3, "faster")
    assert read_section(Later, {"old": 3, "new": "x"}, "config.later", stored=True) == Later(3, "x")
    with pytest.raises(ValueError, match=r"config\.later\.old is missing"):
        read_section(Later, {"new": "x"}, "config.later", stored=True)


def test_a_config_is_taken_in_any_form():
    tree = base.get_config()
    assert Config.of(tree) == Config.of(tree.to_dict()) == Config.of(Config.build(tree.to_dict()))
    for value in (None, 3, "configs/base.py", [tree]):
        with pytest.raises(ValueError, match="expected a Config, a ConfigDict, or a nested mapping"):
            Config.of(value)
    replaced = dataclasses.replace(Config.of(tree), training=dataclasses.replace(Config.of(tree).training, steps=0))
    with pytest.raises(ValueError, match=r"training\.steps = 0"):
        Config.of(replaced)


def test_json_round_trip_changes_nothing():
    config = tiny_config(objective__beta=(0.1, 0.2))
    assert Config.build(json.loads(json.dumps(config.to_dict()))) == config


def test_differences_leave_out_what_a_resume_may_change():
    config = tiny_config()
    assert differences(config, replace(config, training__steps=99, logging__every_steps=1, mesh__data=4)) == []
    assert differences(config, replace(config, model__attention="dense")) == []  # which rounds, as another mesh does
    texts = [replace(config, data__source="text", data__paths=(name,)) for name in "ab"]
    assert differences(*texts) == []  # a digest tells them
    assert {"data.source", "data.packages"} <= set(differences(config, texts[0]))
    assert differences(config, replace(config, training__seed=1, objective__top_n=3)) == [
        "objective.top_n",
        "training.seed",
    ]
