"""Files of prompts: JSON lines with a text, or the messages of a conversation, and perhaps an id."""

import contextlib
import dataclasses
import json
from typing import Any

from mtpd_jax.data.chat import Prompt, check_prompt
from mtpd_jax.data.files import check_text, json_digest, json_field, read_text
from mtpd_jax.data.sources import expand


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """A line of a file of prompts.

    Attributes:
      line: its number, from 1.
      id: as the line says, or else a hash of all that it holds.
      prompt: a text, or messages.
    """

    line: int
    id: str
    prompt: Prompt


def read_prompts(path: str, limit: int | None = None) -> list[PromptRow]:
    """The prompts of a file of JSON lines, at most ``limit`` of them.

    Raises:
      ValueError: there is no such file, or several, it holds no prompt, or a line has none.
    """
    if not isinstance(path, str):
        raise ValueError(f"prompts = {path!r:.80}: expected the name of a file of JSON lines")
    # One prompt per line; empty lines are none.
    files = expand([path], "--prompts")
    if len(files) > 1:
        raise ValueError(f"--prompts={path}: expected one file, and {len(files)} match")
    (file,) = files
    lines = [(number, line) for number, line in enumerate(read_text(file, "--prompts").split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"--prompts={path}: holds no prompt")
    return [_row_of(line, number, f"--prompts={path}, line {number}") for number, line in lines[:limit]]


def prompts_of(path: str, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file alone; see ``read_prompts``."""
    return [row.prompt for row in read_prompts(path, limit)]


def _row_of(line: str, number: int, where: str) -> PromptRow:
    row: Any = None
    with contextlib.suppress(ValueError, RecursionError):  # which are said below
        row = json.loads(line)
    if not isinstance(row, dict) or "messages" not in row:
        prompt: Prompt = json_field(line, "prompt", where)
    else:
        if "prompt" in row or isinstance(row["messages"], str):
            raise ValueError(f"{where}: expected one of prompt, a text, and messages, a list")
        check_prompt(row["messages"], where)
        prompt = row["messages"]
    named = row.get("id") if isinstance(row, dict) else None
    if named is not None and type(named) not in (str, int):
        raise ValueError(f"{where}: id = {named!r:.80}: expected a text or an integer")
    check_text(str(named), f"{where}: id")
    return PromptRow(number, json_digest(row) if named is None else str(named), prompt)
