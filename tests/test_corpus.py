"""The command that writes a model's own answers: what is written, in which order, and after which accidents."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mtpd_jax import corpus, open_run
from mtpd_jax.corpora import Corpus
from mtpd_jax.data.generations import GenerationsData
from mtpd_jax.data.prompts import read_prompts
from mtpd_jax.data.written import validate
from mtpd_jax.run import Run
from mtpd_jax.runs.lock import take_lock
from mtpd_jax.runs.workdir import open_workdir
from tests.corpora import contents, file_of, say, texts, write, written
from tests.runs.runs import ROOT, environment


@pytest.fixture(scope="module")
def answers(workdir, tmp_path_factory):
    """Thirty prompts, two of which cannot be answered; sampled, four at a time."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [*texts(28), {"id": "long", "prompt": "the cat sat " * 20}, {"id": "empty", "prompt": ""}]
    file_of(folder / "prompts.jsonl", rows)
    counts = write(workdir, folder / "prompts.jsonl", folder / "whole")
    return folder, counts


def test_every_prompt_is_accounted_for(answers):
    folder, counts = answers
    assert (counts.ok, counts.failed, counts.skipped, counts.prompts) == (28, 0, 2, 30)
    found = written(folder / "whole")
    assert sorted(row["id"] for row in found) == sorted(f"p{k}" for k in range(28))
    assert counts.tokens == sum(sum(row["loss_mask"]) for row in found)
    left = [json.loads(line) for line in (folder / "whole" / "left_out.jsonl").open()]
    assert [(row["id"], row["status"]) for row in left] == [("long", "skipped"), ("empty", "skipped")]
    assert "there is room for 22" in left[0]["reason"]
    assert validate(folder / "whole") == counts


def test_a_row_is_the_prompts_ids_and_what_decoding_writes_after_them(answers, workdir):
    """With the ids as they are; an end token is supervised where there is one, and none is added."""
    folder, _ = answers
    run = open_run(str(workdir))
    by_id = {row["id"]: row for row in written(folder / "whole")}
    for prompt in texts(28):
        row, ids = by_id[prompt["id"]], run.tokenizer.encode_prompt(prompt["prompt"]).tolist()
        assert row["ids"][: len(ids)] == ids and row["loss_mask"] == [0] * len(ids) + [1] * (len(row["ids"]) - len(ids))
        ended = row["ids"][-1] == run.tokenizer.end_id
        assert row["finish"] == ("end" if ended else "length") and (ended or sum(row["loss_mask"]) == 10)
        assert run.tokenizer.end_id not in row["ids"][:-1]
    assert len({tuple(row["ids"]) for row in by_id.values()}) == 28
    source = GenerationsData(path=str(folder / "whole")).open()
    assert len(source) == 28 and source.tokenizer_digest == run.tokenizer.digest


@pytest.mark.slow
def test_an_answer_depends_on_its_prompt_and_id_alone(answers, workdir, tmp_path):
    """Neither on the order of prompts, nor on those beside it, nor on how many are decoded together; greedily not on
    who drafts, either."""
    folder, _ = answers
    expected = {row["id"]: row for row in written(folder / "whole")}
    rows = texts(28)
    random.Random(1).shuffle(rows)
    write(workdir, file_of(tmp_path / "shuffled.jsonl", rows), tmp_path / "shuffled")
    assert (
        contents(tmp_path / "shuffled")["generations-00000.jsonl"]
        == contents(folder / "whole")["generations-00000.jsonl"]
    )
    few = file_of(tmp_path / "few.jsonl", rows[:9])
    write(workdir, few, tmp_path / "few", batch_size=2)
    assert all(row == expected[row["id"]] for row in written(tmp_path / "few"))
    write(workdir, tmp_path / "few.jsonl", tmp_path / "other", seed=1)
    assert all(row["ids"] != expected[row["id"]]["ids"] for row in written(tmp_path / "other"))
    for name, heads in {"drafted": 2, "plain": 0}.items():
        write(workdir, few, tmp_path / name, sampling=None, heads=heads)
    assert written(tmp_path / "drafted") == written(tmp_path / "plain")


@pytest.mark.slow
def test_the_same_prompt_with_another_id_has_another_answer(workdir, tmp_path):
    rows = [{"id": k, "prompt": "the cat"} for k in range(6)]
    write(workdir, file_of(tmp_path / "prompts.jsonl", rows), tmp_path / "out")
    assert len({tuple(row["ids"]) for row in written(tmp_path / "out")}) == 6
    assert len({row["group"] for row in written(tmp_path / "out")}) == 1  # and is held out with them, or not


@pytest.mark.parametrize("cut", [0, 1, 700, 1500, 2100, -1, -40])
def test_what_a_killed_process_left_is_gone_on_with(cut, answers, workdir, tmp_path):
    """To the byte, whatever was on disk: nothing, half a line, a part of a group."""
    folder, counts = answers
    left = shutil.copytree(folder / "whole", tmp_path / "left")
    path = left / "generations-00000.jsonl"
    path.write_bytes(path.read_bytes()[:cut])
    assert write(workdir, folder / "prompts.jsonl", left) == counts
    assert contents(left) == contents(folder / "whole")


def test_nothing_is_done_twice(answers, workdir, monkeypatch):
    folder, counts = answers
    monkeypatch.setattr(Corpus, "_answers", None)
    assert write(workdir, folder / "prompts.jsonl", folder / "whole") == counts


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"max_new_tokens": 9}, "decoding"),
        ({"batch_size": 3}, "batch_size"),
        ({"stop": ("a",)}, "stop"),
    ],
)
def test_other_options_are_another_corpus(options, field, answers, workdir):
    folder, _ = answers
    before = contents(folder / "whole")
    with pytest.raises(ValueError, match=f"holds other generations: {field} differs; use another --output"):
        write(workdir, folder / "prompts.jsonl", folder / "whole", **options)
    assert contents(folder / "whole") == before


def test_other_prompts_and_other_weights_are_another_corpus(answers, workdir, tmp_path):
    folder, _ = answers
    with pytest.raises(ValueError, match="holds other generations: prompts, rows differ"):
        write(workdir, file_of(tmp_path / "prompts.jsonl", texts(5)), folder / "whole")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("")
    with pytest.raises(ValueError, match="exists and holds no generations"):
        write(workdir, folder / "prompts.jsonl", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]
    # Another end of texts, or more room for them.
    other = shutil.copytree(workdir, tmp_path / "run")
    config = json.loads((other / "config.json").read_text())
    config["tokenizer"]["more_end_tokens"] = ["cat"]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds other generations: config differs"):
        write(other, folder / "prompts.jsonl", folder / "whole")
    manifest = json.loads((folder / "whole" / "manifest.json").read_text())
    shutil.copytree(folder / "whole", tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps({**manifest, "weights": "0"}))
    with pytest.raises(ValueError, match="weights differs"):
        write(workdir, folder / "prompts.jsonl", tmp_path / "copy")


@pytest.mark.slow
def test_a_folder_without_answers_is_begun_anew(answers, workdir, tmp_path):
    """As one is whose first batch did not fit into memory, say."""
    folder, counts = answers
    left = tmp_path / "left"
    shutil.copytree(folder / "whole", left)
    (left / "generations-00000.jsonl").unlink()
    assert write(workdir, folder / "prompts.jsonl", left, batch_size=2) == counts
    assert json.loads((left / "manifest.json").read_text())["batch_size"] == 2


def test_what_cannot_be_decoded_creates_nothing(workdir, tmp_path):
    prompts = file_of(tmp_path / "p.jsonl", texts(2))
    for options, words in (
        ({"max_new_tokens": 32}, "context"),
        ({"min_confidence": 0.5, "drafter": "lookup"}, "min_confidence"),
        ({"limit": 0}, "limit = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
    ):
        with pytest.raises(ValueError, match=words):
            write(workdir, prompts, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="expected a local folder"):
        write(workdir, prompts, "gs://bucket/out")
    file_of(tmp_path / "q.jsonl", texts(2))
    with pytest.raises(ValueError, match="expected one file, and 2 match"):
        write(workdir, tmp_path / "?.jsonl", tmp_path / "out")
    with pytest.raises(ValueError, match="no chat template"):
        write(workdir, file_of(tmp_path / "c.jsonl", [{"messages": [say("user", "a")]}]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_prompt_is_none_where_texts_begin_with_a_token(workdir, tmp_path, monkeypatch):
    encode = Run.encode
    monkeypatch.setattr(Run, "encode", lambda run, prompt: np.append(np.int32(7), encode(run, prompt)))
    rows = [{"id": "empty", "prompt": ""}, {"id": "one", "prompt": "the"}]
    counts = write(workdir, file_of(tmp_path / "p.jsonl", rows), tmp_path / "out")
    assert (counts.ok, counts.skipped) == (1, 1) and written(tmp_path / "out")[0]["id"] == "one"


def test_ids_stand_once(workdir, tmp_path):
    rows = [{"id": "a", "prompt": "the"}, {"id": "b", "prompt": "cat"}, {"id": "a", "prompt": "dog"}]
    with pytest.raises(ValueError, match="lines 1 and 3 have the same id 'a'"):
        write(workdir, file_of(tmp_path / "prompts.jsonl", rows), tmp_path / "out")
    same = file_of(tmp_path / "same.jsonl", [{"prompt": "the"}, {"prompt": "the", "of": 2}])
    assert len({row.id for row in read_prompts(same)}) == 2
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"id": "\\ud800", "prompt": "the"}\n')
    with pytest.raises(ValueError, match="line 1: id: character 0"):
        write(workdir, odd, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_write_one_folder(answers, workdir):
    folder, _ = answers
    with take_lock(open_workdir(str(folder / "whole"))):
        with pytest.raises(ValueError, match="has been at work here"):
            write(workdir, folder / "prompts.jsonl", folder / "whole")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines + lines[:1], "stands there twice"),
        (lambda lines: [*lines[:3], lines[3].replace('"loss_mask": [0', '"loss_mask": [2')], "not a whole row"),
        (lambda lines: ["{}\n", *lines], "no row of generations"),
        (lambda lines: lines[:-1], "accounts for 29 of 30 prompts"),
        (lambda lines: [*lines[:-1], lines[-1][:-1]], "ends within a row"),
        (lambda lines: [*lines[:-1], lines[-1].replace('"turns": 1', '"turns": 2')], "ends within a conversation"),
        (lambda lines: [lines[0].replace('"turns": 1', '"turns": 2'), *lines[1:]], "lacks a turn"),
        (lambda lines: [*lines[:-2], lines[-2].replace('"turns": 1', '"turns": 2'), lines[-1]], "lacks a turn"),
    ],
)
def test_what_is_damaged_is_found(change, words, answers, tmp_path):
    folder, _ = answers
    broken = shutil.copytree(folder / "whole", tmp_path / "broken")
    path = broken / "generations-00000.jsonl"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    with pytest.raises(ValueError, match=words):
        validate(broken)


def test_damage_that_no_kill_leaves_is_not_cut_off(answers, workdir, tmp_path):
    folder, _ = answers
    broken = shutil.copytree(folder / "whole", tmp_path / "broken")
    path = broken / "generations-00000.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-2], lines[-2].replace('"turns": 1', '"turns": 2'), lines[-1]]))
    before = contents(broken)
    with pytest.raises(ValueError, match="lacks a turn"):
        write(workdir, folder / "prompts.jsonl", broken)
    assert contents(broken) == before


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"id": "empty", "status": "skipped"}, "expected each id once"),
        ({"id": "x", "status": "lost"}, "expected each id once, and its status"),
        ({"id": "x"}, "no prompt that was left out"),
    ],
)
def test_damaged_notes_of_what_is_left_out_are_found(line, words, answers, tmp_path):
    folder, _ = answers
    broken = shutil.copytree(folder / "whole", tmp_path / "broken")
    with (broken / "left_out.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=f"line 3: .*{words}"):
        validate(broken)


def test_a_manifest_that_says_nothing_is_no_manifest(answers, tmp_path):
    folder, _ = answers
    broken = shutil.copytree(folder / "whole", tmp_path / "broken")
    (broken / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="rows = None: expected the number of prompts"):
        validate(broken)


# The command.


def test_the_command_previews_writes_and_validates(answers, workdir, tmp_path, capsys, monkeypatch):
    folder, counts = answers

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["corpus", *flags])
        return corpus.main()

    common = [f"--workdir={workdir}", f"--prompts={folder / 'prompts.jsonl'}", "--max_new_tokens=10", "--temperature=1"]
    assert call(*common, "--preview=2", "--batch_size=4", f"--json={tmp_path / 'preview.json'}") == 0
    previewed = json.loads((tmp_path / "preview.json").read_text())
    assert len(previewed["rows"]) >= 2 and all(sum(row["loss_mask"]) for row in previewed["rows"])
    shown = capsys.readouterr().out
    assert "p0 turn 0: " in shown and "10 supervised" in shown and "p2 turn" not in shown
    assert "long: no answer: " in shown and "empty: no answer: " in shown
    only = file_of(tmp_path / "only.jsonl", [{"id": "empty", "prompt": ""}])
    assert call(common[0], f"--prompts={only}", "--max_new_tokens=10", "--preview=1") == 0
    assert capsys.readouterr().out == "empty: no answer: empty: there is nothing to continue\n"
    with pytest.raises(ValueError, match="preview = -1"):
        call(*common, "--preview=-1")
    assert call(*common, "--batch_size=4", f"--output={tmp_path / 'out'}", f"--json={tmp_path / 'c.json'}") == 0
    assert "28 prompts answered, 0 failed, 2 skipped, together 30" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(folder / "whole")
    assert json.loads((tmp_path / "c.json").read_text())["tokens"] == counts.tokens
    assert call(f"--validate={tmp_path / 'out'}") == 0
    with pytest.raises(ValueError, match="--output is missing"):
        call(*common)


@pytest.mark.slow
def test_ten_kills_leave_the_bytes_of_an_undisturbed_run(workdir, tmp_path):
    """SIGKILL at random moments of writing, and once more without."""
    rows = [*texts(160), *({"id": f"long{k}", "prompt": "the cat sat " * 20} for k in range(40))]
    prompts = file_of(tmp_path / "prompts.jsonl", rows)

    def command(output):
        return [sys.executable, "-m", "mtpd_jax.corpus", f"--workdir={workdir}", f"--prompts={prompts}",
                f"--output={output}", "--max_new_tokens=20", "--temperature=1", "--batch_size=2"]  # fmt: skip

    options = {"cwd": ROOT, "env": environment(), "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command(tmp_path / "whole"), check=True, **options)
    rng, shard, sizes = random.Random(0), tmp_path / "killed" / "generations-00000.jsonl", []
    whole = (tmp_path / "whole" / "generations-00000.jsonl").stat().st_size
    for kill in range(10):
        process = subprocess.Popen(command(tmp_path / "killed"), **options)
        enough, deadline = whole * (kill + rng.random()) / 11, time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if shard.exists() and shard.stat().st_size >= enough:
                break
            time.sleep(0.001 * rng.random())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        sizes.append(shard.stat().st_size)
    assert len(set(sizes)) >= 8 and sizes[-1] < whole
    subprocess.run(command(tmp_path / "killed"), check=True, **options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
