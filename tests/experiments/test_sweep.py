"""Sweeps: finished runs are skipped, stopped ones resumed, and the table at the end is the same."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.sweep.experiment import Experiment, arms_of, run
from experiments.sweep.report import Report, Table, share
from experiments.sweep.rows import append_row, read_rows
from experiments.sweep.runner import Code, Sweep
from experiments.sweep.runs import Run, Variant, decided
from experiments.sweep.scale import SCALES, Scale
from experiments.variants import mtp, mtp_d
from mtpd_jax.config import CheckpointConfig, ModelConfig, OptimizerConfig
from mtpd_jax.evaluation.statistics import mean_of
from mtpd_jax.fields import field
from mtpd_jax.training.state import DivergedError
from tests.builders import tiny_config
from tests.experiments.rows import made_up_row
from tests.runs.runs import stop_after

ROOT = pathlib.Path(__file__).parents[2]


def tiny_scale(text_file):
    def base():
        from configs import base

        tree = base.get_config()
        config = tiny_config(
            data__source="text", data__paths=(text_file,), data__validation_fraction=0.4, mesh__data=1,
            training__sequence_length=64, training__steps=12, checkpoint__every_steps=5, evaluation__every_steps=6,
        )  # fmt: skip
        for section, fields in config.to_dict().items():
            tree[section].update(fields)
        return tree

    return Scale("tiny", base, loop_steps=6, texts=3, prompt_tokens=8, new_tokens=8)


def variants(scale):
    two = mtp_d(2)
    loop = {"heads.num_heads": 3, "training.steps": scale.loop_steps}
    return [mtp(2), two, Variant("loop", loop, start=two)]


def report(arms, scale):
    rows = [
        [name, *(share(mean_of(figure)) for figure in (arm.agreement(1), arm.cumulative("sampled", arm.heads, 2)))]
        for name, arm in arms.items()
    ]
    return Report("tiny", "", [Table("tiny", ["variant", "agreement", "cumulative"], rows)], [])


EXPERIMENT = Experiment("tiny", variants, report, seeds=(0,))
CODE = Code(lambda family: "this code")
TRAINS_NOTHING = Code(lambda family: "this code", lambda *_: pytest.fail("trained again"))


def untimed(path):
    """The rows without what a clock gave, and the table."""
    rows = [row.to_json() for row in read_rows(path)]
    for row in rows:
        del row["seconds"]
        for mode in row["decoding"].values():
            for part in mode.values():
                if isinstance(part, dict):
                    del part["seconds"]
    return rows, path.with_suffix(".md").read_text().split("## Runs")[0]


@pytest.fixture(scope="module")
def whole(text_file, tmp_path_factory):
    """The sweep without interruption: its folder, and its file of rows."""
    folder = tmp_path_factory.mktemp("whole")
    run(EXPERIMENT, tiny_scale(text_file), folder / "runs", results=folder, code=CODE)
    return folder, folder / "tiny" / "tiny.jsonl"


@pytest.mark.slow
def test_a_finished_sweep_trains_nothing(whole, text_file):
    folder, path = whole
    before = path.read_text()
    run(EXPERIMENT, tiny_scale(text_file), folder / "runs", results=folder, code=TRAINS_NOTHING)
    assert path.read_text() == before
    assert [row.variant for row in read_rows(path)] == ["mtp_2", "mtp_d_2", "loop"]


@pytest.mark.slow
def test_a_stopped_sweep_ends_with_the_same_table(whole, text_file, tmp_path, monkeypatch):
    """Asked to stop in the second run, after its first checkpoint; then started again."""
    scale = tiny_scale(text_file)
    path = tmp_path / "tiny" / "tiny.jsonl"
    append_row(path, read_rows(whole[1])[0])  # the first run had finished
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(SystemExit) as ended:
            run(EXPERIMENT, scale, tmp_path / "runs", results=tmp_path, code=CODE)
    assert ended.value.code == 128 + signal.SIGTERM
    assert len(read_rows(path)) == 1
    run(EXPERIMENT, scale, tmp_path / "runs", results=tmp_path, code=CODE)
    assert untimed(path) == untimed(whole[1])


@pytest.mark.slow
def test_another_experiment_takes_rows_over(whole, text_file):
    folder, path = whole
    other = Experiment("other", lambda scale: [mtp_d(2)], report, seeds=(0,))
    run(other, tiny_scale(text_file), folder / "runs", results=folder, code=TRAINS_NOTHING)
    (row,) = read_rows(path.with_name("other.jsonl"))
    assert row == read_rows(path)[1]


@pytest.mark.slow
def test_other_code_trains_anew(whole, text_file):
    """In a folder of its own, though the old one is there."""
    folder, _ = whole
    run = Run(mtp(2), 0, tiny_scale(text_file))
    before = run.workdir(folder / "runs", "this code")
    trained = []

    def stop(config, workdir):
        trained.append(pathlib.Path(workdir))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sweep("tiny", [run], Code(lambda family: "changed", stop), folder / "runs", folder).run()
    assert before.exists() and trained == [run.workdir(folder / "runs", "changed")] and trained[0] != before


def test_the_newest_row_counts(text_file):
    scale = tiny_scale(text_file)
    row = made_up_row(Run(mtp(2), 0, scale))
    rows = [dataclasses.replace(row, code=code) for code in ("old", "new")]
    assert arms_of(rows, variants(scale), scale)["mtp_2"].rows == rows[1:]


def test_a_diverged_run_does_not_hold_up_the_others(text_file, tmp_path):
    def fail(config, workdir):
        raise DivergedError("step 3: loss nan")

    runs = [Run(mtp(2), seed, tiny_scale(text_file)) for seed in (0, 1)]
    sweep = Sweep("tiny", runs, Code(lambda family: "this code", fail), tmp_path, tmp_path)
    assert sweep.run() == [f"mtp_2, seed {seed}: step 3: loss nan" for seed in (0, 1)]


def made_up(seed):
    return made_up_row(Run(mtp(4), seed, SCALES["cpu"]))


def test_processes_append_whole_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: append_row(path, made_up(seed)), range(64)))
    assert sorted(row.seed for row in read_rows(path)) == list(range(64))


def test_an_unfinished_last_line_is_written_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [made_up(seed) for seed in range(3)]
    append_row(path, rows[0])
    with path.open("a") as file:
        file.write('{"seed": 1, "text')
    assert read_rows(path) == rows[:1]
    append_row(path, rows[2])
    assert read_rows(path) == [rows[0], rows[2]]
    for broken in ('{"seed": 0\n{"seed": 1}\n', '{"seed": 0}\n', "3\n"):
        path.write_text(broken)
        with pytest.raises(ValueError, match="not a file of rows"):
            read_rows(path)


def test_keys_know_what_matters(text_file):
    scale = tiny_scale(text_file)
    base = Run(mtp_d(2), 0, scale)

    def keys(variant, seed=0):
        other = Run(variant, seed, scale)
        return other.training_key() == base.training_key(), other.key() == base.key()

    assert keys(Variant("renamed", {"heads.num_heads": 2}), seed=1) == (True, True)
    assert keys(Variant("", {"heads.num_heads": 2, "logging.every_steps": 3, "mesh.data": 2})) == (True, True)
    assert keys(Variant("", {"heads.num_heads": 2}, decode=(8,))) == (True, False)
    assert keys(mtp(2)) == (False, False)
    loops = [Variant("", {"heads.num_heads": 4}, start=start) for start in (mtp_d(2), mtp(2))]
    assert len({Run(loop, 0, scale).training_key() for loop in loops} | {base.training_key()}) == 3
    assert base.heads() == [0, 1, 2] and Run(loops[0], 0, scale).heads() == [0, 1, 4]


def test_a_name_with_a_comma_could_not_be_asked_for():
    with pytest.raises(ValueError, match="'KL, N = 3'.*--only"):
        Variant("KL, N = 3", {})


def test_a_default_that_changes_disowns_rows_and_a_new_field_does_not(monkeypatch, text_file):
    """Fields of the rows' time count in full; a later one where it differs from what was done before it was there."""
    scale = tiny_scale(text_file)

    def key():
        return Run(mtp_d(2), 0, scale).key()

    before = key()
    with monkeypatch.context() as patch:
        patch.setattr(OptimizerConfig.__dataclass_fields__["b2"], "default", 0.99)
        assert key() != before
    with monkeypatch.context() as patch:  # one that came later
        patch.setattr(ModelConfig.__dataclass_fields__["attention"], "default", "dense")
        assert key() != before
    with monkeypatch.context() as patch:  # one that does not decide what is learned
        patch.setattr(CheckpointConfig.__dataclass_fields__["keep"], "default", 7)
        assert key() == before

    @dataclasses.dataclass(frozen=True)
    class LaterModel(ModelConfig):
        depth_scale: float = field(2.0, as_before=1.0)

    config = Run(mtp_d(2), 0, scale).config()
    later = {value: LaterModel(**{**dataclasses.asdict(config.model), "depth_scale": value}) for value in (1.0, 2.0)}
    assert decided(dataclasses.replace(config, model=later[1.0])) == decided(config)
    assert decided(dataclasses.replace(config, model=later[2.0])) == {**decided(config), "model.depth_scale": 2.0}


@pytest.mark.slow
def test_a_killed_sweep_ends_with_the_same_table(whole, text_file, tmp_path):
    """SIGKILL in the middle of the second run, in a process of its own."""
    program = (
        "import pathlib\nimport tests.conftest\nfrom experiments.sweep.experiment import run\n"
        "from tests.experiments.test_sweep import CODE, EXPERIMENT, tiny_scale\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        f"run(EXPERIMENT, tiny_scale({text_file!r}), folder / 'runs', results=folder, code=CODE)\n"
    )
    second = Run(mtp_d(2), 0, tiny_scale(text_file)).workdir(tmp_path / "runs", "this code")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 300
    while not list((second / "checkpoints").glob("5*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    path = tmp_path / "tiny" / "tiny.jsonl"
    assert len(read_rows(path)) == 1
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert untimed(path) == untimed(whole[1])
    assert json.loads((second / "config.json").read_text())["training"]["steps"] == 12
