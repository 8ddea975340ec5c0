"""``convert`` as a user types it: folders become runs, runs become folders, and every mistake is one line."""

import hashlib
import json
import pathlib
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy

from mtpd_jax import convert, evaluate, frontdoor, open_run, train
from mtpd_jax.interop import reading
from mtpd_jax.runs import whole
from tests.builders import tiny_config
from tests.interop.folders import retensor
from tests.soak.disks import Disk

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command in this process; returns (exit status, standard output, standard error)."""

    def run(*arguments, main=convert.main):
        monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
        status = frontdoor.status_of(main)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """The run of the other tests, as a folder."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    convert.to_hf(str(workdir), str(folder))
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(exported, tmp_path / "folder")


def contents(place):
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


def shard(folder):
    """Cuts the one file in two, with an index."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, files = sorted(tensors), ("model-1.safetensors", "model-2.safetensors")
    parts = {files[0]: names[::2], files[1]: names[1::2]}
    for file, own in parts.items():
        safetensors.numpy.save_file({name: tensors[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


def test_there_and_back_is_the_same_run(call, workdir, exported, tmp_path):
    """Parameters bit for bit, and so text and scores; the tokenizer as it lies there."""
    status, said, errors = call("from_hf", exported, f"--workdir={tmp_path / 'back'}")
    assert status == 0 and not errors
    assert "Qwen3" in said and "2 heads" in said and str(tmp_path / "back") in said
    before, after = open_run(str(workdir)), open_run(str(tmp_path / "back"))
    for a, b in zip(jax.tree.leaves(before.parameters), jax.tree.leaves(after.parameters), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert after.config.heads == before.config.heads and after.step == 0
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (workdir / "tokenizer.json").read_bytes()
    texts = [run.generate(["the cat"], max_new_tokens=8, compare=True)[0] for run in (before, after)]
    assert texts[0].tokens == texts[1].tokens and texts[1].identical
    assert before.score(["the cat sat"])[0].ce.tolist() == after.score(["the cat sat"])[0].ce.tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back"]
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        "checkpoints", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_others_may_read_what_is_written(exported):
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1


def test_what_was_written_is_read_back(call, workdir, tmp_path, monkeypatch):
    """A library that writes something else is noticed."""
    from mtpd_jax.interop import writing

    def garbage(tensors, path, metadata):
        safetensors.numpy.save_file({name: np.flip(value).copy() for name, value in tensors.items()}, path)

    monkeypatch.setattr(writing, "save_file", garbage)
    status, _, errors = call("to_hf", f"--workdir={workdir}", tmp_path / "out")
    assert status == 2 and "is not what was written" in errors and not list(tmp_path.iterdir())


def test_sharded_folders_are_read_alike(exported, folder, tmp_path):
    shard(folder)
    for place, name in ((exported, "one"), (folder, "two")):
        convert.from_hf(str(place), str(tmp_path / name))
    one, two = (jax.tree.leaves(open_run(str(tmp_path / name)).parameters) for name in ("one", "two"))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_dry_runs_say_the_same_and_write_nothing(call, workdir, exported, tmp_path):
    for arguments, target in (
        (["from_hf", exported, f"--workdir={tmp_path / 'run'}"], tmp_path / "run"),
        (["to_hf", f"--workdir={workdir}", tmp_path / "out"], tmp_path / "out"),
    ):
        dry = call(*arguments, "--dry_run")
        assert dry[0] == 0 and not list(tmp_path.iterdir()) and "would be written" in dry[1]
        real = call(*arguments)
        assert real[1] == dry[1].replace("would be written", "written") and target.exists()
        shutil.rmtree(target)


def test_what_was_done_is_json_too(call, workdir, tmp_path):
    status, output, _ = call("to_hf", tmp_path / "m", f"--workdir={workdir}", f"--json={tmp_path / 'done.json'}")
    found = json.loads((tmp_path / "done.json").read_text())
    assert status == 0 and "\n".join(found["lines"]) in output
    assert found["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(open_run(str(workdir)).parameters))


@pytest.mark.slow
def test_what_is_imported_is_evaluated_and_extended(call, exported, text_file, tmp_path):
    run = tmp_path / "run"
    convert.from_hf(str(exported), str(run))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n')
    report = evaluate.run(str(run), text=[text_file], prompts=str(tmp_path / "prompts.jsonl"), max_new_tokens=6)
    assert report.text[text_file].tokens > 100 and not report.decoding[str(tmp_path / "prompts.jsonl")].failed
    # Nothing of it is held out here, and it says so.
    status, _, errors = call(f"--workdir={run}", "--split=validation", main=evaluate.main)
    assert status == 2 and len(errors.splitlines()) == 1 and "not here; score files with --text" in errors
    # More heads on top of it.
    model = {f"model__{name}": value for name, value in open_run(str(run)).config.model.to_dict().items()}
    config = tiny_config(
        **model, data__source="text", data__paths=(text_file,), objective__mode="extension",
        objective__source=str(run), heads__num_heads=3, training__steps=2, optimizer__warmup_steps=1,
        data__validation_fraction=0.3,
    )  # fmt: skip
    result = train.run(config, str(tmp_path / "extended"))
    assert result.finished
    frozen, extended = open_run(str(run)).parameters, open_run(str(tmp_path / "extended")).parameters
    assert np.array_equal(frozen["embedding"], extended["embedding"])


@pytest.mark.slow
def test_short_numbers_stay_short_and_are_not_trained(workdir, exported, folder, text_file, tmp_path):
    """bfloat16 in memory and on disk; the backbone as it is below new heads in float32; no training of it itself."""
    import ml_dtypes

    def shorten(tensors):
        tensors.update({name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()})

    settings = json.loads((folder / "config.json").read_text())
    settings["mtpd"] = {name: value for name, value in settings["mtpd"].items() if name not in ("scale_embedding",)}
    (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    retensor(folder, shorten)
    convert.from_hf(str(folder), str(tmp_path / "short"))
    opened = open_run(str(tmp_path / "short"))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(opened.parameters)} == {"bfloat16"}
    size = sum(path.stat().st_size for path in (tmp_path / "short" / "checkpoints").rglob("*") if path.is_file())
    assert size < 3 * sum(leaf.size for leaf in jax.tree.leaves(opened.parameters))
    assert len(opened.generate(["the cat"], max_new_tokens=4)[0].tokens) == 4
    model = {f"model__{name}": value for name, value in opened.config.model.to_dict().items() if name != "weights"}
    shared = {"data__source": "text", "data__paths": (text_file,), "optimizer__warmup_steps": 1, "training__steps": 2}
    config = tiny_config(
        **model, **shared, objective__mode="extension", objective__source=str(tmp_path / "short"), heads__num_heads=3
    )
    assert train.run(config, str(tmp_path / "extended")).finished
    extended = open_run(str(tmp_path / "extended")).parameters
    assert extended["embedding"].dtype == "bfloat16" and np.array_equal(
        extended["embedding"].view(np.uint16), opened.parameters["embedding"].view(np.uint16)
    )
    heads = jax.tree.leaves(extended["heads"])
    assert {str(leaf.dtype) for leaf in heads} == {"float32"}
    with pytest.raises(ValueError, match=r"config.model.weights = 'bfloat16': expected float32, for it is trained"):
        train.run(tiny_config(**model, **shared, model__weights="bfloat16"), str(tmp_path / "whole"))
    assert not (tmp_path / "whole").exists()


def _index(folder, alter):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    alter(index["weight_map"])
    path.write_text(json.dumps(index))


def _twice(folder):
    names = shard(folder)
    one, two = (safetensors.numpy.load_file(folder / f"model-{number}.safetensors") for number in (1, 2))
    safetensors.numpy.save_file({**two, names[0]: one[names[0]]}, folder / "model-2.safetensors")


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _to_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


DAMAGE = {
    "truncated": (_truncate, "damaged, or no safetensors file"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "damaged, or no safetensors file"),
    "wrong shape": (
        lambda folder: retensor(folder, lambda t: t.update({"model.norm.weight": np.ones(5, np.float32)})),
        "model.norm.weight has the shape (5,): expected (32,) by config.json",
    ),
    "missing tensor": (
        lambda folder: retensor(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "model.layers.1.mlp.up_proj.weight is missing",
    ),
    "missing shard": (
        lambda folder: (shard(folder), (folder / "model-2.safetensors").unlink()), "model-2.safetensors: there is no",
    ),
    "extra tensor": (
        lambda folder: retensor(folder, lambda t: t.update({"model.sinks": np.ones(1, np.float32)})),
        "model.sinks: no such tensor is in this model",
    ),
    "a tensor in two shards": (_twice, "and the index says in model-1.safetensors"),
    "an index that promises more": (
        lambda folder: (shard(folder), _index(folder, lambda named: named.update(more="model-1.safetensors"))),
        "more is not in model-1.safetensors",
    ),
    "an index that leads elsewhere": (
        lambda folder: (shard(folder), _index(folder, lambda named: named.update(more="../a.safetensors"))),
        "expected the name of a file in the same folder",
    ),
    "both at once": (
        lambda folder: (shutil.copy(folder / "model.safetensors", "kept"), shard(folder),
                        shutil.copy("kept", folder / "model.safetensors")),
        "one of them is left over",
    ),
    "whole numbers": (
        lambda folder: retensor(folder, lambda t: t.update({"model.norm.weight": np.ones(32, np.int32)})),
        "model.norm.weight is of I32: expected F32, BF16, F16",
    ),
    "a pickle": (_to_pickle, "pytorch_model.bin, a pickle, which may run code"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds neither"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: there is no such file"),
    "a config that is none": (lambda folder: (folder / "config.json").write_text("{"), "not readable as JSON"),
    "a config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "expected a JSON object"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "a tokenizer that is none": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "an embedding that is not what was multiplied": (
        lambda folder: retensor(folder, lambda t: t["model.embed_tokens.weight"].__setitem__((0, 0), 3.0)),
        "model.embed_tokens.weight, lm_head.weight: expected the first to be the second times sqrt(32)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line_and_nothing_is_written(name, call, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage, message = DAMAGE[name]
    damage(folder)
    status, _, errors = call("from_hf", folder, f"--workdir={tmp_path / 'run'}")
    assert status == 2 and len(errors.strip().splitlines()) == 1 and message in errors, errors
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("run")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["from_hf", "nowhere", "--workdir=run"], "nowhere: expected a folder"),
        (["from_hf", "{folder}", "--workdir=gs://bucket/run"], "expected a local folder"),
        (["from_hf", "{folder}", "--workdir="], "expected a local folder"),
        (["from_hf", "{folder}"], "--workdir"),
        (["from_hf", "~nobody-of-that-name/model", "--workdir=run"], "--folder=~nobody-of-that-name/model"),
        (["to_hf", "--workdir={workdir}", "out", "--report={folder}/config.json"], "expected what mtpd_jax.evaluate"),
        (["to_hf", "--workdir={workdir}", "out", "--format=onnx"], "invalid choice: 'onnx'"),
        (["to_hf", "--workdir={workdir}", "out", "--format=mellum"], "Mellum wants one head"),
        (["to_hf", "--workdir={workdir}", "out", "--checkpoint=3"], "checkpoint = 3"),
        (["to_hf", "--workdir={workdir}", "out", "--report=nothing.json"], "nothing.json: there is no such file"),
        (["to_hf", "--workdir=nowhere", "out"], "holds no run"),
        (["sideways"], "invalid choice: 'sideways'"),
        ([], "required"),
    ],
)
def test_mistakes_are_one_line(arguments, message, call, workdir, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(folder=exported, workdir=workdir) for argument in arguments]
    status, _, errors = call(*filled)
    assert status == 2 and len(errors.strip().splitlines()) == 1 and message in errors, errors
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(call, workdir, exported, tmp_path):
    """Neither a run nor a folder is written over."""
    for name, arguments in (("run", ["from_hf", exported]), ("out", ["to_hf", f"--workdir={workdir}"])):
        place = shutil.copytree(workdir, tmp_path / name)
        before = contents(place)
        status, _, errors = call(*arguments, f"--workdir={place}" if name == "run" else place)
        assert status == 2 and "exists: use a new or an empty folder" in errors and contents(place) == before
    (tmp_path / "empty").mkdir()
    assert call("from_hf", exported, f"--workdir={tmp_path / 'empty'}")[0] == 0


def test_an_error_on_the_way_leaves_nothing(call, exported, tmp_path, monkeypatch):
    """Whatever place it comes at; and what a killed process left is no hindrance."""
    read, calls = reading.TensorFolder.read, []

    def failing(self, name):
        calls.append(name)
        if len(calls) == 9:
            raise OSError(5, "Input/output error", str(self.tensors[name].file))
        return read(self, name)

    monkeypatch.setattr(reading.TensorFolder, "read", failing)
    status, _, errors = call("from_hf", exported, f"--workdir={tmp_path / 'run'}")
    assert status == 2 and "Input/output error" in errors and not list(tmp_path.iterdir())
    monkeypatch.undo()
    left = tmp_path / ".run.mtpd_jax_incomplete" / "checkpoints" / "0"
    left.mkdir(parents=True)
    (left / "half").write_text("x")
    (tmp_path / ".run.mtpd_jax_incomplete" / "config.json").write_text("{")
    convert.from_hf(str(exported), str(tmp_path / "run"))
    assert open_run(str(tmp_path / "run")).step == 0 and [path.name for path in tmp_path.iterdir()] == ["run"]
    (tmp_path / ".other.mtpd_jax_incomplete").symlink_to(tmp_path / "run")
    with pytest.raises(ValueError, match="is a link, and would be emptied"):
        convert.from_hf(str(exported), str(tmp_path / "other"))
    assert open_run(str(tmp_path / "run")).step == 0


def test_no_room_is_said_before_anything_is_written(call, workdir, exported, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(whole.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    for arguments in (
        ["from_hf", exported, f"--workdir={tmp_path / 'a'}"],
        ["to_hf", f"--workdir={workdir}", tmp_path / "b"],
    ):
        status, _, errors = call(*arguments)
        assert status == 2 and "there is room for 1,000" in errors and not list(tmp_path.iterdir())


def test_a_disk_that_is_full_after_all(workdir, exported, tmp_path):
    try:
        disk = Disk(tmp_path / "disk")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no disk can be mounted here")
    unchecked = "from mtpd_jax import convert, conversion, frontdoor; conversion.check_free = lambda *_: None; "
    program = [sys.executable, "-c", f"{unchecked} frontdoor.guarded(convert.main)"]
    try:
        for arguments in (
            ["from_hf", exported, f"--workdir={tmp_path / 'disk' / 'a'}"],
            ["to_hf", f"--workdir={workdir}", tmp_path / "disk" / "b"],
        ):
            done = subprocess.run([*program, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
            assert "No space left on device" in done.stderr and not list((tmp_path / "disk").iterdir())
    finally:
        disk.remove()


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["from_hf", "to_hf"])
def test_killed_at_any_moment(direction, workdir, exported, tmp_path):
    """Ten times: the target is not there or whole, the source is as it was, and the next time it works."""
    source = exported if direction == "from_hf" else shutil.copytree(workdir, tmp_path / "source")
    before, target = contents(source), tmp_path / "target"
    places = [str(source), f"--workdir={target}"] if direction == "from_hf" else [f"--workdir={source}", str(target)]
    command = [sys.executable, "-m", "mtpd_jax.convert", direction, *places]
    begin = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    whole_time, expected = time.monotonic() - begin, contents(target)

    def is_whole():
        # A run is held to its digests; names of its files are drawn anew.
        return open_run(str(target)).step == 0 if direction == "from_hf" else contents(target) == expected

    random.seed(0)
    for _ in range(10):
        shutil.rmtree(target, ignore_errors=True)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(random.uniform(0.5, 1.0) * whole_time)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (not target.exists() or is_whole()) and contents(source) == before
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert is_whole() and not list(tmp_path.glob(".target*"))
