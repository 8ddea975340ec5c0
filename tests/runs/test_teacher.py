"""A run that keeps its teacher: where it lies, what it is held to, and that nothing else is needed to go on."""

import json
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from mtpd_jax import evaluate, generate, train
from mtpd_jax.conversion import to_hf
from mtpd_jax.run import open_run
from mtpd_jax.runs.teacher import teacher_folder
from mtpd_jax.runs.workdir import open_workdir
from tests.builders import replace, tiny_config
from tests.runs.runs import (
    ROOT,
    assert_bitwise,
    command,
    comparable,
    environment,
    lines,
    restored,
    stop_after,
)


@pytest.fixture(scope="module")
def source(text_file, tmp_path_factory):
    """A model without heads."""
    config = tiny_config(data__source="text", data__paths=(text_file,), heads__num_heads=0, training__steps=10)
    path = tmp_path_factory.mktemp("source") / "run"
    train.run(config, str(path))
    return path


@pytest.fixture(scope="module")
def config(source, text_file):
    return tiny_config(
        data__source="text", data__paths=(text_file,), heads__num_heads=0, training__steps=10,
        objective__mode="standalone", objective__source=str(source), objective__k_max=4, objective__regions=4,
        objective__labels="distribution", training__micro_batches=2, mesh__data=4, evaluation__every_steps=5,
        evaluation__prompts=4,
        checkpoint__every_steps=5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def student(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "run"
    train.run(config, str(path))
    return path


def test_the_teacher_is_the_source_bit_for_bit_and_the_student_is_not(source, config, student):
    """It can be opened like any run, and is no part of the checkpoints."""
    before, teacher = open_run(str(source)).parameters, open_run(str(student / "teacher")).parameters
    assert_bitwise(teacher, before)
    after = open_run(str(student)).parameters
    assert set(after) == {*before, "mask_embedding"}
    assert all(np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(
        jax.tree.leaves({name: after[name] for name in before}), jax.tree.leaves(before), strict=True
    ))  # fmt: skip
    step = max((student / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert {item.name for item in step.iterdir() if item.is_dir()} == {"parameters", "optimizer", "progress"}
    assert set(restored(student, open_workdir(str(student)).read_config())[1]["origin"]["teacher"]) == {"digest"}
    stored = open_workdir(str(student)).read_config()
    assert stored.objective.end_ids == open_run(str(source)).tokenizer.end_ids and stored.model.mask_embedding
    assert generate.run(str(student / "teacher"), ["the cat"], max_new_tokens=6)[0].tokens


def test_what_is_measured_has_its_names(student):
    training = [line for line in lines(student) if "loss" in line]
    assert {"main/ce", "spans/kl", "slot_1/agreement", "slot_4/agreement"} <= set(training[-1])
    assert training[-1]["slot_1/agreement"] > 0.5
    # Of one step, whose spans may be shorter than the longest; of some steps, all slots say something.
    assert all(any(line[f"slot_{j}/agreement"] is not None for line in training) for j in (2, 3, 4))
    evaluated = [line for line in lines(student) if "eval/main/ce" in line]
    assert [line["step"] for line in evaluated] == [5, 10]
    decoded = {name for name in evaluated[-1] if name.startswith("decoded/")}
    rates = {f"decoded/slot_{j}/{rate}" for j in (2, 3, 4) for rate in ("conditional", "cumulative")}
    assert decoded == {"decoded/tokens_per_pass", "decoded/tokens_per_pass_without_bonus", *rates}


@pytest.mark.optimised
def test_a_run_is_resumed_bit_for_bit_without_its_source(source, config, student, tmp_path, monkeypatch):
    """Stopped in between; what it started from is gone, and the lengths and offsets that were drawn are drawn again."""
    mine = shutil.copytree(source, tmp_path / "source")
    own = replace(config, objective__source=str(mine))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train.run(own, str(tmp_path / "stopped")).step == 3
    shutil.rmtree(mine)
    assert train.run(own, str(tmp_path / "stopped")).finished
    assert_bitwise(
        *(restored(path, open_workdir(str(path)).read_config())[0] for path in (tmp_path / "stopped", student))
    )
    assert comparable(tmp_path / "stopped") == comparable(student)


def test_another_teacher_is_refused(source, config, student, tmp_path):
    """One of other bits; and one that is not there."""
    mine = shutil.copytree(student, tmp_path / "run")
    longer = replace(open_workdir(str(mine)).read_config(), training__steps=12)
    other = tmp_path / "other"
    train.run(replace(open_workdir(str(source)).read_config(), training__seed=1), str(other))
    shutil.rmtree(mine / "teacher" / "checkpoints")
    with pytest.raises(ValueError, match="teacher: the teacher of this run is not there; put it back"):
        train.run(longer, str(mine))
    shutil.rmtree(mine / "teacher")
    shutil.copytree(other, mine / "teacher")
    with pytest.raises(ValueError, match=r"teacher: not the teacher of this run \(its parameters differ\)"):
        train.run(longer, str(mine))
    opened = open_run(str(mine))
    assert opened.step == 10  # to be used, a student needs none
    with pytest.raises(ValueError, match="not the teacher of this run"):
        evaluate.run(str(mine), split_name="validation")


@pytest.mark.slow
def test_killed_before_its_first_checkpoint_a_run_keeps_the_teacher_that_it_has_then(
    source, config, tmp_path, monkeypatch
):
    mine = shutil.copytree(source, tmp_path / "source")
    own = replace(config, objective__source=str(mine), training__steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            train.run(own, str(tmp_path / "run"))
    kept = teacher_folder(open_workdir(str(tmp_path / "run")))
    first = (kept.checkpoints / "0").stat().mtime
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        train.run(own, str(tmp_path / "run"))
    assert (kept.checkpoints / "0").stat().mtime == first
    assert not (tmp_path / "run" / "set_aside").exists()
    # Another one by then.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train.run(replace(open_workdir(str(mine)).read_config(), training__steps=12), str(mine))
    train.run(own, str(tmp_path / "run"))
    assert_bitwise(open_run(str(kept.path)).parameters, open_run(str(mine)).parameters)
    assert (tmp_path / "run" / "set_aside" / "teacher").exists()


@pytest.mark.slow
def test_a_student_may_go_to_school_again(student, config, tmp_path):
    """It is its own teacher then, masks left out; its mask embedding is where it was."""
    again = replace(config, objective__source=str(student), training__steps=2, optimizer__warmup_steps=1)
    train.run(again, str(tmp_path / "again"))
    assert "mask_embedding" not in open_run(str(tmp_path / "again" / "teacher")).parameters
    before, after = (open_run(str(path)).parameters["mask_embedding"] for path in (student, tmp_path / "again"))
    assert np.abs(np.asarray(before - after)).max() < 0.02


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads__num_heads": 2}, "heads.num_heads = 2: expected 0: the model itself drafts"),
        ({"objective__k_max": 8}, "objective.k_max = 8: expected less than the 8 slots of a region"),
        ({"objective__k_min": 5}, "objective.k_max = 4: expected at least k_min = 5"),
        ({"objective__regions": 5}, "objective.regions = 5: expected a divisor of training.sequence_length = 32"),
        ({"objective__source": ""}, "objective.source = '': expected a workdir"),
    ],
)
def test_what_cannot_be_trained_is_said(config, overrides, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        replace(config, **overrides)


def test_a_model_says_nothing_of_masks_by_itself(text_file, tmp_path):
    with pytest.raises(ValueError, match="model.mask_embedding = True: expected False without a run to start from"):
        tiny_config(model__mask_embedding=True)


def test_a_student_is_decoded_in_three_ways(student, tmp_path):
    plain = generate.run(str(student), ["the cat sat"], max_new_tokens=12, heads=0)[0]
    own = generate.run(str(student), ["the cat sat"], max_new_tokens=12, compare=True)[0]
    assert own.lossless and own.identical and own.tokens == plain.tokens and len(own.acceptance.conditional) == 3
    lossy = generate.run(str(student), ["the cat sat"], max_new_tokens=12, strategy="static", slots=2, compare=True)[0]
    assert not lossy.lossless and not lossy.failed and lossy.passes == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafter": "lookup", "strategy": "verified"}, "drafter = 'lookup': expected none with strategy = 'verified'"),
        ({"drafter": "masks", "strategy": "speculative"}, "drafter = 'masks': expected none with strategy"),
        ({"slots": 1000}, "slots = 1000: expected at most 32"),
        ({"drafter": "masks", "heads": 2}, "heads = 2: expected none with strategy = 'verified'"),
    ],
)
def test_a_student_is_not_asked_for_what_it_would_not_do(student, options, message):
    with pytest.raises(ValueError, match=message):
        open_run(str(student)).options(**options)


def test_a_model_without_masks_is_not_asked_to_fill_in_any(source, student):
    assert open_run(str(student)).options(drafter="masks").strategy == "verified"
    for strategy in ("static", "confident", "verified"):
        with pytest.raises(ValueError, match=f"strategy = '{strategy}': expected another, for .* was not trained"):
            open_run(str(source)).options(strategy=strategy, min_confidence=0.5)


def test_it_is_exported_as_it_writes_one_by_one(student, tmp_path):
    """Masks are no part of what others can read; that is said."""
    done = to_hf(str(student), str(tmp_path / "folder"), format="backbone")
    assert any("mask" in line for line in done.lines)
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["vocab_size"] == 300


@pytest.mark.slow
def test_killed_anywhere_a_run_ends_as_if_it_had_not_been(config, student, tmp_path):
    """SIGKILL while the teacher is kept, in the first steps, and after a checkpoint: the same bits in the end."""
    arguments = command(config, tmp_path / "run", logging__every_steps=1)
    run, moments = tmp_path / "run", []
    for there in (
        lambda: (run / "teacher").exists(),
        lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= 2,
        lambda: (run / "checkpoints" / "5").exists(),
    ):
        process = subprocess.Popen(arguments, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
        while process.poll() is None and not there():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        moments.append(process.wait())
    assert moments == [-signal.SIGKILL] * 3
    again = subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "resuming from step 5" in again.stderr
    both = [restored(path, open_workdir(str(path)).read_config())[0] for path in (run, student)]
    assert_bitwise(*both)
    assert_bitwise(*(open_run(str(path / "teacher")).parameters for path in (run, student)))
