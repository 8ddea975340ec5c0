"""Bad input: flags, configs, prompts, data and tokenizers that no command may take silently, or answer with more than
a line."""

import functools
import pathlib
import random
from collections.abc import Callable, Iterator

from configs import base
from tests.soak.commands import run
from tests.soak.faults import Bench, Fault

_NUMBERS = ("-1", "0", "1.5", "nan", "inf", "-inf", "1e30", "9" * 30, "many", "", "None", "True", "(1,)", "{}", "'8'")
_WORDS = ("", "nothing", "0", "None", "\udcff", "a\0b", "'", "(", "[]", "x" * 5000)

# Bytes that are no text, or no JSON, or not what is expected.
_CONTENTS = {
    "empty": b"",
    "white space": b" \n\t\n",
    "no UTF-8": b'{"prompt": "caf\xe9", "text": "caf\xe9"}\n',
    "UTF-16": "the cat".encode("utf-16"),
    "NUL": b"\0" * 100,
    "half a surrogate pair": b'{"prompt": "\\ud800", "text": "\\ud800"}\n',
    "nested deeply": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "a number": b"3\n",
    "a list": b'["prompt", "text"]\n',
    "another field": b'{"other": "the cat"}\n',
    "a field that is no text": b'{"prompt": 7, "text": 7}\n',
    "null": b'{"prompt": null, "text": null}\n',
    "cut short": b'{"prompt": "the cat", "text": "the',
    "an empty prompt": b'{"prompt": "", "text": ""}\n',
    "a long prompt": b'{"prompt": "' + b"the cat " * 2000 + b'"}\n',
    "a long number": b'{"prompt": ' + b"9" * 10_000 + b"}\n",
    "one good line, one bad": b'{"prompt": "the cat", "text": "the cat"}\nthe cat\n',
    "good, a byte order mark": b'\xef\xbb\xbf{"prompt": "the cat", "text": "the cat"}\n',
    "good, line separators": '{"prompt": "the\u2028cat\u0085sat", "text": "the\u2028cat"}\n'.encode(),
    "good, line ends of Windows": b'{"prompt": "the cat", "text": "the cat"}\r\n',
    "random": bytes(random.Random(0).randbytes(3000)),
}

# Bodies of config files; ``c`` is the base config where one is built.
_BASE = "from configs import base\nimport ml_collections, sys\ndef get_config():\n c = base.get_config()\n"
_CONFIGS = {
    "returns None": "def get_config(): return None",
    "returns a dictionary": "def get_config(): return {'model': {}}",
    "returns a number": "def get_config(): return 3",
    "returns an empty config": _BASE + " return ml_collections.ConfigDict()",
    "raises": "def get_config(): raise RuntimeError('two\\nlines')",
    "raises on import": "raise KeyError('x')",
    "exits": _BASE + " sys.exit(0)",
    "exits on import": "raise SystemExit",
    "interrupts": "def get_config(): raise KeyboardInterrupt",
    "has no function": "x = 1",
    "is no Python": "def get_config(:",
    "is empty": "",
    "is no text": "\udcff\udcfe",
    "lacks a section": _BASE + " del c.model\n return c",
    "lacks a field": _BASE + " del c.model.width\n return c",
    "has another section": _BASE + " c.mine = 3\n return c",
    "wants arguments": "def get_config(a, b): return None",
    "recurses": "def get_config(): return get_config()",
    "nests itself": _BASE + " c.model = c\n return c",
}

_FLAGS = {
    "generate": {
        "heads": (*_NUMBERS, "300", "1000000"),
        "max_new_tokens": _NUMBERS,
        "temperature": (*_NUMBERS, "1e-8", "1e-300", "1e300"),
        "top_k": _NUMBERS,
        "top_p": (*_NUMBERS, "1.0000001"),
        "seed": (*_NUMBERS, "4294967296"),
        "min_confidence": _NUMBERS,
        "checkpoint": (*_NUMBERS, "best", "7", "newest "),
        "prompt": ("", "\udcff", "the cat " * 500, "\ud800", "-", " "),
        "prompt_file": (*_WORDS[:4], "/", "/dev/null", "/proc/self/mem"),
        "workdir": (*_WORDS, "/", "s3://bucket/run", "gs://bucket/run", "http://x", "~nobody/x", "/dev/null"),
        "json": ("", "/", "/no/such/folder/x", "/proc/x", "."),
        "compare": ("3",),
        "nonsense": ("",),
    },
    "evaluate": {
        "heads": (*_NUMBERS, ",", "1,,2", "0,1000000", "1;2"),
        "limit": _NUMBERS,
        "batch_size": (*_NUMBERS, "1000000000"),
        "max_new_tokens": _NUMBERS,
        "split": ("", "training", "test", "validation "),
        "text": (*_WORDS, "/", "/dev/null", "**"),
        "prompts": (*_WORDS, "/", "/dev/null"),
        "workdir": ("", "/", "s3://bucket/run"),
        "json": ("", "/", "/no/such/folder/x"),
        "seed": ("-1", "4294967296", "x"),
        "checkpoint": ("best", "-1", "7"),
    },
    "train": {
        "workdir": (*_WORDS, "/dev/null", "/dev/null/x", "s3://bucket/run", "gs://bucket/run", "/proc/run"),
        "config": ("", "nothing.py", "/", "/dev/null", "configs", "config.json"),
        "checkpoint": ("best", "-1", "5", "1e3"),
        "nonsense": ("", "3"),
        "config.modle.width": ("3",),
        "config.model.widht": ("3",),
        "config.model": ("3", ""),
        "config.": ("3",),
    },
}


def all_inputs() -> list[Fault]:
    """Every distinct bad input."""
    found = [
        Fault("input", f"{command}: --{flag}={value[:20]!a}", functools.partial(_flag, command, flag, value))
        for command, flags in _FLAGS.items()
        for flag, values in flags.items()
        for value in values
    ]
    found += [Fault("input", f"config: {name}", functools.partial(_config, text)) for name, text in _CONFIGS.items()]
    for name, content in _CONTENTS.items():
        found += [Fault("input", f"{where}: {name}", functools.partial(_content, where, content)) for where in _WHERE]
    found += [
        Fault("input", f"train: {path}={value[:20]!a}", functools.partial(_field, path, value))
        for path, values in _fields()
        for value in values
    ]
    return found


def _fields() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every field of a config, with values that do not fit its type, or no run."""
    for section, fields in base.get_config().to_dict().items():
        for field, value in fields.items():
            wrong = _WORDS if isinstance(value, str) else ("maybe", "3", "") if isinstance(value, bool) else _NUMBERS
            yield f"{section}.{field}", wrong


def _flag(command: str, flag: str, value: str, bench: Bench, rng: random.Random) -> str | None:
    """A value of a flag: refused in one line, or taken for what it is."""
    workdir = bench.scratch / "new" if command == "train" else bench.root / "whole"
    flags = [given for given in bench.flags(command, workdir) if not given.startswith((f"--{flag}=", "--limit"))]
    if flag == "prompt_file":
        flags = [given for given in flags if not given.startswith("--prompt=")]
    short = ["--config.training.steps=3"] if command == "train" else []
    outcome = run(command, [*flags, *short, f"--{flag}={value}"])
    return outcome.complaint(0, 2) or _nothing_created(outcome.status, workdir, command)


def _nothing_created(status: int | None, workdir: pathlib.Path, command: str) -> str | None:
    if command == "train" and status == 2 and workdir.exists():
        return f"left {sorted(path.name for path in workdir.iterdir())} behind"
    return None


def _field(path: str, value: str, bench: Bench, rng: random.Random) -> str | None:
    """A value of a config's field, in a run of three steps."""
    workdir = bench.scratch / "new"
    flags = [given for given in bench.train_flags(workdir) if not given.startswith(f"--config.{path}=")]
    short = [] if path == "training.steps" else ["--config.training.steps=3"]
    outcome = run("train", [*flags, *short, f"--config.{path}={value}"])
    return outcome.complaint(0, 1, 2) or _nothing_created(outcome.status, workdir, "train")


def _config(text: str, bench: Bench, rng: random.Random) -> str | None:
    file = bench.scratch / "config.py"
    file.write_bytes(text.encode(errors="surrogateescape"))
    flags = [given for given in bench.train_flags(bench.scratch / "new") if not given.startswith("--config=")]
    outcome = run("train", [f"--config={file}", *flags])
    return outcome.complaint(2, 130) or _nothing_created(outcome.status, bench.scratch / "new", "train")


def _as_prompts(file: pathlib.Path, bench: Bench) -> tuple[str, list[str]]:
    return "evaluate", [f"--workdir={bench.root / 'whole'}", f"--prompts={file}", "--max_new_tokens=4", "--heads=1"]


def _as_prompt(file: pathlib.Path, bench: Bench) -> tuple[str, list[str]]:
    return "generate", [f"--workdir={bench.root / 'whole'}", f"--prompt_file={file}", "--max_new_tokens=4"]


def _as_text(file: pathlib.Path, bench: Bench) -> tuple[str, list[str]]:
    return "evaluate", [f"--workdir={bench.root / 'whole'}", f"--text={file}"]


def _as_data(source: str, file: pathlib.Path, bench: Bench) -> tuple[str, list[str]]:
    flags = bench.train_flags(bench.scratch / "new", file)
    return "train", [*flags, f"--config.data.source={source}", "--config.training.steps=3"]


def _as_tokenizer(file: pathlib.Path, bench: Bench) -> tuple[str, list[str]]:
    return "train", [*bench.train_flags(bench.scratch / "new"), f"--config.tokenizer.path={file}"]


def _inside(name: str, file: pathlib.Path, bench: Bench) -> tuple[str, list[str]]:
    """In place of a file of a run."""
    file.replace(bench.copy("half") / name)
    return "train", bench.train_flags(bench.scratch / "run")


_WHERE: dict[str, Callable[[pathlib.Path, Bench], tuple[str, list[str]]]] = {
    "--prompts": _as_prompts,
    "--prompt_file": _as_prompt,
    "--text": _as_text,
    "data as text": functools.partial(_as_data, "text"),
    "data as JSON lines": functools.partial(_as_data, "jsonl"),
    "tokenizer.path": _as_tokenizer,
    "config.json of a run": functools.partial(_inside, "config.json"),
    "tokenizer.json of a run": functools.partial(_inside, "tokenizer.json"),
    "metrics.jsonl of a run": functools.partial(_inside, "metrics.jsonl"),
}


def _content(where: str, content: bytes, bench: Bench, rng: random.Random) -> str | None:
    """A file with such contents: refused in one line that names it, or taken for what it is."""
    file = bench.scratch / "given.jsonl"
    file.write_bytes(content)
    command, flags = _WHERE[where](file, bench)
    outcome = run(command, flags)
    wrong = outcome.complaint(0, 2) or _nothing_created(outcome.status, bench.scratch / "new", command)
    if not wrong and outcome.status == 2 and where in ("--prompts", "--prompt_file", "--text") and content.strip():
        named = file.name in outcome.errors or "prompt 1" in outcome.errors
        return None if named else f"does not name the file: {outcome.errors}"
    return wrong
