"""An exported run as a newcomer finds it: its model card, its tokenizer, a conversation with it."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
import tokenizers

from mtpd_jax import convert, evaluate, generate, open_run
from mtpd_jax.config import Config
from mtpd_jax.data.prompts import prompts_of
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.interop.reading import look
from mtpd_jax.runs.exported import last_evaluation
from mtpd_jax.runs.origin import completed
from mtpd_jax.runs.workdir import open_workdir
from tests.interop.peers import export, random_run, save_peer, small, tiny, torch, transformers
from tests.interop.tokens import tokenizer_json

TEXTS = ["the cat", " the  cat\n\tsat", "naïve 🐈", "<|endoftext|>", "a<s>b", "", "日本 mat"]


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """The run of the other tests with figures that were measured."""
    place = tmp_path_factory.mktemp("card")
    (place / "prompts.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "a dog ran by and"}\n')
    report = evaluate.run(str(workdir), prompts=str(place / "prompts.jsonl"), max_new_tokens=10)
    (place / "report.json").write_text(json.dumps(report.to_json()))
    convert.to_hf(str(workdir), str(place / "model"), reports=[str(place / "report.json")])
    return place / "model"


def snippets(folder):
    text = (folder / "README.md").read_text()
    return [
        code.replace('folder = "."', f"folder = {str(folder)!r}")
        for code in re.findall(r"```python\n(.*?)```", text, re.S)
    ]


def test_the_snippet_of_the_card_runs(exported, workdir):
    """As it stands there; and it writes what the run writes."""
    (code,) = snippets(exported)
    scope = {}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, scope)
    assert "Once upon a time" in said.getvalue()
    prompt = scope["inputs"]["input_ids"][0].tolist()
    tokens = scope["written"][0].tolist()
    room = open_run(str(workdir)).config.context - len(prompt)
    ours = open_run(str(workdir)).generate(["Once upon a time"], max_new_tokens=room)[0].tokens
    assert tokens[: len(prompt) + len(ours)] == [*prompt, *ours] and len(ours) > 8


def test_the_card_says_what_was_measured(exported, workdir):
    card = (exported / "README.md").read_text()
    assert "| 2 | 2 |" in card and "identical" in card and "agreement of the heads" in card
    last = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"{last['eval/head_2/agreement']:.3f}" in card
    stored = json.loads((exported / "mtpd_config.json").read_text())
    assert Config.stored(stored) == open_run(str(workdir)).config


@pytest.mark.parametrize("format", ["backbone", "glm4_moe", "exaone_moe"])
def test_the_snippets_of_other_formats_run(format, workdir, tmp_path):
    convert.to_hf(str(workdir), str(tmp_path / "model"), format=format)
    (code,) = snippets(tmp_path / "model")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    assert "Once upon a time" in said.getvalue()
    card = (tmp_path / "model" / "README.md").read_text()
    assert ("heads that draft" in card) is (format != "backbone")
    assert ("Acceptance was not measured" in card) is (format != "backbone")


@pytest.mark.parametrize("begins", [False, True])
def test_ids_are_those_of_the_tokenizer_file(begins, tmp_path):
    """In transformers, through AutoTokenizer, and here."""
    config = tiny(heads__num_heads=1, tokenizer__begin_token="<s>" if begins else "")
    export(config, random_run(config)[1], "hf", tmp_path / "out", tokenizer_json(begins))
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    library = tokenizers.Tokenizer.from_str(tokenizer_json(begins))
    found = look(tmp_path / "out").config.tokenizer
    assert found.begin_token == config.tokenizer.begin_token
    ours = Tokenizer.load(tmp_path / "out" / "tokenizer.json", found)
    for text in TEXTS:
        expected = library.encode(text).ids
        assert peer(text)["input_ids"] == expected
        # Special tokens that a text spells out are text here.
        assert (ours.encode_prompt(text).tolist() == expected) is ("<" not in text)
    assert peer.eos_token == "<|endoftext|>" and peer.bos_token == (found.begin_token or None)


def test_a_card_shows_no_evaluation_of_a_later_step(tmp_path):
    """Of those up to the checkpoint that is written, the newest."""
    lines = [{"step": step, "eval/main/ce": step / 10} for step in (10, 20)] + [{"step": 15, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {step: last_evaluation(open_workdir(str(tmp_path)), step) for step in (5, 15, 20, 25)}
    assert {step: line.get("step") for step, line in found.items()} == {5: None, 15: 10, 20: 20, 25: 20}


def test_a_conversation_goes_there_and_back(tmp_path, monkeypatch, capsys):
    """A chat model of transformers here: its template, its end tokens; and out again, its template with it."""
    template = "{% for m in messages %}<|turn|>{{ m.role }} {{ m.content }}<|done|>{% endfor %}<|turn|>assistant "
    save_peer(tmp_path, small("Qwen3", head_dim=16))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [294, 0], "temperature": 0.25, "top_k": 7}')
    settings = {"chat_template": template, "eos_token": "<|done|>", "tokenizer_class": "Qwen2Tokenizer", "junk": 1}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    convert.from_hf(str(tmp_path), str(tmp_path / "run"))
    run = open_run(str(tmp_path / "run"))
    assert run.tokenizer.end_ids == (294, 0)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat"}]
    convert.to_hf(str(tmp_path / "run"), str(tmp_path / "out"))
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = peer.apply_chat_template(messages, return_dict=False)
    assert run.encode(messages).tolist() == expected
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert set(model.generation_config.eos_token_id) == {294, 0}
    assert (model.generation_config.temperature, model.generation_config.top_k) == (0.25, 7)
    ids = np.asarray([expected])
    written = model.generate(torch.tensor(ids), max_new_tokens=8, do_sample=False)
    assert list(run.generate([messages], max_new_tokens=8)[0].tokens) == written[0, ids.shape[1] :].tolist()
    # From the command line, and from a file of prompts.
    arguments = ["--prompt=the cat", "--chat", "--system=Be brief.", "--max_new_tokens=8", f"--json={tmp_path / 'g'}"]
    monkeypatch.setattr("sys.argv", ["generate", f"--workdir={tmp_path / 'run'}", *arguments])
    assert generate.main() == 0
    assert json.loads((tmp_path / "g").read_text())["tokens"] == written[0, ids.shape[1] :].tolist()
    assert "the cat" in capsys.readouterr().out
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": messages}) + '\n{"prompt": "the cat"}\n')
    assert [len(prompt) if isinstance(prompt, list) else prompt for prompt in prompts_of(
        str(tmp_path / "prompts.jsonl"))] == [2, "the cat"]  # fmt: skip
    report = evaluate.run(str(tmp_path / "run"), prompts=str(tmp_path / "prompts.jsonl"), max_new_tokens=4)
    assert next(iter(report.decoding.values())).heads["0"].prompts == 2
    # A template that is none is in nobody's way who has no conversation.
    (tmp_path / "run" / "tokenizer_config.json").write_text('{"chat_template": "{% if"}')
    opened = open_run(str(tmp_path / "run"))
    assert opened.generate(["the cat"], max_new_tokens=2)
    with pytest.raises(ValueError, match="chat template, line 1"):
        opened.generate([messages], max_new_tokens=2)
    (tmp_path / "prompts.jsonl").write_text('{"messages": "hello"}\n')
    with pytest.raises(ValueError, match="expected one of prompt, a text, and messages, a list"):
        prompts_of(str(tmp_path / "prompts.jsonl"))


def test_what_begins_a_text_begins_all_of_them(tmp_path):
    """Prompts, documents, contexts of which nothing is said; and the texts of a run that starts from it."""
    config = tiny(heads__num_heads=1, tokenizer__begin_token="<s>")
    export(config, random_run(config)[1], "hf", tmp_path / "out", tokenizer_json(begins=True))
    convert.from_hf(str(tmp_path / "out"), str(tmp_path / "run"))
    run = open_run(str(tmp_path / "run"))
    (begin,) = run.tokenizer.begin_ids
    assert run.encode("the cat")[0] == begin
    whole = run.score(["the cat"])[0].ce[0]
    (found,) = run.loglikelihoods([""], ["the cat"])
    assert found.nats == pytest.approx(-float(whole[:-1].sum()), rel=1e-5)
    wanted = tiny(objective__mode="extension", objective__source=str(tmp_path / "run"), heads__num_heads=2)
    assert completed(wanted, open_workdir(str(tmp_path / "next"))).tokenizer.begin_token == "<s>"
