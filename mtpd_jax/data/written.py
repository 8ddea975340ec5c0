"""A folder of generations as it stands on disk: whole, or as a killed process left it.

It holds ``manifest.json``, which says of what model the answers are and how many prompts there are, files of rows,
``generations-00000.jsonl`` and so on, and ``left_out.jsonl`` with the prompts that have no answer, and why. A row is

    {"id": …, "turn": 0, "turns": 1, "group": …, "ids": [prompt and answer], "loss_mask": [0, …, 1, …], "finish": "end"}

with 1 in the mask for every token that the model wrote, the token that ends its turn included. An answer that was cut
at its length has no such token, so that nothing teaches to end there.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

from mtpd_jax.data.files import read_json

MANIFEST, LEFT_OUT = "manifest.json", "left_out.jsonl"
# How an answer ends: with a token that ends a text, at its length, or with a stop string.
FINISHES = ("end", "length", "stop")
FAILED, SKIPPED = "failed", "skipped"


def shard(number: int) -> str:
    """The name of a file of rows."""
    return f"generations-{number:05d}.jsonl"


def shards_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of rows of a folder, in their order."""
    return sorted(folder.glob("generations-*.jsonl"))


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """Reads a row, and checks it.

    Raises:
      ValueError: it is none; ``where`` names file and place.
    """
    try:
        row = json.loads(line)
        ids, mask = row["ids"], row["loss_mask"]
        known = row["finish"] in FINISHES and isinstance(row["id"], str) and 0 <= row["turn"] < row["turns"]
        # Ids as training holds them; given tokens first, and then those that were written.
        whole = len(ids) == len(mask) and all(type(token) is int and 0 <= token < 2**31 for token in ids)
        given = mask.index(1) if 1 in mask else len(mask)
        whole = whole and given > 0 and mask == [0] * given + [1] * (len(mask) - given)
        group = int(row["group"], 16)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        begun = line[:60].decode(errors="replace")
        raise ValueError(f"{where}: {begun!r}…: no row of generations ({error})") from error
    if not (known and whole and 0 <= group < 2**64):
        raise ValueError(f"{where}: id {row['id']!r}: not a whole row of generations")
    if given == len(mask):
        raise ValueError(f"{where}: id {row['id']!r}: no token of it is supervised: there is nothing to learn")
    return row


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the prompts, and the tokens of those that were answered.

    Attributes:
      ok, failed, skipped: prompts that were answered as a whole, failed on the way, or were never begun.
      tokens: that the model wrote.
      given: tokens that stood before them.
    """

    ok: int = 0
    failed: int = 0
    skipped: int = 0
    tokens: int = 0
    given: int = 0

    @property
    def prompts(self) -> int:
        """All of them."""
        return self.ok + self.failed + self.skipped


def validate(folder: pathlib.Path) -> Counts:
    """Reads everything: every row whole, every id once, every prompt accounted for.

    Raises:
      ValueError: naming what is not.
    """
    wanted = read_json(folder / MANIFEST).get("rows")
    if type(wanted) is not int:
        raise ValueError(f"{folder / MANIFEST}: rows = {wanted!r}: expected the number of prompts")
    written, left_out = Written.of(folder, mend=False), LeftOut(folder / LEFT_OUT, mend=False)
    both = sorted(written.ids & left_out.ids.keys())
    if both:
        raise ValueError(f"{folder}: id {both[0]!r} is answered, and left out")
    states = list(left_out.ids.values())
    counts = Counts(len(written.ids), states.count(FAILED), states.count(SKIPPED), written.tokens, written.given)
    if counts.prompts != wanted:
        raise ValueError(
            f"{folder}: accounts for {counts.prompts} of {wanted} prompts: the command that wrote it goes on with it"
        )
    return counts


@dataclasses.dataclass
class Written:
    """What stands in a folder: ids whose turns are all there, the tokens that were written, and those given."""

    ids: set[str]
    tokens: int = 0
    given: int = 0

    @classmethod
    def of(cls, folder: pathlib.Path, mend: bool) -> "Written":
        """Reads the files of rows; to ``mend`` them is to cut off what a killed process left of an answer at an end.

        Raises:
          ValueError: something is wrong with them, or has to be mended.
        """
        found = cls(set())
        for path in shards_of(folder):
            whole = _whole_lines(path, mend)
            place, rows = 0, []
            for number, line in enumerate(whole.splitlines(keepends=True), 1):
                rows.append((place, parse_row(line, f"{path}, line {number}")))
                place += len(line)
            end = found._take(path, rows, len(whole))
            if end < len(whole) and not mend:
                raise ValueError(f"{path}: ends within a conversation: the command that wrote it goes on with it")
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
            if [(one["id"], one["turn"]) for one in turns] != [(row["id"], turn) for turn in range(len(turns))]:
                raise ValueError(f"{path}: id {row['id']!r} lacks a turn")
            if len(turns) < row["turns"]:
                return place
            self.ids.add(row["id"])
            for one in turns:
                own = sum(one["loss_mask"])
                self.tokens, self.given = self.tokens + own, self.given + len(one["ids"]) - own
            at += row["turns"]
        return end


class LeftOut:
    """The prompts without an answer, by id, and whether they failed or were skipped; a file of JSON lines."""

    def __init__(self, path: pathlib.Path, mend: bool):
        self._path = path
        self.ids: dict[str, str] = {}
        if not path.exists():
            return
        whole = _whole_lines(path, mend)
        if mend:
            _cut(path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                id, status = row["id"], row["status"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no prompt that was left out ({error})") from error
            if status not in (FAILED, SKIPPED) or id in self.ids:
                raise ValueError(f"{path}, line {number}: id {id!r}, {status!r}: expected each id once, and its status")
            self.ids[id] = status

    def add(self, id: str, status: str, reason: str) -> None:
        """Adds a prompt, unless it is there."""
        if id not in self.ids:
            self.ids[id] = status
            append(self._path, json.dumps({"id": id, "status": status, "reason": reason}) + "\n")


def _whole_lines(path: pathlib.Path, mend: bool) -> bytes:
    """A file without what a killed process left of a line at its end, which there may be if it is to be mended."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content) and not mend:
        raise ValueError(f"{path}: ends within a row: the command that wrote it goes on with it")
    return content[:end]


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
