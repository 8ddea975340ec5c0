"""A folder of generations while it is written: what stands there as a whole, and what a killed process left."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from mtpd_jax.data.files import read_json
from mtpd_jax.data.generations import LEFT_OUT, MANIFEST, parse_row, shards_of


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the prompts: answered as a whole, failed on the way, or never begun; and the tokens written."""

    ok: int = 0
    failed: int = 0
    skipped: int = 0
    tokens: int = 0

    @property
    def prompts(self) -> int:
        """All of them."""
        return self.ok + self.failed + self.skipped


def validate(folder: pathlib.Path) -> Counts:
    """Reads everything again: every row whole, every id once, every prompt accounted for.

    Raises:
      ValueError: naming what is not.
    """
    manifest = read_json(folder / MANIFEST)
    written, left_out = Written.of(folder, mend=False), LeftOut(folder / LEFT_OUT, mend=False)
    both = sorted(written.ids & left_out.ids.keys())
    if both:
        raise ValueError(f"{folder}: id {both[0]!r} is answered, and left out")
    states = list(left_out.ids.values())
    counts = Counts(len(written.ids), states.count("failed"), states.count("skipped"), written.tokens)
    if counts.prompts > manifest["rows"]:
        raise ValueError(f"{folder}: accounts for {counts.prompts} prompts of {manifest['rows']}")
    return counts


@dataclasses.dataclass
class Written:
    """What stands in a folder: ids whose turns are all there, and the tokens that were written."""

    ids: set[str]
    tokens: int

    @classmethod
    def of(cls, folder: pathlib.Path, mend: bool) -> "Written":
        """Reads the files of rows; to ``mend`` them is to cut off what a killed process left of an answer at an end.

        Raises:
          ValueError: something else is wrong with them.
        """
        found = cls(set(), 0)
        for path in shards_of(folder):
            whole = _whole_lines(path)
            place, rows = 0, []
            for number, line in enumerate(whole.splitlines(keepends=True), 1):
                rows.append((place, parse_row(line, f"{path}, line {number}")))
                place += len(line)
            end = found._take(path, rows, len(whole))
            if mend:
                _cut(path, end)
        return found

    def _take(self, path: pathlib.Path, rows: list[tuple[int, dict[str, Any]]], end: int) -> int:
        """Takes in the rows of a file; returns where the last whole conversation in it ends."""
        at = 0
        while at < len(rows):
            place, row = rows[at]
            turns = [one for _, one in rows[at : at + row["turns"]]]
            if row["id"] in self.ids:
                raise ValueError(f"{path}: id {row['id']!r} stands there twice")
            if [(one["id"], one["turn"]) for one in turns] != [(row["id"], turn) for turn in range(row["turns"])]:
                if at + len(turns) < len(rows):
                    raise ValueError(f"{path}: id {row['id']!r} lacks a turn")
                return place
            self.ids.add(row["id"])
            self.tokens += sum(sum(one["loss_mask"]) for one in turns)
            at += row["turns"]
        return end


class LeftOut:
    """The prompts without an answer, by id, and whether they failed or were skipped; a file of JSON lines."""

    def __init__(self, path: pathlib.Path, mend: bool):
        self._path = path
        self.ids: dict[str, str] = {}
        if not path.exists():
            return
        whole = _whole_lines(path)
        if mend:
            _cut(path, len(whole))
        try:
            for line in whole.splitlines():
                row = json.loads(line)
                self.ids[row["id"]] = row["status"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a file of prompts that were left out ({error})") from error

    def add(self, id: str, status: str, reason: str) -> None:
        """Adds a prompt, unless it is there."""
        if id not in self.ids:
            self.ids[id] = status
            append(self._path, json.dumps({"id": id, "status": status, "reason": reason}) + "\n")


def _whole_lines(path: pathlib.Path) -> bytes:
    """A file without what a killed process left of a line at its end."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _cut(path: pathlib.Path, end: int) -> None:
    """Cuts off what stands after so many bytes of a file, if anything does."""
    if path.stat().st_size > end:
        os.truncate(path, end)


def append(path: pathlib.Path, text: str) -> None:
    """Adds lines, on disk before this returns."""
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
