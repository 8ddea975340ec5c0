"""What cannot fit is refused with both numbers before anything is created; what takes years is said."""

import jax
import pytest

from mtpd_jax import train
from mtpd_jax.config import MeshConfig
from mtpd_jax.model.backbone import count_parameters
from mtpd_jax.platform import PEAK_FLOPS
from mtpd_jax.sharding import make_mesh
from mtpd_jax.training import feasibility
from mtpd_jax.training.feasibility import check_decoding, check_scoring, check_training, host_memory
from mtpd_jax.training.optimizer import make_optimizer
from mtpd_jax.training.state import abstract_state
from tests.builders import method_on, replace, tiny_config

GIB = 2**30


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(1, 1, 1, 1))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model__tied_unembedding": False, "model__qkv_bias": True},
        {"heads__num_heads": 0},
        {"heads__kind": "recurrent", "heads__num_heads": 4},
        {
            "objective__mode": "extension",
            "objective__source": "x",
            "objective__frozen_heads": 2,
            "heads__num_heads": 5,
        },
    ],
    ids=str,
)
def test_parameters_are_counted_without_making_any(fields, mesh):
    """A lower bound, and no more under the truth than norms and biases, which are vectors."""
    config = tiny_config(**fields)
    method = method_on(config, mesh)
    abstract = abstract_state(method, make_optimizer(config))
    found = [count_parameters(part) for part in (abstract.parameters, abstract.frozen)]
    vectors = [
        sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(part)
            if {"scale", "bias"} & {getattr(key, "key", None) for key in path})
        for part in (abstract.parameters, abstract.frozen)
    ]  # fmt: skip
    assert [whole - few for whole, few in zip(found, vectors, strict=True)] == [
        method.costs().trained,
        method.costs().frozen,
    ]


@pytest.mark.parametrize(
    ("fields", "bytes_per_number"),
    [
        ({"model__width": 10**10}, 12),
        ({"model__width": 10**400}, None),
        ({"model__vocabulary_size": 10**9, "model__width": 64}, 12),
        ({"model__vocabulary_size": 10**9, "model__width": 64, "optimizer__ema_decay": 0.9}, 16),
        ({"model__layers": 10**9}, 12),
        ({"heads__num_heads": 10**8, "training__sequence_length": 10**8 + 2}, 12),
    ],
    ids=str,
)
def test_a_state_that_fits_nowhere_is_refused(fields, bytes_per_number, mesh):
    config = tiny_config(**fields)
    with pytest.raises(ValueError, match=r"needs more than [\d,.]+ GiB of memory, and there are [\d,.]+ GiB") as error:
        check_training(method_on(config, mesh))
    if bytes_per_number is None:
        return  # a number that no float can hold is a number
    named = float(str(error.value).split("than ")[1].split()[0].replace(",", ""))
    assert named * GIB >= bytes_per_number * method_on(config, mesh).costs().trained * 0.99


@pytest.mark.parametrize(
    "fields",
    [
        {"training__sequence_length": 10**9},
        {"training__batch_size": 10**9},
        {"training__batch_size": 10**9, "training__micro_batches": 10**9},
        {"data__shuffle_window": 10**12},
    ],
    ids=str,
)
def test_batches_that_fit_nowhere_are_refused(fields, mesh):
    with pytest.raises(ValueError, match="GiB of memory"):
        check_training(method_on(tiny_config(**fields), mesh))


def test_what_fits_is_not_refused(mesh, monkeypatch):
    """Split over devices, a state needs as much less; the limit is a device's own where it tells one."""
    config = tiny_config(model__vocabulary_size=1 << 20, training__batch_size=8)
    needed = 12 * method_on(config, mesh).costs().trained
    monkeypatch.setattr(feasibility, "host_memory", lambda: needed)
    with pytest.raises(ValueError, match="training on"):
        check_training(method_on(config, mesh))
    monkeypatch.setattr(feasibility, "device_memory", lambda *_: needed // 2)
    with pytest.raises(ValueError, match="training on"):
        check_training(method_on(config, mesh))
    assert check_training(method_on(config, make_mesh(MeshConfig(1, 4, 1, 1)))) == ""


def test_memory_is_that_of_the_container(monkeypatch, tmp_path):
    machine = host_memory()
    assert GIB < machine < 2**45
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(feasibility, "_LIMITS", (str(limit),))
    for text, expected in (("max\n", None), ("1048576\n", 1048576), (str(2**60), None)):
        limit.write_text(text)
        assert host_memory() == (expected or host_memory())
        assert (host_memory() == 1048576) == (expected is not None)


def test_decoding_and_scoring_that_fit_nowhere_are_refused():
    model, mesh = tiny_config().model, make_mesh(MeshConfig(1, 1, 1, 1))
    check_decoding(model, 4, 4, 64, 1024, mesh)
    for drafts, rows, tokens in ((10**6, 1, 64), (2, 10**9, 64), (2, 1, 10**12)):
        with pytest.raises(ValueError, match="decoding needs more than"):
            check_decoding(model, drafts, drafts, rows, tokens, mesh)
    check_scoring(64, 32)
    with pytest.raises(ValueError, match="a batch of text needs more than"):
        check_scoring(10**9, 32)


def test_absurd_time_is_said(mesh, monkeypatch):
    assert check_training(method_on(tiny_config(training__steps=10**5), mesh)) == ""
    found = check_training(method_on(tiny_config(training__steps=2**31 - 1, training__batch_size=8 * 10**4), mesh))
    assert found.startswith("2,147,483,647 steps take these devices at least ") and found.endswith(" years")
    with pytest.raises(ValueError, match=r"steps = 10{30}: expected less than 2\*\*31"):
        tiny_config(training__steps=10**30)
    monkeypatch.setitem(PEAK_FLOPS, mesh.devices.flat[0].device_kind, 1.0)
    monkeypatch.setattr(feasibility, "_CORE_FLOPS", 1.0)
    assert "years" in check_training(method_on(tiny_config(training__steps=10**5), mesh))


def test_nothing_is_created(text_file, tmp_path):
    for fields in ({"model__width": 10**10}, {"training__sequence_length": 10**9}, {"training__batch_size": 8 * 10**9}):
        config = replace(tiny_config(data__source="text", data__paths=(text_file,)), **fields)
        with pytest.raises(ValueError, match="GiB"):
            train.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
