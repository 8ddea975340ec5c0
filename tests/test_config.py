"""Every bad value is refused with its name."""

import dataclasses

import pytest

from configs import base
from mtpd_jax.config import Config, differences
from tests.builders import replace, tiny_config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.source", "http"),
        ("data.validation_fraction", 1.0),
        ("data.validation_fraction", -0.1),
        ("data.paths", 3),
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


def test_missing_and_unknown_fields_are_named():
    tree = base.get_config().to_dict()
    del tree["model"]["width"]
    with pytest.raises(ValueError, match=r"config\.model\.width is missing"):
        Config.build(tree)
    tree["model"]["width"], tree["model"]["depth"] = 8, 3
    with pytest.raises(ValueError, match=r"config\.model\.depth: no such field"):
        Config.build(tree)


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
    import json

    config = tiny_config(objective__beta=(0.1, 0.2))
    assert Config.build(json.loads(json.dumps(config.to_dict()))) == config


def test_differences_leave_out_what_a_resume_may_change():
    config = tiny_config()
    assert differences(config, replace(config, training__steps=99, logging__every_steps=1, mesh__data=4)) == []
    assert differences(config, replace(config, data__paths=("b",))) == []  # a digest tells them
    assert differences(config, replace(config, training__seed=1, objective__top_n=3)) == [
        "objective.top_n",
        "training.seed",
    ]
