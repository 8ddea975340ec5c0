"""Conversations that a model answers turn by turn, on its own history, and what is left of them when it is killed."""

import datetime
import json
import random
import shutil

import numpy as np
import pytest

from mtpd_jax import corpora, open_run
from mtpd_jax.corpora import turns_of
from tests.corpora import TEMPLATE, WORDS, contents, file_of, say, texts, write, written


@pytest.fixture
def small_shards(monkeypatch):
    """Two groups in a file, so that a few prompts fill several."""
    monkeypatch.setattr(corpora, "_GROUPS_PER_SHARD", 2)


@pytest.fixture(scope="module")
def talker(workdir, tmp_path_factory):
    """A run with a chat template."""
    folder = tmp_path_factory.mktemp("talker") / "run"
    shutil.copytree(workdir, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    config = json.loads((folder / "config.json").read_text())
    config["model"]["context"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_turns_are_what_stands_before_answers():
    system, one, two = say("system", "s"), say("user", "1"), say("user", "2")
    answer = say("assistant", "x")
    assert turns_of("text") == ("text",)
    assert turns_of([system, one, answer, two]) == ([system, one], [two])
    assert turns_of([one, two, answer]) == ([one, two],)
    assert turns_of([system, answer, one, answer]) == ([system, one],)
    assert turns_of([system, answer, one, two]) == ([system, one, two],)
    for nobody in ([system], [answer], [system, answer]):
        with pytest.raises(ValueError, match="no message asks"):
            turns_of(nobody)


def test_a_conversation_is_answered_on_its_own_history(talker, tmp_path):
    """Given answers are dropped; every turn is a row, with what the model itself said before it, unsupervised."""
    conversation = [say("user", "the cat"), say("assistant", "NEVER SEEN"), say("user", "a dog")]
    rows = [{"id": "two", "messages": conversation}, {"id": "one", "messages": [say("user", "the cat")]}]
    counts = write(talker, file_of(tmp_path / "p.jsonl", rows), tmp_path / "out", max_new_tokens=4)
    assert (counts.ok, counts.prompts) == (2, 2)
    run = open_run(str(talker))
    first, second = [row for row in written(tmp_path / "out") if row["id"] == "two"]
    assert (first["turn"], second["turn"], first["turns"], second["turns"]) == (0, 1, 2, 2)
    assert first["group"] == second["group"]
    ids, mask = np.array(first["ids"]), np.array(first["loss_mask"])
    assert run.tokenizer.decode(ids[mask == 0]) == "<user>the cat<assistant>"
    said = run.tokenizer.decode(ids[mask == 1])
    ids, mask = np.array(second["ids"]), np.array(second["loss_mask"])
    assert run.tokenizer.decode(ids[mask == 0]) == f"<user>the cat<assistant>{said}<user>a dog<assistant>"
    assert np.all(np.diff(mask) >= 0) and mask[-1] == 1


@pytest.mark.slow
def test_a_conversation_that_comes_to_no_end_fails_as_a_whole(talker, tmp_path):
    """Its second turn has no room: no row of it is written, and the others are."""
    rows = [
        {"id": "long", "messages": [say("user", "the cat"), say("user", "x")]},
        {"id": "fails", "messages": [say("user", "the"), say("assistant", ""), say("user", " cat sat" * 9)]},
        {"id": "none", "messages": [say("system", "the cat")]},
    ]
    counts = write(talker, file_of(tmp_path / "p.jsonl", rows), tmp_path / "out", max_new_tokens=8)
    assert (counts.ok, counts.failed, counts.skipped) == (1, 1, 1)
    left = {row["id"]: row for row in map(json.loads, (tmp_path / "out" / "left_out.jsonl").open())}
    assert left["fails"]["status"] == "failed" and "turn 1" in left["fails"]["reason"]
    assert left["none"]["status"] == "skipped" and {row["id"] for row in written(tmp_path / "out")} == {"long"}


@pytest.mark.slow
def test_a_stop_string_is_not_part_of_the_history(talker, tmp_path):
    """As whoever reads an answer sees it: cut before the string."""
    rows = [{"id": k, "messages": [say("user", "the"), say("user", "cat"), say("assistant", ""), say("user", "b")]}
            for k in range(32)]  # fmt: skip
    write(talker, file_of(tmp_path / "p.jsonl", rows), tmp_path / "out", max_new_tokens=12, stop=["a"])
    run, stopped = open_run(str(talker)), 0
    found = written(tmp_path / "out")
    for first, second in zip(found[::2], found[1::2], strict=True):
        (_, said), (given, _) = (texts_of(run, row) for row in (first, second))
        assert given == f"<user>the<user>cat<assistant>{said.split('a')[0]}<user>b<assistant>"
        stopped += first["finish"] == "stop"
    assert stopped


def texts_of(run, row):
    """What stood before an answer, and the answer."""
    ids, mask = np.array(row["ids"]), np.array(row["loss_mask"])
    return run.tokenizer.decode(ids[mask == 0]), run.tokenizer.decode(ids[mask == 1])


@pytest.mark.slow
def test_a_template_that_writes_the_day_writes_the_first_one(talker, tmp_path, monkeypatch):
    """A run that goes on after midnight ends with the bytes of one that did not."""
    other = shutil.copytree(talker, tmp_path / "run")
    (other / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ strftime_now('%S') }}" + TEMPLATE}))
    prompts = file_of(tmp_path / "p.jsonl", [{"id": k, "messages": [say("user", WORDS[k])]} for k in range(9)])
    options = {"max_new_tokens": 3, "batch_size": 1}
    counts = write(other, prompts, tmp_path / "out", **options)
    whole = contents(tmp_path / "out")

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + datetime.timedelta(seconds=7)

    monkeypatch.setattr(datetime, "datetime", Later)
    path = tmp_path / "out" / "generations-00000.jsonl"
    path.write_bytes(path.read_bytes()[:300])
    assert write(other, prompts, tmp_path / "out", **options) == counts
    assert contents(tmp_path / "out") == whole
    write(other, prompts, tmp_path / "later", **options)
    assert contents(tmp_path / "later") != whole


@pytest.mark.slow
def test_half_a_conversation_is_taken_back(talker, tmp_path):
    rows = [{"id": k, "messages": [say("user", "a"), say("assistant", ""), say("user", "b")]} for k in range(3)]
    prompts = file_of(tmp_path / "p.jsonl", rows)
    counts = write(talker, prompts, tmp_path / "out", max_new_tokens=3)
    whole = contents(tmp_path / "out")
    path = tmp_path / "out" / "generations-00000.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 6
    path.write_text("".join(lines[:3]))
    assert write(talker, prompts, tmp_path / "out", max_new_tokens=3) == counts
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}{{ messages | length }}",
        "{% if add_generation_prompt %}ask{% endif %}{{ messages[-1].content }}",
        # Without a word for it: the model would have to write the beginning of its own turn.
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_that_does_not_say_where_answers_begin_is_refused(template, talker, tmp_path):
    other = shutil.copytree(talker, tmp_path / "run")
    (other / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    rows = [{"messages": [say("user", "a")]}]
    with pytest.raises(ValueError, match="not known what the model writes"):
        write(other, file_of(tmp_path / "p.jsonl", rows), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_was_killed_anywhere_is_gone_on_with_across_files(small_shards, talker, tmp_path):
    """Of several files, and of prompts that fail or are skipped: whatever was there of the last file and of those."""
    failing = [say("user", "the"), say("assistant", ""), say("user", " cat sat" * 20)]
    conversation = [say("user", "a"), say("assistant", ""), say("user", "b")]
    rows = [{"id": f"two{k}", "messages": conversation} for k in range(3)]
    rows += [{"id": f"fails{k}", "messages": failing} for k in range(2)] + texts(4) + [{"id": "none", "prompt": ""}]
    prompts = file_of(tmp_path / "p.jsonl", rows)
    options = {"batch_size": 1, "max_new_tokens": 4}
    counts = write(talker, prompts, tmp_path / "whole", **options)
    assert (counts.ok, counts.failed, counts.skipped) == (7, 2, 1)
    whole = contents(tmp_path / "whole")
    shards = sorted(name for name in whole if name.startswith("gen"))
    assert len(shards) > 1
    rng = random.Random(0)
    for number, shard in enumerate(shards):
        left = shutil.copytree(tmp_path / "whole", tmp_path / f"left{number}")
        for later in shards[number + 1 :]:
            (left / later).unlink()
        for name in (shard, "left_out.jsonl"):
            (left / name).write_bytes(whole[name][: rng.randrange(len(whole[name]))])
        assert write(talker, prompts, left, **options) == counts
        found = contents(left)
        # Which prompts are without an answer is noted as they turn up.
        noted = [sorted(one.pop("left_out.jsonl").splitlines()) for one in (found, dict(whole))]
        assert noted[0] == noted[1] and found == {k: v for k, v in whole.items() if k != "left_out.jsonl"}
