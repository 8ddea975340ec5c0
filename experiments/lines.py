"""Files of rows: JSON lines that several processes may add to while they measure, and that survive their ends."""

import fcntl
import json
import os
import pathlib
from typing import Any


def read_lines(path: pathlib.Path) -> list[Any]:
    """The rows of a file; a last line that a killed process left unfinished is not one.

    Raises:
      ValueError: another line is no JSON.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = lines[:-1] if lines and not lines[-1].endswith("\n") else lines
    try:
        return [json.loads(line) for line in whole]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a file of rows ({error}); restore it from the last commit") from error


def append_line(path: pathlib.Path, value: Any) -> None:
    """Adds a line behind the whole ones, on disk before this returns; one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(value).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
