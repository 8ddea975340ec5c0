"""``generate`` with one prompt, several, a file of them, and in a conversation at the keyboard."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time

import pytest
import rich.console

from mtpd_jax import frontdoor, generate, session
from mtpd_jax.run import open_run


@pytest.fixture
def call(monkeypatch, capsys, workdir):
    """Runs the command in this process, with what is typed; returns (exit status, standard output, standard error)."""

    def run(*arguments, typed=""):
        monkeypatch.setattr(
            "sys.argv", ["generate", f"--workdir={workdir}", "--max_new_tokens=8", *map(str, arguments)]
        )
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        return frontdoor.status_of(generate.main), *capsys.readouterr()

    return run


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_several_prompts_are_lines_of_json(call, workdir, tmp_path):
    """In their order, the same whether they are given as flags or in a file, and as each is continued alone."""
    flags, file = ["--prompt=the cat", "--prompt=a big dog", "--batch_size=2"], tmp_path / "prompts.jsonl"
    status, output, said = call(*flags, f"--json={tmp_path / 'a.jsonl'}")
    assert status == 0 and output.count("tokens per pass") == 2 and "compiling" in said
    file.write_text('{"prompt": "the cat"}\n{"prompt": "a big dog"}\n')
    assert call(f"--prompts={file}", f"--json={tmp_path / 'b.jsonl'}")[0] == 0
    found = lines_of(tmp_path / "a.jsonl")
    assert [one["prompt"] for one in found] == ["the cat", "a big dog"]
    assert [one["tokens"] for one in lines_of(tmp_path / "b.jsonl")] == [one["tokens"] for one in found]
    opened = open_run(str(workdir))
    for one in found:
        assert one["text"] == opened.generate([one["prompt"]], max_new_tokens=8)[0].text


def test_a_file_with_one_prompt_is_a_line_too(call, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n')
    assert call(f"--prompts={tmp_path / 'prompts.jsonl'}", f"--json={tmp_path / 'a.jsonl'}")[0] == 0
    assert len(lines_of(tmp_path / "a.jsonl")) == 1


def test_a_terminal_is_shown_the_text_as_it_is_written(call, workdir, monkeypatch, tmp_path):
    whole = open_run(str(workdir)).generate(["the cat"], max_new_tokens=8)[0]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(generate.Run, "generate", None)
    status, output, _ = call("--prompt=the cat", f"--json={tmp_path / 'a.json'}")
    output = re.sub(r"\x1b\[[0-9;]*m", "", output)
    assert status == 0 and f"the cat{whole.text}" in output and "tokens per pass" in output
    assert json.loads((tmp_path / "a.json").read_text())["tokens"] == list(whole.tokens)


def test_a_session_continues_what_is_typed_until_an_empty_line(call, workdir):
    opened = open_run(str(workdir))
    texts = [opened.generate([prompt], max_new_tokens=8)[0].text for prompt in ("the cat", "a big dog")]
    status, output, _ = call("--interactive", typed="the cat\na big dog\n\nnever read\n")
    assert status == 0 and "never" not in output
    for prompt, text in zip(("the cat", "a big dog"), texts, strict=True):
        assert prompt + text in output
    assert output.count("per pass") == 2
    assert call("--interactive")[0] == 0  # nothing is typed at all


def test_a_session_shows_who_proposed_what(call):
    """In colours, and once more in a line of words."""
    output = call("--interactive", typed="the cat\n")[1]
    assert "proposed by: main head" in output


@pytest.mark.parametrize(
    ("number", "status", "asked"), [(signal.SIGINT, 0, 3), pytest.param(signal.SIGTERM, 143, 1, marks=pytest.mark.slow)]
)
def test_a_signal_stops_a_text(monkeypatch, workdir, number, status, asked):
    """Ctrl-C only that, after what is written already; the next prompt is asked for. SIGTERM the session, too."""
    opened, typed, seen = open_run(str(workdir)), ["the cat", "a big dog", ""], []
    stream, console = opened.stream, rich.console.Console(file=io.StringIO(), width=200)
    whole = opened.generate(["the cat"], heads=0, max_new_tokens=28)[0]

    def stopped_after_two(prompt, **options):
        for count, newest in enumerate(stream(prompt, **options), 1):
            if count == 2 and not seen[1:]:
                os.kill(os.getpid(), number)
            yield newest

    def ask():
        seen.append(typed[len(seen)])
        return seen[-1]

    monkeypatch.setattr(type(opened), "stream", lambda _, prompt, **options: stopped_after_two(prompt, **options))
    monkeypatch.setattr(session, "_ask", ask)
    options = {"max_new_tokens": 28, "heads": 0}
    found = frontdoor.status_of(lambda: session.converse(opened, console, options) or 0)
    assert found == status and len(seen) == asked
    written = [int(number) for number in re.findall(r"^(\d+) tokens in", console.file.getvalue(), re.MULTILINE)]
    assert len(written) == asked - 1 and (not written or 0 < written[0] < len(whole.tokens))


@pytest.mark.slow
def test_a_terminal_is_left_as_it_was(workdir):
    """Also by Ctrl-C at the prompt, where a line is edited that the terminal does not show by itself meanwhile."""
    master, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    command = [sys.executable, "-m", "mtpd_jax.generate", f"--workdir={workdir}", "--interactive"]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal)
    shown = b""
    while not shown.endswith(b"> "):
        shown += os.read(master, 4096)
    while termios.tcgetattr(terminal) == before:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and termios.tcgetattr(terminal) == before


def test_a_terminal_that_is_gone_keeps_nobody():
    """Such as one of a connection that broke: what was asked to end ends."""
    master, terminal = pty.openpty()
    program = (
        "import time; from mtpd_jax.runs import interruption; interruption.end_on_signals(); "
        "interruption.keep_terminal(); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdin=terminal, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    os.close(terminal)
    os.close(master)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143


def test_a_session_survives_what_it_cannot_continue(call):
    status, output, _ = call("--interactive", typed=f"{'the cat ' * 60}\nthe cat\n")
    assert status == 0 and "context" in output and output.count("per pass") == 1


def test_a_conversation_grows(monkeypatch):
    """Every message is asked with all before it, answers included; what was refused is forgotten."""
    asked = []

    class Opened:
        class trained:
            class folder:
                shown = "here"

        step = 1
        text_after = lambda *_: None  # noqa: E731

        def stream(self, prompt, **options):
            asked.append(prompt)
            if "bad" in prompt[-1]["content"]:
                raise ValueError("no room")
            return prompt[-1]["content"]

    class Found:
        def __init__(self, text):
            self.text = text

    monkeypatch.setattr(session, "show_stream", lambda console, shown, parts, decode: Found(f"<{''.join(parts)}>"))
    monkeypatch.setattr(session, "show_legend", lambda *_: None)
    monkeypatch.setattr(session, "figures_line", lambda found: "")
    typed = iter(["one", "bad", "two", ""])
    monkeypatch.setattr(session, "_ask", lambda: next(typed))
    session.converse(Opened(), session.rich.console.Console(file=io.StringIO()), {}, chat=True, system="be brief")
    system, one = {"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}
    answer, two = {"role": "assistant", "content": "<one>"}, {"role": "user", "content": "two"}
    assert asked[0] == [system, one] and asked[2] == [system, one, answer, two]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--interactive", "--compare"], "--compare"),
        (["--interactive", "--json=a.json"], "--json"),
        (["--interactive", "--batch_size=2"], "--batch_size"),
        (["--prompt=a", "--interactive"], "not allowed with"),
        ([], "one of the arguments"),
        (["--prompts=nowhere.jsonl"], "nowhere.jsonl"),
        (["--prompt=a", "--batch_size=0"], "batch_size"),
    ],
)
def test_what_does_not_go_together_is_one_line(call, flags, words):
    status, _, errors = call(*flags)
    assert status == 2 and words in errors and "Traceback" not in errors
