"""Whole runs: resumed equals uninterrupted, whatever stopped them; and what a run leaves behind."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
import tokenizers

from mtpd_jax import evaluate, train
from mtpd_jax.data.sources import held_out
from mtpd_jax.evaluation.scoring import Scorer
from mtpd_jax.run import open_run
from mtpd_jax.runs.workdir import Workdir
from mtpd_jax.sharding import make_mesh
from mtpd_jax.training.state import DivergedError
from tests.builders import assert_trees_close, replace, tiny_config
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
def run_config(text_file):
    return tiny_config(
        data__source="text", data__paths=(text_file,), evaluation__every_steps=10, optimizer__ema_decay=0.9
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(run_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    result = train.run(run_config, str(workdir))
    assert result.finished and result.step == 20
    return workdir


@pytest.mark.optimised
def test_interrupted_equals_uninterrupted(run_config, uninterrupted, tmp_path, monkeypatch, capsys):
    """7 steps, a stop, 13 steps: the same bits, the same order of data, the same metrics."""
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        result = train.run(run_config, str(tmp_path))
    assert (result.step, result.finished, result.signal) == (7, False, signal.SIGTERM)
    capsys.readouterr()
    result = train.run(run_config, str(tmp_path))
    assert "resuming from step 7 of 20" in capsys.readouterr().err
    assert result.finished
    expected, record = restored(uninterrupted, run_config)
    found, found_record = restored(tmp_path, run_config)
    assert_bitwise(found, expected)
    assert found_record["data"] == record["data"] and found_record["tokens"] == record["tokens"] == result.tokens
    assert comparable(tmp_path) == comparable(uninterrupted)


@pytest.mark.optimised
def test_training_on_while_a_checkpoint_is_written_does_not_change_it(run_config, uninterrupted, tmp_path, monkeypatch):
    """Step 10 as saved in the background of a run that went on equals step 10 of a run that stopped there."""
    stop_after(monkeypatch, 10)
    train.run(run_config, str(tmp_path))
    assert_bitwise(restored(uninterrupted, run_config, step=10)[0], restored(tmp_path, run_config)[0])


def test_what_is_evaluated_is_the_average(run_config, uninterrupted):
    """And it is what the evaluation in training scored."""
    state, _ = restored(uninterrupted, run_config)
    opened = open_run(str(uninterrupted))
    assert_bitwise(jax.device_get(opened.parameters), state.average)
    assert np.any(state.average["embedding"] != state.parameters["embedding"])
    score = evaluate.run(str(uninterrupted), split_name="validation", limit=2, batch_size=8).text["validation"]
    assert score.main.ce == pytest.approx(lines(uninterrupted)[-1]["eval/main/ce"], rel=1e-5)


def test_the_tokenizer_has_not_seen_held_out_text(tmp_path):
    """Whole runs: a word that only held-out documents have is no token."""
    texts = [f"common words {number} " + "and many more of them " * 5 for number in range(120)]
    texts = [text + " zyxwvut" * 20 if held_out(text + " zyxwvut" * 20, 0.2) else text for text in texts]
    assert 5 < sum("zyxwvut" in text for text in texts) < 60
    (tmp_path / "texts.txt").write_text("<|endoftext|>".join(texts))
    config = tiny_config(
        data__source="text", data__paths=(str(tmp_path / "texts.txt"),), training__steps=3, mesh__data=1,
        training__batch_size=1,
    )  # fmt: skip
    train.run(config, str(tmp_path / "run"))
    words = json.loads((tmp_path / "run" / "tokenizer.json").read_text())["model"]["vocab"]
    assert any("common" in word for word in words)
    assert not any("zyx" in word for word in words)


def test_ids_without_a_row_in_the_embedding_are_refused(run_config, tmp_path):
    """A vocabulary of few ids with gaps: what counts is the largest."""
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "the": 7, "<|endoftext|>": 5000}, "a"))
    tokens.save(str(tmp_path / "gaps.json"))
    config = replace(run_config, tokenizer__path=str(tmp_path / "gaps.json"))
    with pytest.raises(ValueError, match=r"vocabulary_size = 300: expected at least 5001, .*largest id is 5000"):
        train.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_in_a_bucket_writes_locally_and_uploads(run_config, uninterrupted, tmp_path, monkeypatch):
    """The same files in the same place, from a folder where nothing can be appended to."""
    monkeypatch.setattr(Workdir, "remote", True)
    with monkeypatch.context() as patch:
        stop_after(patch, 12)
        train.run(run_config, str(tmp_path))
    assert lines(tmp_path)[-1]["step"] == 10
    train.run(run_config, str(tmp_path))
    assert comparable(tmp_path) == comparable(uninterrupted)
    assert len(list((tmp_path / "tb").glob("events*"))) == 2


def test_metrics_beyond_the_restored_step_are_dropped(run_config, uninterrupted, tmp_path):
    """As after a crash between two checkpoints, the last line cut short."""
    shutil.copytree(uninterrupted, tmp_path / "copy")
    with (tmp_path / "copy" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss": 1.0}\n{"step": 22, "lo')
    train.run(run_config, str(tmp_path / "copy"))
    assert comparable(tmp_path / "copy") == comparable(uninterrupted)


def test_a_finished_run_says_so(run_config, uninterrupted, capsys):
    before = (uninterrupted / "metrics.jsonl").read_text()
    assert train.run(run_config, str(uninterrupted)).finished
    assert "already finished, at step 20 of 20" in capsys.readouterr().err
    assert (uninterrupted / "metrics.jsonl").read_text() == before


def test_a_finished_run_is_told_how_far_to_decode(run_config, uninterrupted, tmp_path):
    """What decoding takes from the config may still change; how it was trained is not rewritten."""
    shutil.copytree(uninterrupted, tmp_path / "copy")
    wider = replace(run_config, model__context=200, tokenizer__more_end_tokens=("a",), evaluation__every_steps=7)
    assert train.run(wider, str(tmp_path / "copy")).finished
    config = open_run(str(tmp_path / "copy")).config
    assert config.context == 200 and config.tokenizer.more_end_tokens == ("a",)
    assert config.evaluation == run_config.evaluation


def test_old_checkpoints_are_dropped_and_versions_kept(run_config, uninterrupted, tmp_path):
    every_step = replace(run_config, training__steps=6, checkpoint__every_steps=1, checkpoint__keep=3)
    train.run(every_step, str(tmp_path))
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [4, 5, 6]
    record = restored(uninterrupted, run_config)[1]
    assert record["config"] == json.loads((uninterrupted / "config.json").read_text())
    assert record["versions"]["jax"] == jax.__version__


def test_another_config_is_refused_by_name(run_config, uninterrupted, tmp_path):
    other = replace(run_config, optimizer__learning_rate=1.0, heads__num_heads=1)
    with pytest.raises(ValueError, match="heads.num_heads, optimizer.learning_rate differ"):
        train.run(other, str(uninterrupted))
    more = replace(run_config, training__steps=22, logging__every_steps=1)
    shutil.copytree(uninterrupted, tmp_path / "copy")
    assert train.run(more, str(tmp_path / "copy")).step == 22


@pytest.mark.parametrize(
    "context", [contextlib.nullcontext, lambda mesh: mesh, jax.set_mesh], ids=["none", "with", "set"]
)
@pytest.mark.parametrize("shape", [(2, 2, 2, 1), (1, 4, 2, 1)], ids=str)
def test_restores_onto_another_mesh(run_config, uninterrupted, shape, context):
    """Also inside a context of a mesh, this one or another, that whoever calls has entered."""
    other = replace(
        run_config, **dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor", "mesh__expert"), shape, strict=True))
    )
    expected = restored(uninterrupted, run_config)[0]
    with context(make_mesh(other.mesh)):
        found, _ = restored(uninterrupted, other, mesh=make_mesh(other.mesh))
        assert_bitwise(found, expected)
        assert_bitwise(jax.device_get(open_run(str(uninterrupted)).parameters), expected.average)


@pytest.mark.slow
def test_resumes_on_another_mesh(run_config, uninterrupted, tmp_path, monkeypatch):
    """All but one step on eight copies, the last one on 2x2x2: equal to a tolerance."""
    with monkeypatch.context() as patch:
        stop_after(patch, 19)
        train.run(run_config, str(tmp_path))
    assert train.run(replace(run_config, mesh__data=2, mesh__fsdp=2, mesh__tensor=2), str(tmp_path)).finished
    found, expected = (restored(workdir, run_config, step=20)[0] for workdir in (tmp_path, uninterrupted))
    # The first moments are linear in the gradients; the parameters after Adam are not compared, for a gradient near
    # zero may flip a whole step.
    moments = [state.optimizer[1][0].mu for state in (found, expected)]
    assert_trees_close(*moments, 1e-4)


def test_fewer_steps_than_done_change_nothing(run_config, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "copy")
    result = train.run(replace(run_config, training__steps=15), str(tmp_path / "copy"))
    assert result.finished and result.step == 20
    assert (tmp_path / "copy" / "config.json").read_text() == (uninterrupted / "config.json").read_text()


def test_killed_before_anything_was_there_it_begins_anew(run_config, tmp_path):
    """What is left by a kill between the first file's temporary name and its own."""
    (tmp_path / "config.json.0b5e.tmp").write_text("{")
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)  # of a folder that was deleted meanwhile
    assert train.run(replace(run_config, training__steps=3), str(tmp_path)).finished


@pytest.mark.slow
@pytest.mark.optimised
def test_interrupted_equals_uninterrupted_on_a_mesh(run_config, tmp_path, monkeypatch):
    """Bit for bit where parameters, batch and attention heads are split, too."""
    split = replace(run_config, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, training__steps=8)
    train.run(split, str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train.run(split, str(tmp_path / "parts"))
    train.run(split, str(tmp_path / "parts"))
    mesh = make_mesh(split.mesh)
    assert_bitwise(*(restored(tmp_path / name, split, mesh=mesh)[0] for name in ("whole", "parts")))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_one_clear_error(run_config, tmp_path):
    train.run(replace(run_config, training__steps=5), str(tmp_path))
    for path in (tmp_path / "checkpoints" / "5" / "parameters").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint that can be used: step 5: not readable") as error:
        train.run(replace(run_config, training__steps=6), str(tmp_path))
    assert "delete" not in str(error.value) and "before" not in str(error.value)  # there is none before


def test_a_loss_that_is_not_finite_stops_the_run(run_config, tmp_path, monkeypatch):
    broken = replace(run_config, checkpoint__every_steps=2, training__steps=8)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        train.run(broken, str(tmp_path))
    real = train.make_step

    def poisoned(*arguments):
        step = real(*arguments)

        def run(state, batch):
            state, result = step(state, batch)
            return state, result.replace(grad_norm=result.grad_norm * float("nan")) if int(state.step) == 6 else result

        return run

    monkeypatch.setattr(train, "make_step", poisoned)
    with pytest.raises(DivergedError, match=r"step 6: .*last good checkpoint is step 4"):
        train.run(broken, str(tmp_path))


def test_stopped_in_an_evaluation_it_is_done_after_resuming(run_config, tmp_path, monkeypatch, uninterrupted):
    """SIGTERM is heeded between the batches of an evaluation, not only between steps."""
    real = Scorer.sum_documents

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "sum_documents", interrupted)
        result = train.run(run_config, str(tmp_path))
    assert (result.step, result.signal) == (10, signal.SIGTERM)
    assert not any("eval/main/ce" in line for line in lines(tmp_path))
    train.run(run_config, str(tmp_path))
    assert comparable(tmp_path) == comparable(uninterrupted)


@pytest.mark.slow
def test_stopped_in_the_last_evaluation_a_run_is_not_finished(run_config, uninterrupted, tmp_path, monkeypatch, capsys):
    """It says so, and the same command does what is left."""
    real, calls = Scorer.sum_documents, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "sum_documents", interrupted)
        result = train.run(run_config, str(tmp_path))
    assert (result.step, result.finished, result.signal) == (20, False, signal.SIGTERM)
    assert "saved step 20; its evaluation was cut short: the same command does it again" in capsys.readouterr().err
    assert "eval/main/ce" not in lines(tmp_path)[-1]
    assert train.run(run_config, str(tmp_path)).finished
    assert comparable(tmp_path) == comparable(uninterrupted)


def test_a_signal_that_comes_too_late_is_not_lost(run_config, tmp_path, monkeypatch):
    """A finished run says that it was asked to stop, so that whoever called it does not go on with other work."""
    real = train.Checkpointer.wait
    monkeypatch.setattr(train.Checkpointer, "wait", lambda self: (os.kill(os.getpid(), signal.SIGTERM), real(self))[1])
    result = train.run(replace(run_config, training__steps=3), str(tmp_path))
    assert result.finished and result.signal == signal.SIGTERM
    monkeypatch.setattr("sys.argv", ["train"])
    monkeypatch.setattr(train, "run", lambda *_, **__: result)
    monkeypatch.setattr(
        train.frontdoor, "parse_config_flags", lambda *_: train.frontdoor.TrainFlags(None, "", "newest", False)
    )
    assert train.main() == 0


def test_a_state_is_saved_before_it_is_evaluated(run_config, tmp_path, monkeypatch):
    """Data that end an evaluation take nothing of the run with them."""
    monkeypatch.setattr(Scorer, "sum_documents", lambda *_: (_ for _ in ()).throw(ValueError("was changed")))
    with pytest.raises(ValueError, match="was changed"):
        train.run(run_config, str(tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["10"]


@pytest.mark.slow
def test_a_run_that_diverges_ends(run_config, tmp_path):
    """A real process: what is still on its way through the devices, with weights that are no numbers, ends as well."""
    wild = command(run_config, tmp_path / "run", optimizer__learning_rate=1e10, optimizer__warmup_steps=0)
    found = subprocess.run(wild, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert re.search(r"^error: step \d+: .* (nan|inf)", found.stderr.splitlines()[-1])
    assert found.stderr.count("error:") == 1 and "Traceback" not in found.stderr


@pytest.mark.optimised
def test_sigterm_saves_then_exits(run_config, uninterrupted, tmp_path, capsys):
    """A real process, a real signal; the same run then ends with the uninterrupted one's parameters."""
    slow = command(run_config, tmp_path / "run", checkpoint__every_steps=1000, logging__every_steps=1)
    process = subprocess.Popen(slow, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode in (128 + signal.SIGTERM, 0), errors
    assert process.returncode == 128 + signal.SIGTERM, "the run ended before the signal came"
    assert "asked to stop; saved step" in errors and "Traceback" not in errors
    train.run(replace(run_config, checkpoint__every_steps=1000, logging__every_steps=1), str(tmp_path / "run"))
    assert "resuming from step" in capsys.readouterr().err
    assert_bitwise(restored(tmp_path / "run", run_config)[0], restored(uninterrupted, run_config)[0])


KILLED_IN_A_SAVE = """
    import os, signal, sys
    from orbax.checkpoint._src.path import atomicity  # imported first, so that it uses the functions patched here
    real = os.rename
    def rename(source, target, **options):
        if str(target).rstrip("/").endswith("checkpoints/10"):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(source, target, **options)
    os.rename = os.replace = rename
    from mtpd_jax import frontdoor, train
    frontdoor.guarded(train.main)
"""


@pytest.mark.optimised
def test_kill_in_the_middle_of_a_save(run_config, uninterrupted, tmp_path, capsys):
    """Killed when the files of step 10 are written and not yet renamed, a run goes on from step 5."""
    arguments = command(run_config, tmp_path / "run", checkpoint__every_steps=5)[3:]
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED_IN_A_SAVE), *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert "5" in names and "10" not in names
    assert any(name.startswith("10.") for name in names), "it was not killed in the middle of a save"
    # From here on step 10 is not saved any more, which would replace what is left of it.
    train.run(replace(run_config, checkpoint__every_steps=15), str(tmp_path / "run"))
    assert "resuming from step 5" in capsys.readouterr().err
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"15", "20"}, left  # nothing of the save that was killed
    assert_bitwise(restored(tmp_path / "run", run_config)[0], restored(uninterrupted, run_config)[0])
    assert comparable(tmp_path / "run") == comparable(uninterrupted)
