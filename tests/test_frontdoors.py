"""The commands as a user types them: what they print and write, and one clear line for every mistake."""

import json
import pathlib
import shutil

import pytest

from configs import base
from mtpd_jax import evaluate, frontdoor, generate, train
from mtpd_jax.decoding.decoder import Decoder
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.evaluation import generation as generation_module
from mtpd_jax.evaluation.comparison import Divergence
from mtpd_jax.evaluation.scoring import Scorer
from mtpd_jax.run import open_run

DOORS = {"train": train, "generate": generate, "evaluate": evaluate}


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a front door in this process; returns (exit status, standard output, standard error)."""

    def run(door, *arguments):
        monkeypatch.setattr("sys.argv", [door, *map(str, arguments)])
        status = frontdoor.status_of(DOORS[door].main)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def assert_one_line(outcome, *words):
    status, _, errors = outcome
    assert status == 2
    assert len(errors.strip().splitlines()) == 1, errors
    assert "Traceback" not in errors
    for word in words:
        assert word in errors, errors


def test_generate_writes_what_is_documented(call, workdir, tmp_path):
    status, output, _ = call("generate", f"--workdir={workdir}", "--prompt=the cat", "--max_new_tokens=12", "--compare",
                             f"--json={tmp_path / 'g.json'}")  # fmt: skip
    assert status == 0
    assert "the cat" in output and "tokens per pass" in output and "identical to plain" in output
    found = json.loads((tmp_path / "g.json").read_text())
    assert {"text", "tokens", "passes", "tokens_per_pass", "seconds", "tokens_per_second", "acceptance"} <= set(found)
    assert set(found["plain"]) == {"tokens", "seconds", "tokens_per_second"}
    assert found["identical"] is True and found["plain"]["tokens"] == found["tokens"]
    assert len(found["acceptance"]["conditional"]) == len(found["acceptance"]["cumulative"]) == 2
    assert found["tokens_per_pass"] == pytest.approx((len(found["tokens"]) - 1) / found["passes"])
    assert found["speedup"] == pytest.approx(found["tokens_per_second"] / found["plain"]["tokens_per_second"])


def test_generate_reads_a_file_and_samples(call, workdir, tmp_path):
    (tmp_path / "prompt.txt").write_text("a mat")
    options = [f"--workdir={workdir}", f"--prompt_file={tmp_path / 'prompt.txt'}", "--max_new_tokens=8", "--compare",
               "--temperature=1", "--top_k=50", "--top_p=0.9", "--seed=3", f"--json={tmp_path / 'g.json'}"]  # fmt: skip
    assert call("generate", *options)[0] == 0
    first = json.loads((tmp_path / "g.json").read_text())
    assert first["identical"] is None
    assert call("generate", *options)[0] == 0
    assert json.loads((tmp_path / "g.json").read_text())["tokens"] == first["tokens"]


def test_evaluate_writes_what_is_documented(call, workdir, tmp_path, text_file):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat"}\n{"prompt": "a dog ran by and"}\n{"prompt": "one"}\n')
    status, output, _ = call("evaluate", f"--workdir={workdir}", f"--text={text_file}", "--split=validation",
                             f"--prompts={prompts}", "--heads=2", "--max_new_tokens=10", "--batch_size=2",
                             f"--json={tmp_path / 'e.json'}")  # fmt: skip
    assert status == 0 and "agreement" in output and "tok/pass" in output
    report = json.loads((tmp_path / "e.json").read_text())
    for score in (report["text"][text_file], report["text"]["validation"]):
        assert set(score) == {"main", "heads", "tokens", "bytes"}
        assert set(score["main"]) == {"ce", "bits_per_byte"}
        assert [set(head) for head in score["heads"]] == [{"ce", "kl", "agreement"}] * 2
    opened = open_run(str(workdir))
    everything = [opened.tokenizer.encode_document(text) for text in opened.trained.held_out_documents()]
    assert len(everything) > 5
    assert report["text"]["validation"]["tokens"] == sum(len(ids) - 1 for ids in everything)
    by_heads = report["decoding"][str(prompts)]["heads"]
    assert list(by_heads) == ["0", "1", "2"]  # the baselines always run
    for heads, score in by_heads.items():
        assert score["prompts"] == 3 and score["identical"] is True
        assert len(score["acceptance"]["conditional"]) == len(score["agreement"]) == int(heads)
        for name in ("tokens_per_pass", "tokens_per_pass_without_bonus", "tokens_per_second", "speedup_over_plain",
                     "speedup_over_one_head", *score["acceptance"]):  # fmt: skip
            values = score["acceptance"][name] if name in score["acceptance"] else [score[name]]
            assert all(set(value) == {"mean", "low", "high"} for value in values)
    assert by_heads["0"]["speedup_over_plain"]["mean"] == 1 and by_heads["1"]["speedup_over_one_head"]["mean"] == 1


def test_validation_scores_agree_with_the_training_log(workdir):
    """``evaluate --split=validation`` and the evaluation inside training measure the same."""
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][-1]
    found = evaluate.run(str(workdir), split_name="validation", limit=2, batch_size=8).text["validation"]
    assert found.main.bits_per_byte == pytest.approx(logged["eval/main/bits_per_byte"], rel=1e-5)
    assert found.heads[1].kl == pytest.approx(logged["eval/head_2/kl"], rel=1e-4)


def test_documents_that_changed_are_not_held_out(call, workdir, text_file, tmp_path):
    """One character in some training documents, of the same length, and they would count as held out."""
    copy, moved = shutil.copytree(workdir, tmp_path / "run"), tmp_path / "documents.txt"
    config = json.loads((copy / "config.json").read_text())
    config["data"]["paths"] = [str(moved)]
    (copy / "config.json").write_text(json.dumps(config))
    text = pathlib.Path(text_file).read_text()
    moved.write_text(text)
    assert call("evaluate", f"--workdir={copy}", "--split=validation", "--limit=2")[0] == 0
    moved.write_text(text.replace("cat", "car"))
    assert_one_line(
        call("evaluate", f"--workdir={copy}", "--split=validation"), "60 documents", "have changed", "--text"
    )
    assert call("evaluate", f"--workdir={copy}", f"--text={moved}")[0] == 0


@pytest.mark.slow
@pytest.mark.optimised
def test_bit_exact_names_both_plain_decoders(call, workdir, tmp_path, monkeypatch):
    """The speed-up is over the fastest plain decoding; plain decoding of padded passes, whose bits are those of the
    text, stands beside it."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat"}\n{"prompt": "a dog ran by and"}\n')
    monkeypatch.setenv("COLUMNS", "80")
    status, output, _ = call("evaluate", f"--workdir={workdir}", f"--prompts={prompts}", "--bit_exact",
                             "--max_new_tokens=10", "--turns=2", f"--json={tmp_path / 'e.json'}")  # fmt: skip
    words = " ".join(output.split())
    assert status == 0 and "x padded" in words and "0 padded" in words and "2 prompts, 2 turns" in words
    found = json.loads((tmp_path / "e.json").read_text())["decoding"][str(prompts)]
    plain, padded = found["heads"]["0"], found["padded_plain"]
    assert padded["speedup_over_padded_plain"]["mean"] == plain["speedup_over_plain"]["mean"] == 1
    rates = {name: score["tokens_per_second"]["mean"] for name, score in found["heads"].items()}
    for heads, score in found["heads"].items():
        assert score["speedup_over_plain"]["mean"] == pytest.approx(rates[heads] / rates["0"])
        over = rates[heads] / padded["tokens_per_second"]["mean"]
        assert score["speedup_over_padded_plain"]["mean"] == pytest.approx(over)
    real, widths = Decoder.run, []

    def run(self, prompts, options, **more):
        widths.append((options.num_drafts, options.width))
        return real(self, prompts, options, **more)

    monkeypatch.setattr(Decoder, "run", run)
    status, output, _ = call("generate", f"--workdir={workdir}", "--prompt=the cat", "--max_new_tokens=12", "--compare",
                             "--bit_exact", f"--json={tmp_path / 'g.json'}")  # fmt: skip
    assert widths == [(2, 8), (0, 1), (0, 8)]
    found = json.loads((tmp_path / "g.json").read_text())
    assert status == 0 and "padded" in output
    for name, over in (("plain", "speedup"), ("padded_plain", "speedup_over_padded_plain")):
        assert found[over] == pytest.approx(found["tokens_per_second"] / found[name]["tokens_per_second"])
    assert found["padded_plain"]["tokens"] == found["tokens"]


@pytest.mark.slow
def test_seeds_have_an_effect(workdir, tmp_path):
    """From the front doors down: another seed draws other texts, the same one the same."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat"}\n' * 3)

    def lengths(seed):
        report = evaluate.run(
            str(workdir), prompts=str(prompts), heads=[2], max_new_tokens=20, sampling=Sampling(1.0), seed=seed
        )
        score = report.decoding[str(prompts)].heads["2"]
        return score.tokens_per_pass.mean, score.acceptance.conditional[0].mean, score.distinct_4grams

    assert lengths(0) == lengths(0) != lengths(1)
    texts = [
        generate.run(str(workdir), ["the cat"] * 2, max_new_tokens=20, sampling=Sampling(1.0), seed=seed)
        for seed in (0, 1)
    ]
    assert len({found.tokens for pair in texts for found in pair}) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/base.py"], ["--workdir is missing"]),
        (["--workdir=W"], ["--config is missing"]),
        (["--config=configs/nothing.py", "--workdir=W"], ["configs/nothing.py", "no such file"]),
        (["--config=configs/base.py", "--workdir=W", "--confg=3"], ["confg"]),
        (["--config=configs/base.py", "--workdir=W", "--config.model.widht=3"], ["widht"]),
        (["--config=configs/base.py", "--workdir=W", "--config.model.width=wide"], ["model.width", "wide"]),
        (
            ["--config=configs/base.py", "--workdir=W", "--config.model.width=-8"],
            ["config.model.width = -8", "more than"],
        ),
        (["--config=configs/base.py", "--workdir=W", "--config.model.kv_heads=5"], ["kv_heads = 5", "divisor"]),
        (
            ["--config=configs/base.py", "--workdir=W", "--config.objective.kl=backward"],
            ["backward", "forward, reverse"],
        ),
        (
            ["--config=configs/base.py", "--workdir=W", "--config.objective.mode=post"],
            ["post", "extension, joint"],
        ),
        (["--config=configs/base.py", "--workdir=W", "--config.objective.beta=(1.0,2.0)"], ["objective.beta", "4"]),
        (["--config=configs/base.py", "--workdir=W", "--config.data.source=text"], ["config.data.paths"]),
        # The case that is mistyped is named, and not the fields that it would have had.
        (
            ["--config=configs/base.py", "--workdir=W", "--config.data.source=txt", "--config.data.paths=a"],
            ["config.data.source = 'txt': expected one of python, text"],
        ),
        (
            ["--config=configs/base.py", "--workdir=W", "--config.data.source", "text", "-config.data.paths=('/no',)"],
            ["config.data.paths = '/no'"],
        ),
        (["--config=configs/base.py", "--workdir=W", "--config.objective.alpha=()"], ["objective.alpha = ()", "4"]),
        (
            ["--config=configs/base.py", "--workdir=W", "--config.model.attention=splash"],
            ["config.model.attention = 'splash': expected auto or dense on cpu"],
        ),
        (["--config=configs/base.py", "--workdir=W", "--config.mesh.data=16"], ["config.mesh", "number of devices"]),
        (["--config=configs/base.py", "--workdir=W", "--config.tokenizer.path=/no/such.json"], ["/no/such.json"]),
        (["--config=configs/base.py", "--workdir=W", "--config.training.seed=4294967296"], ["seed = 4294967296"]),
        (["--config=configs/base.py", "--workdir=W", "extra"], ["extra"]),
        (["--config=configs/base.py", "--workdir=W", "--config.modle.width=3"], ["'modle'", "mesh, model, objective"]),
        (["--config=configs/base.py", "--workdir=W", "--config.model.width=10000000000"], ["GiB of memory"]),
        (["--config=configs/base.py", "--workdir=W", f"--config.training.steps={10**30}"], ["steps = 1", "2**31"]),
        (
            ["--config=configs/base.py", "--workdir=W", "--checkpoint=latest"],
            ["--checkpoint=latest", "newest, best, or the step"],
        ),
        (["--config=configs/base.py", "--workdir=W", "--checkpoint=3"], ["checkpoint = 3", "no complete checkpoint"]),
        (["--config=configs/base.py", "--workdir=s3://bucket/run"], ["s3://bucket/run", "gs://"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_train_answers_mistakes_before_creating_anything(call, tmp_path, monkeypatch, arguments, words):
    root = pathlib.Path(base.__file__).parents[1]
    monkeypatch.chdir(root)
    place = tmp_path / "W"
    arguments = [argument.replace("--workdir=W", f"--workdir={place}") for argument in arguments]
    assert_one_line(call("train", *arguments), *words)
    assert not place.exists()


def test_an_extension_that_does_not_fit_is_one_line(call, workdir, tmp_path, monkeypatch):
    monkeypatch.chdir(pathlib.Path(base.__file__).parents[1])
    here = ["--config=configs/quickstart.py", f"--workdir={workdir}", "--config.objective.mode=extension"]
    assert_one_line(call("train", *here, f"--config.objective.source={workdir}"), "another config", "objective.mode")
    new = ["--config=configs/quickstart.py", f"--workdir={tmp_path / 'w'}", "--config.objective.mode=extension"]
    assert_one_line(
        call("train", *new, f"--config.objective.source={workdir}"), "config.model.vocabulary_size", "has 300"
    )
    assert_one_line(call("train", *new, f"--config.objective.source={tmp_path}"), str(tmp_path), "holds no run")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(): return undefined_name", ["fails with NameError", "undefined_name"]),
        ("def get_config(): return None", ["get_config returns None", "ml_collections.ConfigDict"]),
        ("def get_config(): return {'model': 3}", ["get_config returns {'model': 3}"]),
        ("import sys\ndef get_config(): sys.exit(0)", ["fails with SystemExit"]),
        ("raise ValueError('two\\nlines')", ["fails with ValueError: two lines"]),
        ("x = 3", ["a function get_config"]),
        ("def get_config(:", ["fails with SyntaxError"]),
    ],
)
def test_a_config_file_with_an_error_is_one_line(call, tmp_path, text, words):
    (tmp_path / "broken.py").write_text(text)
    outcome = call("train", f"--config={tmp_path / 'broken.py'}", f"--workdir={tmp_path / 'w'}")
    assert_one_line(outcome, f"--config={tmp_path / 'broken.py'}", *words)


def test_a_folder_with_something_else_is_left_alone(call, tmp_path, monkeypatch):
    monkeypatch.chdir(pathlib.Path(base.__file__).parents[1])
    (tmp_path / "thesis.tex").write_text("precious")
    short = ["--config.training.steps=2", "--config.optimizer.warmup_steps=1"]  # were it not refused
    assert_one_line(call("train", "--config=configs/quickstart.py", f"--workdir={tmp_path}", *short), "holds no run")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "checkpoints" / "epoch_3").mkdir(parents=True)  # of another program
    assert_one_line(call("train", "--config=configs/quickstart.py", f"--workdir={tmp_path}", *short), "holds no run")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workdir=/no/such/run", "--prompt=x"], ["/no/such/run", "holds no run"]),
        (["--workdir=RUN"], ["--prompt"]),
        (["--workdir=RUN", "--prompt="], ["prompt 1 is empty"]),
        (["--workdir=RUN", "--prompt=x", "--heads=-1"], ["heads = -1", "0 (plain decoding) or more"]),
        (["--workdir=RUN", "--prompt=x", "--max_new_tokens=32"], ["more than the model's context of 32"]),
        (["--workdir=RUN", "--prompt=x", "--min_confidence=1.5"], ["min_confidence = 1.5"]),
        (["--workdir=RUN", "--prompt=x", "--max_new_tokens=0"], ["max_new_tokens = 0"]),
        (["--workdir=RUN", "--prompt=x", "--max_new_tokens=many"], ["many"]),
        (["--workdir=RUN", "--prompt=x", "--temperature=-1"], ["temperature = -1.0"]),
        (["--workdir=RUN", "--prompt=x", "--top_p=0.5"], ["need a temperature"]),
        (["--workdir=RUN", "--prompt_file=/no/such/file"], ["/no/such/file"]),
        (["--workdir=RUN", "--prompt=x", "--json=/no/such/folder/x.json"], ["/no/such/folder"]),
        (["--workdir=RUN", "--prompt=x", "--seed=9223372036854775808"], ["seed = 9223372036854775808"]),
        (["--workdir=gs://no-bucket/run", "--prompt=x"], ["gs://no-bucket/run"]),
        (["--workdir=RUN", "--prompt=x", "--colour=red"], ["--colour=red"]),
        (["--workdir=RUN", "--prompt=x\udcff"], ["prompt 1: character 1 ('\\udcff')", "not UTF-8"]),
        (
            ["--workdir=RUN", "--prompt=x", "--heads=1000000"],
            ["heads = 1000000", "fewer than the model's context of 32"],
        ),
        (["--workdir=RUN", "--prompt=x", "--json="], ["--json=", "the name of a file"]),
        (["--workdir=RUN", "--prompt=x", "--json=/"], ["--json=/", "the name of a file"]),
        (["--workdir=RUN", "--prompt=x", "--checkpoint=7"], ["checkpoint = 7", "has 10"]),
        (["--workdir=s3://bucket/run", "--prompt=x"], ["s3://bucket/run", "gs://"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_generate_answers_mistakes(call, workdir, arguments, words):
    assert_one_line(call("generate", *(argument.replace("RUN", str(workdir)) for argument in arguments)), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing to evaluate"]),
        (["--split=test"], ["--split=test", "validation"]),
        (["--text=/no/such/file"], ["/no/such/file"]),
        (["--prompts=/no/such/file"], ["/no/such/file"]),
        (["--prompts=FILE"], ["FILE", "field 'prompt'"]),
        (["--split=validation", "--heads=0,-1"], ["heads = -1"]),
        (["--split=validation", "--heads=a"], ["--heads"]),
        (["--split=validation", "--batch_size=0"], ["--batch_size=0"]),
        (["--split=validation", f"--batch_size={10**10}"], ["GiB of memory"]),
        (
            ["--split=validation", "--prompts=LONG", "--max_new_tokens=4"],
            ["prompt 2 has", "more than the model's context of 32"],
        ),
        (["--text=LATIN"], ["LATIN, line 2: byte 7 (0xe9) is not UTF-8"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value else None,
)
def test_evaluate_answers_mistakes(call, workdir, tmp_path, monkeypatch, arguments, words):
    (tmp_path / "FILE").write_text('{"text": "no prompt here"}\n')
    (tmp_path / "LONG").write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "the cat " * 100}) + "\n")
    (tmp_path / "LATIN").write_bytes(b"one\ntwo\xe9")
    monkeypatch.setattr(Scorer, "score", lambda *_: pytest.fail("scored before all was checked"))
    for name in ("FILE", "LONG", "LATIN"):
        arguments = [argument.replace(name, str(tmp_path / name)) for argument in arguments]
    assert_one_line(call("evaluate", f"--workdir={workdir}", *arguments), *words)


def test_damaged_runs_are_one_line(call, workdir, tmp_path):
    for name, damage in {
        "no_checkpoint": lambda path: shutil.rmtree(path / "checkpoints"),
        "broken_config": lambda path: (path / "config.json").write_text("{"),
        "broken_tokenizer": lambda path: (path / "tokenizer.json").write_text("{}"),
        "no_tokenizer": lambda path: (path / "tokenizer.json").unlink(),
        "other_version": lambda path: [
            file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "sha256"}))
            for file in path.glob("checkpoints/*/progress/metadata")
        ],
        "empty_arrays": lambda path: [f.write_bytes(b"") for f in (path / "checkpoints").rglob("*") if f.is_file()],
    }.items():
        copy = tmp_path / name
        shutil.copytree(workdir, copy)
        damage(copy)
        assert_one_line(call("generate", f"--workdir={copy}", "--prompt=x"), str(copy))


@pytest.mark.optimised
@pytest.mark.parametrize(
    "flags",
    [
        ["--heads=5"],
        pytest.param(["--heads=2", "--min_confidence=0.5"], marks=pytest.mark.slow),
        ["--heads=2", "--bit_exact"],
        ["--heads=2", "--temperature=0.8", "--top_k=9", "--greedy_drafts"],
    ],
    ids=" ".join,
)
def test_decoding_flags(call, workdir, tmp_path, flags):
    """Looped heads, adaptive drafting, one pass width, greedy drafts: from the command line to the figures."""
    path = tmp_path / "g.json"
    status, output, _ = call("generate", f"--workdir={workdir}", "--prompt=the cat", "--max_new_tokens=9", "--compare",
                             f"--json={path}", *flags)  # fmt: skip
    found = json.loads(path.read_text())
    assert status == 0 and len(found["acceptance"]["conditional"]) == int(flags[0][-1])
    assert found["identical"] is (None if "--temperature=0.8" in flags else True)
    assert f"draft {flags[0][-1]}: accepted, cumulative" in output


def test_a_divergence_that_is_no_tie_is_a_failure(call, workdir, monkeypatch):
    """Shown as such, with exit status 1; a tie is none."""
    for margin, status, words in ((0.5, 1, "NOT A TIE"), (1e-6, 0, "a tie")):
        found = Divergence(3, margin, margin, 0.0, margin < 1e-4)
        monkeypatch.setattr(generation_module, "first_divergence", lambda *_, found=found: found)
        outcome = call("generate", f"--workdir={workdir}", "--prompt=a mat", "--max_new_tokens=5", "--compare")
        assert outcome[0] == status
        assert words in outcome[1] or "yes" in outcome[1]


def test_help_lists_what_there_is(call):
    for door, words in {"train": "--workdir", "generate": "--compare", "evaluate": "--prompts"}.items():
        status, output, _ = call(door, "--help")
        assert status == 0 and words in output
        assert "--tasks" not in output
