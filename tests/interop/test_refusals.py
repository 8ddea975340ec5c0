"""Formats that cannot hold a model say why; and what cannot be one of ours is not taken for it."""

import numpy as np
import pytest
import safetensors.numpy

from mtpd_jax.interop.formats import FORMATS, written_as
from mtpd_jax.interop.reading import look, read_parameters
from mtpd_jax.interop.writing import plan
from tests.interop.folders import retensor
from tests.interop.peers import export, random_run, tiny

CASES = {
    "no heads": ({"heads__num_heads": 0}, "glm4_moe", "the run has no heads; --format=backbone"),
    "un-normed states": (
        {"heads__num_heads": 2, "heads__pass_normed": False}, "hf", "others hand the normed state from head to head",
    ),
    "two heads": ({"heads__num_heads": 2}, "mellum", "Mellum wants one head"),
    "no norms": ({"heads__num_heads": 1, "model__qk_norm": False}, "exaone_moe", "norms of queries and keys"),
    "biases": ({"heads__num_heads": 1, "model__qkv_bias": True}, "mellum", "and a model without biases"),
    "biases in a width that does not divide": (
        {"heads__num_heads": 1, "model__qk_norm": False, "model__qkv_bias": True, "model__width": 34}, "hf",
        "Llama wants a width that is a multiple",
    ),
    "a layer not of eights": ({"heads__num_heads": 1, "model__mlp_width": 36}, "glm4_moe", "a multiple of 8"),
    "an unknown format": ({"heads__num_heads": 1}, "onnx", "expected one of hf, backbone"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_format_that_cannot_hold_a_model_says_why(name):
    overrides, format, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        written_as(tiny(**overrides), format)


def test_a_run_without_heads_is_its_backbone():
    config = tiny(heads__num_heads=0)
    assert plan(config, "hf").shards == plan(config, "backbone").shards
    heads = plan(tiny(heads__num_heads=2), "backbone")
    assert heads.shards == plan(config, "hf").shards and heads.notes[-1] == "2 heads are left out"
    assert set(FORMATS) == {"hf", "backbone", "glm4_moe", "exaone_moe", "mellum"}


def test_a_shared_head_needs_copies_that_are_the_same(tmp_path):
    config = tiny(heads__num_heads=3, heads__kind="recurrent")
    export(config, random_run(config)[1], "hf", tmp_path / "out")
    one = "model.layers.3.mlp.down_proj.weight"
    retensor(tmp_path / "out", lambda tensors: tensors.update({one: tensors[one] + 1}))
    with pytest.raises(
        ValueError, match=r"model.layers.3.mlp.down_proj.weight: expected the same as of the head before"
    ):
        read_parameters(look(tmp_path / "out"), lambda: None)


def test_files_are_cut_where_they_would_be_too_large(tmp_path, monkeypatch):
    """Shards with an index, each tensor in one of them, which are read back as one."""
    from mtpd_jax.interop import writing

    monkeypatch.setattr(writing, "_SHARD_BYTES", 20_000)
    config = tiny(heads__num_heads=2)
    planned = export(config, random_run(config)[1], "hf", tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == len(planned.shards) > 3
    assert all(sum(value.nbytes for value in safetensors.numpy.load_file(file).values()) <= 41_000 for file in files)
    found = read_parameters(look(tmp_path / "out"), lambda: None)
    expected = random_run(config)[1]
    assert np.array_equal(
        found["heads"]["head"]["projection"]["kernel"], expected["heads"]["head"]["projection"]["kernel"]
    )
