"""What the pieces of the battery for accelerators make of what they are given, where it can be known without one."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.accelerator import decoding, device, exactness, kernels, loss, profile, training
from experiments.accelerator.battery import Place
from experiments.accelerator.device import Ceilings
from experiments.bench import loss as bench_loss
from experiments.bench.decode_costs import random_subject
from experiments.bench.training import CompiledStep
from experiments.lines import append_line
from mtpd_jax.decoding.network import Network
from mtpd_jax.evaluation.speed import RoundCosts
from mtpd_jax.losses.select import nth_largest
from mtpd_jax.model.attention import attend_by_triton, attend_densely
from mtpd_jax.platform import Platform
from tests.builders import platform


def test_the_floor_of_a_step_is_its_weights_and_its_cache(tmp_path):
    """All matrices that decoding lays out, read once, and multiplied with one token each."""
    subject = random_subject("64x2", 300, 1)
    network = Network(subject.model, platform())
    laid_out = network.parameters(subject.parameters)
    model, heads = subject.model.config, subject.model.heads_config

    def weights(*trees):
        leaves = jax.tree_util.tree_leaves_with_path(trees)
        return sum(leaf.size for path, leaf in leaves if "scale" not in jax.tree_util.keystr(path))

    plain, one = weights(laid_out.blocks, laid_out.unembedding), weights(laid_out.heads)
    cache = 2 * 2 * 10 * model.kv_heads * model.head_size  # two layers, keys and values, ten slots
    scores = 2 * 2 * 10 * model.query_heads * model.head_size
    assert decoding.floor_of(model, heads, 0, 3, 10) == (2 * 3 * (plain + scores), 4 * (plain + 3 * cache))
    with_head, logits = plain + one + laid_out.unembedding.size, laid_out.unembedding.size
    flops, read = decoding.floor_of(model, heads, 1, 1, 10)
    assert read == 4 * (with_head + 1.5 * cache)
    assert flops == 2 * (2 * plain + 2 * one + logits + 2 * 1.5 * scores)
    assert Ceilings(100.0, 10.0).seconds(50.0, 20.0) == 2.0 and Ceilings(100.0, 10.0).seconds(500.0, 20.0) == 5.0


def test_ceilings_are_those_that_were_measured(tmp_path):
    place = Place(tmp_path, tmp_path, tiny=True)
    about = {"piece": "device", "tiny": True, "seconds": 1.0, "environment": {"device": "cpu"}}
    append_line(tmp_path / "results.jsonl", {**about, "case": "product", "result": {"flops_per_second": 5.0}})
    assert Ceilings.of(place) is None
    append_line(tmp_path / "results.jsonl", {**about, "case": "copy", "result": {"bytes_per_second": 7.0}})
    assert Ceilings.of(place) == Ceilings(5.0, 7.0)


def test_kernels_are_put_where_they_belong():
    named = {
        "jit(wrapped)/transpose(jvp(LanguageModel))/backbone/while/body/blocks/mlp/mlp/down/dot_general":
            "backbone mlp backward",
        "jit(wrapped)/jvp(LanguageModel)/heads/while/body/head/block/attention/qkv/transpose": "heads attention",
        "jit(wrapped)/jvp(loss)/while/body/dot_general": "loss",
        "jit(run)/while/body/verify/backbone/attention/out/dot_general": "verify backbone attention",
        "jit(wrapped)/optimizer/mul": "optimizer",
        "": "other",
    }  # fmt: skip
    assert {name: profile.place_of(name) for name in named} == named


def test_kernels_of_a_gpu_are_those_on_its_streams(monkeypatch, tmp_path):
    """Not what the host did, nor what a loop as a whole took; without a device's plane there is nothing to say."""

    def event(name, begin, end, **stats):
        return SimpleNamespace(name=name, start_ns=begin, end_ns=end, stats=stats.items())

    def line(name, *events):
        return SimpleNamespace(name=name, events=events)

    stream = line("Stream #7(Compute)", event("gemm", 0, 3, hlo_op="dot.1"), event("memset", 5, 6))
    loop = line("Stream #8", event("loop", 0, 9, hlo_op="while.2"))
    host = SimpleNamespace(name="/host:CPU", lines=[line("python", event("f", 0, 9, hlo_op="dot.9"))])
    gpu = SimpleNamespace(name="/device:GPU:0", lines=[stream, loop, line("XLA Ops", event("dot.1", 0, 3))])
    data = SimpleNamespace(planes=[host, gpu])
    monkeypatch.setattr(profile.jax.profiler, "ProfileData", SimpleNamespace(from_file=lambda path: data))
    assert list(profile.kernels_of(tmp_path)) == [("dot.1", 0, 3), ("memset", 5, 6)]
    monkeypatch.setattr(profile.jax, "default_backend", lambda: "gpu")
    data.planes = [host]
    assert list(profile.kernels_of(tmp_path)) == []


def test_a_loss_that_does_not_fit_is_a_dash(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_loss, "device_memory", lambda *_: 1)
    result = loss.rows(Place(tmp_path, tmp_path, tiny=True), 1)
    assert result["mtp_d_over_mtp"] is None and {row["seconds"] for row in result["rows"]} == {None}
    assert loss.summary(result) == "nothing fits"

    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: while trying kernels")

    monkeypatch.setattr(bench_loss, "compile_form", exhausted)
    assert {row["temp_bytes"] for row in loss.rows(Place(tmp_path, tmp_path, tiny=True), 1)["rows"]} == {None}


def test_the_largest_batch_is_the_one_that_fits(monkeypatch):
    """Memory that grows in a line is predicted; where it does not, smaller batches are tried, a few times."""
    made = []

    def step(rows):
        made.append(rows)
        return SimpleNamespace(rows=rows)

    monkeypatch.setattr(training, "CompiledStep", step)
    monkeypatch.setattr(training, "device_memory", lambda *_: 1000 / training._SHARE)
    monkeypatch.setattr(training, "_run", lambda step: step)
    monkeypatch.setattr(training, "memory_of", lambda step: 100 + 7 * step.rows)
    assert training.largest_batch(lambda rows: rows, 512)[0] == 128 and made == [1, 8, 128]
    assert training.largest_batch(lambda rows: rows, 64)[0] == 64
    monkeypatch.setattr(training, "memory_of", lambda step: 100 + 7 * step.rows + (step.rows > 8) * 300)
    assert training.largest_batch(lambda rows: rows, 512)[0] == 81  # 128, 102, 81
    monkeypatch.setattr(training, "memory_of", lambda step: 2000 + step.rows)
    with pytest.raises(ValueError, match="not even 1 rows fit"):
        training.largest_batch(lambda rows: rows, 512)


@pytest.mark.slow
def test_steps_are_timed_on_logits_that_differ():
    """Equal parameters would make them all the same, and the search for the largest N would be over before it began."""
    step = CompiledStep(training.config_of(training.tiny_config(), 1, 2))
    step()
    parameters = step._state.parameters
    hidden = step.method.model.apply({"params": parameters}, *[jnp.arange(64)[None] % n for n in (300, 1, 64)])
    logits = hidden.main[0] @ parameters["embedding"].T
    assert float(jnp.std(logits, axis=-1).min()) > 0.05
    assert float(optax.tree.norm(step._state.optimizer[1][0].mu)) > 0


def test_covered_time_is_counted_once():
    rng = np.random.default_rng(0)
    begins = rng.integers(0, 200, 40)
    spans = [(int(begin), int(begin + length)) for begin, length in zip(begins, rng.integers(1, 9, 40), strict=True)]
    assert profile.covered(spans) == len({moment for begin, end in spans for moment in range(begin, end)})


@pytest.mark.slow
def test_kernels_that_are_wrong_do_not_hold(monkeypatch):
    """Attention that sees other documents, and a selection that takes one entry too many."""
    monkeypatch.setattr(Platform, "attention_kernels", ("triton", "dense"))

    def interpreted(query, key, value, pattern):
        return attend_by_triton(query, key, value, pattern, interpret=True)

    def careless(query, key, value, pattern):
        return attend_densely(query, key, value, pattern.replace(segment_ids=pattern.segment_ids * 0))

    def without_float32(query, key, value, pattern):
        assert query.dtype != jnp.float32, "no shared memory"
        return attend_densely(query, key, value, pattern)

    for kernel, holds in ((interpreted, True), (careless, False), (without_float32, False)):
        monkeypatch.setitem(kernels.KERNELS, "triton", kernel)
        found = kernels.attention_case("triton", tiny=True)
        assert found["ok"] is holds
    assert found["bfloat16 gradients"] < 1e-2 and found["float32"].startswith("AssertionError: no shared memory")
    assert kernels.attention_case("splash", tiny=True) == {"skipped": "this device has triton, dense"}
    assert kernels.selection_case(tiny=True)["ok"]
    monkeypatch.setattr(kernels, "nth_largest", lambda values, n, axis: nth_largest(values, n + 1, axis))
    assert not kernels.selection_case(tiny=True)["ok"]


def test_resuming_with_other_bits_does_not_hold(tmp_path, monkeypatch):
    """Nor does a run that did not move between its middle and its end, of which nothing would be learned."""
    place = Place(tmp_path, tmp_path, tiny=True)
    (tmp_path / "exactness").mkdir()
    monkeypatch.setattr(exactness, "_train", lambda config, workdir, *_: str(workdir))
    end, middle = {"a": np.ones(3), "b": np.zeros(2)}, {"a": np.zeros(3), "b": np.ones(2)}
    other = {**end, "a": np.array([1.0, 1.0, 1 + 1e-7])}
    for resumed, begun, holds, differing in ((end, middle, True, 0), (other, middle, False, 1), (end, end, False, 0)):

        def load(folder, step=None, resumed=resumed, begun=begun):
            found = begun if step else resumed if folder.endswith("resumed") else end
            return SimpleNamespace(parameters=found)

        monkeypatch.setattr(exactness, "load_run", load)
        assert exactness.resume(place) == {"ok": holds, "arrays": 2, "differing": differing}


def test_rates_are_work_over_time(monkeypatch):
    """A product is two FLOPs per multiplication, and two of them to a step; a copy reads, and writes."""
    monkeypatch.setattr(device, "seconds_of", lambda *_: [1.0, 4.0, 2.0])
    assert device.product(8, 1)["flops_per_second"] == 2 * 8**3 and device.product(8, 1)["fastest"] == 4 * 8**3
    assert device.copy(100, 1)["bytes_per_second"] == 2 * 400 / 2.0


def test_rounds_stand_beside_what_the_speed_model_says_and_their_floor(tmp_path, monkeypatch):
    place = Place(tmp_path, tmp_path, tiny=True)
    predicted = RoundCosts(2, {1: 3.0, 3: 5.0}, {2: 0.5}, {0: 0.25, 2: 0.25})
    row = {"part": "round", "heads": 2, "seconds": 8.0, "over_plain": 2.0}
    monkeypatch.setattr(decoding, "measure", lambda *_: ([row, {"part": "verify"}], predicted))
    (without,) = decoding.rounds(place, "tiny", 64, 2)["rounds"]
    assert without["predicted_seconds"] == 5.75 and without["floor_seconds"] is None and without["break_even"] == 2.0
    monkeypatch.setattr(Ceilings, "of", lambda _: Ceilings(without["flops"], without["bytes"] / 4))
    (found,) = decoding.rounds(place, "tiny", 64, 2)["rounds"]
    assert found["floor_seconds"] == 4.0 and found["over_floor"] == 2.0
