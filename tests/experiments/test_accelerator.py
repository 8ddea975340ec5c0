"""The battery for accelerators: all of it in tiny sizes, stopped in the middle; and what ends, crashes or fails."""

import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console

from experiments.accelerator import decoding, exactness, kernels, loss, profile, training
from experiments.accelerator.__main__ import Battery, environment_of
from experiments.accelerator.battery import Case, Piece, Place, Results, run_case
from experiments.accelerator.device import Ceilings
from experiments.accelerator.page import write_page
from experiments.accelerator.piece import PIECES
from experiments.bench import loss as bench_loss
from experiments.bench.decode_costs import random_subject
from experiments.bench.training import CompiledStep
from experiments.lines import append_line, read_lines
from mtpd_jax.decoding.network import Network
from mtpd_jax.losses.select import nth_largest
from mtpd_jax.model.attention import attend_by_triton, attend_densely
from mtpd_jax.platform import Platform
from mtpd_jax.train import TrainResult
from tests.builders import platform

ROOT = pathlib.Path(__file__).parents[2]
# What a machine that only measures has not.
ABSENT = ("tensorflow_datasets", "pyarrow", "matplotlib")


def command(*flags):
    return [sys.executable, "-m", "experiments.accelerator", *flags]


@pytest.fixture
def environ(tmp_path):
    """That of a machine with one device, on which some packages are not to be had."""
    for name in ABSENT:
        (tmp_path / "absent").mkdir(exist_ok=True)
        (tmp_path / "absent" / f"{name}.py").write_text(f"raise ImportError('{name} is not installed')")
    ours = {"PYTHONPATH": f"{tmp_path / 'absent'}:{ROOT}", "XLA_FLAGS": "", "COLUMNS": "200"}
    return {**os.environ, **ours}


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_all_of_it_in_tiny_sizes_killed_and_continued(tmp_path, environ):
    """Without the packages that it can do without; every case is measured once, and the page shows them all."""
    out, rows = tmp_path / "out", tmp_path / "out" / "results.jsonl"
    flags = [f"--out={out}", f"--workdir={tmp_path / 'work'}", "--tiny"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(*flags), env=environ, cwd=ROOT, stdout=log, stderr=log)
        wait_for(lambda: len(read_lines(rows)) > 4 or process.poll() is not None)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(1.0)  # what it had started is gone, too, and measures no more
        before = rows.read_bytes()
        found = subprocess.run(command(*flags), env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
    assert found.returncode == 0, (tmp_path / "log").read_text()
    assert rows.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    place = Place(out, tmp_path / "work", tiny=True)
    cases = [(piece.name, case.name) for piece in PIECES.values() for case in piece.cases(place)]
    assert [(row["piece"], row["case"]) for row in read_lines(rows)] == cases
    assert all("result" in row and row["environment"]["devices"] == 1 for row in read_lines(rows))
    results = Results(place.out, tiny=True)
    assert all(result.get("ok", True) for result in results.of("exactness").values())
    assert "not measured yet" not in found.stdout and "holds: arrays" in found.stdout
    for result in results.of("profile").values():
        assert (out / result["trace"]).exists() and 0 <= result["idle"] < 1
        assert sum(result["by_place"].values()) > 2 * result["by_place"]["other"]
    check_page(place, tmp_path / "page.md")


def check_page(place, path):
    write_page(place, path)
    text = path.read_text()
    titles = ["The device", "What holds", "The loss", "Training steps", "Attention kernels", "A trained model",
              "Where the time goes: training step", "Rounds of decoding", "What is missing"]  # fmt: skip
    assert [title for title in titles if f"## {title}\n" not in text] == []
    assert text.endswith("## What is missing\n\nNothing.\n") and path.with_suffix(".png").exists()
    results = Results(place.out, tiny=True)
    plain = results.of("decoding")["tiny, prompt 64, batch 2"]["rounds"][0]
    assert f"| tiny | 64 | 2 | 0 | {1e3 * plain['seconds']:.2f} | 1.00 |" in text
    # A figure that is taken out of the folder is not claimed any more.
    lines = [line for line in results.path.read_text().splitlines() if json.loads(line)["piece"] != "trained"]
    results.path.write_text("\n".join(lines) + "\n")
    write_page(place, path)
    assert "A trained model" not in path.read_text() and "- trained: none of its 4 cases" in path.read_text()


def test_the_page_that_is_here_is_that_of_the_results_that_are_here(tmp_path):
    write_page(Place(ROOT / "experiments" / "results" / "accelerator", tmp_path, tiny=False), tmp_path / "page.md")
    page = (ROOT / "docs" / "accelerators.md").read_text()
    assert (tmp_path / "page.md").read_text() == page
    # And the README says of which machine they are.
    lines = (ROOT / "README.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| [docs/accelerators"))
    assert ("no machine yet" in row) == ("Nothing has been measured" in page)


def made_up(*outcomes):
    """A piece whose cases return numbers, or raise."""

    def measure(outcome):
        if isinstance(outcome, Exception):
            raise outcome
        return {"value": outcome}

    cases = [Case(f"case {n}", 10.0, lambda outcome=outcome: measure(outcome)) for n, outcome in enumerate(outcomes)]
    return Piece("made up", "", lambda place: cases, str, grace=0.5)


class Scripted(Battery):
    """Whose processes run a script instead of a piece."""

    script = ""

    def command(self, piece, names):
        return [sys.executable, "-c", f"place, names = {str(self.place.out)!r}, {list(names)!r}\n{self.script}"]


def battery(tmp_path, script, seconds):
    made = Scripted(
        Place(tmp_path, tmp_path, tiny=False), time.time() + seconds, rich.console.Console(file=io.StringIO())
    )
    made.script = script
    return made


def test_what_hangs_is_ended_in_time(tmp_path):
    for script in (
        "import time; time.sleep(60)",
        "import signal, time; signal.signal(15, lambda *_: 0); time.sleep(60)",
    ):
        begin, piece = time.monotonic(), made_up(1, 2)
        assert not battery(tmp_path, script, 2.0).run(piece, piece.cases(None))
        assert 1.0 < time.monotonic() - begin < 6.0
    # What was not finished is not what the next call begins with, or nothing behind it would ever be measured.
    results, place = Results(tmp_path, tiny=False), Place(tmp_path, tmp_path, tiny=False)
    assert {case: row["error"] for (_, case), row in results.rows().items()} == {
        "case 0": "not finished when time was up"
    }
    assert [case.name for case in results.missing(piece, place)] == ["case 1", "case 0"]


CRASHES_IN_THE_SECOND = """
import os, pathlib
from experiments.accelerator.battery import Results
for name in names:
    if name == "case 1":
        os.abort()
    Results(pathlib.Path(place), tiny=False).add("made up", name, begin=0.0, result={"value": name})
"""


def test_what_crashes_is_said_and_the_rest_is_measured(tmp_path):
    """The process dies in the second of three cases; the third gets a new one."""
    piece = made_up(1, 2, 3)
    assert battery(tmp_path, CRASHES_IN_THE_SECOND, 60.0).run(piece, piece.cases(None))
    results = Results(tmp_path, tiny=False)
    assert {case: "result" in row for (_, case), row in results.rows().items()} == {
        "case 0": True, "case 1": False, "case 2": True,
    }  # fmt: skip
    assert "status -6" in results.rows()["made up", "case 1"]["error"]
    # An error is no result: the next call tries again.
    assert [case.name for case in results.missing(piece, Place(tmp_path, tmp_path, False))] == ["case 1"]


def test_a_process_that_crashes_on_its_way_out_has_done_its_work(tmp_path):
    piece, script = made_up(1, 2), CRASHES_IN_THE_SECOND.replace("case 1", "none") + "os.abort()"
    assert battery(tmp_path, script, 60.0).run(piece, piece.cases(None))
    assert all("result" in row for row in Results(tmp_path, tiny=False).rows().values())
    assert len(read_lines(tmp_path / "results.jsonl")) == 2


def test_a_process_that_cannot_begin_is_not_begun_again_for_every_case(tmp_path):
    piece = made_up(1, 2)
    with pytest.raises(SystemExit) as ended:
        battery(tmp_path, "import no_such_module", 60.0).run(piece, piece.cases(None))
    assert ended.value.code == 1 and not (tmp_path / "results.jsonl").exists()


def test_without_an_accelerator_only_tiny_sizes_are_for_it(tmp_path):
    flags = [f"--out={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}"]
    found = subprocess.run(command(*flags), cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2 and "error: JAX finds no accelerator here" in found.stderr
    assert not (tmp_path / "out").exists()


def test_a_case_is_measured_or_its_failure_said_or_not_begun(tmp_path):
    place, piece = Place(tmp_path, tmp_path, tiny=False), made_up(7, ValueError("no such kernel"), 8)
    first, second, third = piece.cases(place)
    assert run_case(piece, first, place, time.time() + 60) is True
    assert run_case(piece, second, place, time.time() + 60) is False
    assert run_case(piece, third, place, time.time() + 9) is None  # it takes ten
    results = Results(tmp_path, tiny=False)
    assert results.of("made up") == {"case 0": {"value": 7}}
    assert results.rows()["made up", "case 1"]["error"] == "ValueError: no such kernel"
    assert [case.name for case in results.missing(piece, place)] == ["case 2", "case 1"]


def test_being_asked_to_stop_while_a_run_is_looked_at_is_heeded(tmp_path, monkeypatch):
    """A run that is finished hears of it, too late to end early: the battery is not to go on with its next case."""
    asked = TrainResult(str(tmp_path), 8, finished=True, signal=signal.SIGTERM, tokens=0, parameters=0, seconds=0.0)
    monkeypatch.setattr(exactness.train, "run", lambda *_, **__: asked)
    place = Place(tmp_path, tmp_path, tiny=True)
    case = exactness.cases(place)[1]
    with pytest.raises(SystemExit):
        run_case(PIECES["exactness"], case, place, time.time() + 60)
    assert not Results(tmp_path, tiny=True).rows()


def test_results_are_of_one_device_and_one_size(tmp_path):
    place, piece = Place(tmp_path, tmp_path, tiny=False), made_up(7)
    run_case(piece, piece.cases(place)[0], place, time.time() + 60)
    Results(tmp_path, tiny=False).check_device("cpu")
    with pytest.raises(ValueError, match="holds results of cpu, and this is NVIDIA H200: take another folder"):
        Results(tmp_path, tiny=False).check_device("NVIDIA H200")
    with pytest.raises(ValueError, match="holds results of a machine's sizes, not of --tiny's"):
        Results(tmp_path, tiny=True).rows()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--only=nothing"], "--only=nothing: expected some of device, exactness"),
        (["--minutes=0"], "--minutes=0: expected more than none"),
        (["--seed=-1"], "--seed=-1: expected 0 to 999"),
        (["--tiny", "--page"], "tiny sizes give none"),
    ],
)
def test_bad_flags_are_one_line(flags, said, tmp_path):
    found = subprocess.run(command(f"--out={tmp_path / 'out'}", *flags), cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2 and said in found.stderr and found.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_piece_has_the_flags_that_it_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_some_flag=1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
    place = Place(tmp_path, tmp_path, tiny=False)
    found = environment_of(PIECES["exactness"].cases(place)[0], place)
    assert found["XLA_FLAGS"] == "--xla_some_flag=1 --xla_gpu_deterministic_ops=true"
    assert found["JAX_COMPILATION_CACHE_DIR"] == "/mine"


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
    monkeypatch.setattr(bench_loss, "memory_limit", lambda: 1)
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
    monkeypatch.setattr(training, "memory_limit", lambda: 1000 / training._SHARE)
    monkeypatch.setattr(training, "_run", lambda step: step)
    monkeypatch.setattr(training, "memory_of", lambda step: 100 + 7 * step.rows)
    assert training.largest_batch(lambda rows: rows, 512)[0] == 128 and made == [1, 8, 128]
    assert training.largest_batch(lambda rows: rows, 64)[0] == 64
    monkeypatch.setattr(training, "memory_of", lambda step: 100 + 7 * step.rows + (step.rows > 8) * 300)
    assert training.largest_batch(lambda rows: rows, 512)[0] == 81  # 128, 102, 81
    monkeypatch.setattr(training, "memory_of", lambda step: 2000 + step.rows)
    with pytest.raises(ValueError, match="not even 1 rows fit"):
        training.largest_batch(lambda rows: rows, 512)


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


def test_the_bundle_holds_what_the_tests_run_with(tmp_path):
    """Every name is one of the requirements, and none is what the battery can do without."""
    script, required = (ROOT / "scripts" / "offline_bundle.sh").read_text(), (ROOT / "requirements.txt").read_text()
    (names,) = re.findall(r"^names='(.*)'$", script, re.MULTILINE)
    assert all(f"\n{name}==" in required for name in names.split("|"))
    assert not set(names.split("|")) & {name.replace("_", "-") for name in ABSENT}
    usage = subprocess.run([ROOT / "scripts" / "offline_bundle.sh"], capture_output=True, text=True)
    assert usage.returncode == 2 and usage.stderr.startswith("usage:")
    # Two versions of one package stop the whole installation.
    (tmp_path / "grain-0.1.whl").touch()
    there = subprocess.run([ROOT / "scripts" / "offline_bundle.sh", tmp_path], capture_output=True, text=True)
    assert there.returncode == 2 and "holds wheels already" in there.stderr
