"""What a run writes while it trains: names, and figures that are what their names say."""

import importlib.util
import json
import shutil
import struct
import sys

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from mtpd_jax import train
from mtpd_jax import trainer as trainer_module
from mtpd_jax.config import MeshConfig
from mtpd_jax.platform import PEAK_FLOPS
from mtpd_jax.runs import metrics as metrics_module
from mtpd_jax.runs.lock import take_lock
from mtpd_jax.runs.metrics import MetricsLog
from mtpd_jax.runs.workdir import open_workdir
from mtpd_jax.sharding import make_mesh
from tests.builders import method_on, replace, tiny_config
from tests.runs.runs import lines, restored


@pytest.fixture(scope="module")
def run_config(text_file):
    return tiny_config(data__source="text", data__paths=(text_file,))


@pytest.fixture(scope="module")
def whole_run(run_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("metrics") / "run"
    train.run(run_config, str(workdir))
    return workdir


def test_metrics_have_the_documented_names(whole_run):
    training = [line for line in lines(whole_run) if "loss" in line]
    evaluation = [line for line in lines(whole_run) if "eval/main/ce" in line]
    assert [line["step"] for line in lines(whole_run)] == [5, 10, 15, 20]  # one object per step
    assert len(training) == 4
    assert [line["step"] for line in evaluation] == [10, 20]
    heads = {f"head_{k}/{name}" for k in (1, 2) for name in ("ce", "kl", "agreement")}
    assert heads | {"main/ce", "tokens", "learning_rate", "grad_norm", "tokens_per_second", "mfu"} <= set(training[0])
    assert {f"eval/{name}" for name in heads} | {"eval/main/bits_per_byte"} <= set(evaluation[0])
    assert training[-1]["tokens"] == 20 * 8 * 32  # cumulative; no padding in this stream
    assert training[-1]["mfu"] is None  # the peak of a CPU is not known
    assert training[0]["loss"] > training[-1]["loss"]
    assert all(line["tokens_per_second"] > 0 for line in training)
    assert list((whole_run / "tb").glob("events*"))


@pytest.mark.parametrize("beta", [pytest.param(0.0, marks=pytest.mark.slow), (0.0, 0.5)], ids=str)
def test_a_head_without_a_kl_in_its_loss_reports_none(run_config, tmp_path, beta):
    train.run(replace(run_config, objective__beta=beta, training__steps=5), str(tmp_path))
    (line,) = lines(tmp_path)
    assert line["head_1/kl"] is None and line["head_1/agreement"] is not None
    assert (line["head_2/kl"] is None) == (beta == 0.0)
    assert line["eval/head_1/kl"] > 0 and line["eval/head_2/kl"] > 0


def test_the_learning_rate_is_that_of_the_step(run_config, tmp_path):
    """Adam's first step moves what is not decayed by the learning rate itself, whatever the gradient."""
    config = replace(run_config, training__steps=3, logging__every_steps=1, checkpoint__every_steps=1)
    config = replace(config, checkpoint__keep=3)
    train.run(config, str(tmp_path))
    first = restored(tmp_path, config, step=1)[0].parameters["backbone"]["final_norm"]["scale"]
    moved = np.abs(first - 1).max()  # norm scales begin at one
    rates = [line["learning_rate"] for line in lines(tmp_path)]
    assert rates[0] == pytest.approx(moved, rel=1e-2)
    assert rates[:2] == pytest.approx([1.5e-3, 3e-3])  # two steps of warm-up, to the peak


def test_utilisation_is_of_the_devices_in_use(monkeypatch):
    """Two of eight devices at half their peak, whatever the other six do."""
    monkeypatch.setitem(PEAK_FLOPS, "cpu", 1e12)
    config = tiny_config()
    for devices in (1, 2):
        method = method_on(config, make_mesh(MeshConfig(devices, 1, 1, 1)))
        rate = 0.5 * devices * 1e12 / method.costs().flops_per_token
        assert metrics_module.utilisation(method, rate) == pytest.approx(0.5)
    monkeypatch.delitem(PEAK_FLOPS, "cpu")
    assert metrics_module.utilisation(method, 1.0) is None


def test_what_is_not_finite_is_null(tmp_path):
    """JSON has no word for it, and TensorBoard no place."""
    place = open_workdir(str(tmp_path))
    with take_lock(place) as lock, MetricsLog(place, 0, tiny_config(), lock) as metrics:
        metrics.write(3, {"a": float("nan"), "b": 1.5, "c": float("-inf"), "d": None})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 3, "a": None, "b": 1.5, "c": None, "d": None}
    assert events(tmp_path) == [("start", 1), (3, {"b": 1.5})]


def events(workdir):
    """What TensorBoard would read: the step of each start, and the values of each step, in the order of writing."""
    found = []
    for file in sorted((workdir / "tb").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = file.read_bytes()
        while content:  # length, checksum, record, checksum
            (size,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            if event.HasField("session_log"):
                found.append(("start", event.step))
            elif event.HasField("summary"):
                values = {value.tag: value.simple_value for value in event.summary.value}
                if found and found[-1][0] == event.step:
                    found[-1][1].update(values)
                else:
                    found.append((event.step, values))
    return found


def test_tensorboard_has_what_metrics_have(whole_run):
    """From a start on, beyond which what was written before is not shown."""
    (start, *steps), expected = events(whole_run), lines(whole_run)
    assert start == ("start", 1)
    assert [step for step, _ in steps] == [line["step"] for line in expected]
    for (_, values), line in zip(steps, expected, strict=True):
        numbers = {name: value for name, value in line.items() if name != "step" and value is not None}
        assert values == pytest.approx(numbers, rel=1e-6)


def test_tokens_per_second_leave_out_what_is_no_training(monkeypatch):
    """Compilation before the first result, and pauses for evaluating and saving, take no time."""
    clock = [0.0]
    monkeypatch.setattr(trainer_module.time, "monotonic", lambda: clock[0])
    meter = trainer_module._Meter()

    def work(seconds, tokens):
        clock[0] += seconds
        meter.tokens += tokens

    clock[0] += 50  # compilation
    assert meter.read() is None
    work(2, 300)
    meter.pause()
    clock[0] += 100  # an evaluation, in which a checkpoint is saved
    meter.pause()
    clock[0] += 10
    meter.resume()
    work(1, 300)
    assert meter.read() == 200
    work(2, 100)
    assert meter.read() == 50  # counted anew


class FakeWandb:
    """Weights & Biases, as far as it is used: what it was told."""

    def __init__(self):
        self.begun, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.begun.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.mark.slow
def test_weights_and_biases_is_told_what_the_file_is(run_config, tmp_path, monkeypatch):
    """Once for every step, nothing that is null; a run that goes on is the same one there."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    fake.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    train.run(replace(run_config, logging__wandb="project", training__steps=10), str(tmp_path / "run"))
    train.run(replace(run_config, logging__wandb="project"), str(tmp_path / "run"))
    first, second = fake.begun
    assert first["project"] == "project" and first["name"] == "run" and first["config"]["training"]["steps"] == 10
    assert first["id"] == second["id"] and first["resume"] == "allow" and fake.finished == 2
    told = {}
    for step, values in fake.logged:
        assert None not in values.values()
        told.setdefault(step, {}).update(values)
    for line in lines(tmp_path / "run"):
        kept = {name: value for name, value in line.items() if value is not None and name != "step"}
        assert told[line["step"]] == kept


@pytest.mark.slow
def test_a_run_in_the_place_of_another_is_another_one_there(run_config, tmp_path, monkeypatch):
    """Which would else take its first lines for old ones, and drop them."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    fake.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    for _ in range(2):
        train.run(replace(run_config, logging__wandb="project", training__steps=3), str(tmp_path / "run"))
        shutil.rmtree(tmp_path / "run")
    first, second = fake.begun
    assert first["id"] != second["id"] and first["name"] == second["name"]


def test_weights_and_biases_that_is_not_there_is_said_before_anything_is_created(run_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="logging.wandb.*pip install wandb"):
        train.run(replace(run_config, logging__wandb="project"), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
