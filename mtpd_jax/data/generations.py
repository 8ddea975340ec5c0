"""What a model wrote itself, as data: token ids and which of them it wrote, never text that would be cut anew.

A folder of generations holds ``manifest.json``, which says of what model and how, ``generations-00000.jsonl`` and so on
with a row per answer, and ``left_out.jsonl`` with the prompts that have none, and why. A row is

    {"id": …, "turn": 0, "turns": 1, "group": …, "ids": [prompt and answer], "loss_mask": [0, …, 1, …], "finish": "end"}

with 1 in the mask for every token that the model wrote, the token that ends its turn included. An answer that was cut
at its length has no such token, so that nothing teaches to end there.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mtpd_jax import fields
from mtpd_jax.config import DataConfig
from mtpd_jax.data.documents import Generated
from mtpd_jax.data.files import File, read_json
from mtpd_jax.data.sources import SpanSource
from mtpd_jax.fields import given

MANIFEST, LEFT_OUT = "manifest.json", "left_out.jsonl"
# How an answer ends: with a token that ends a text, at its length, or with a stop string.
FINISHES = ("end", "length", "stop")


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
        whole = len(ids) == len(mask) and set(mask) <= {0, 1}
        whole = whole and all(type(token) is int and token >= 0 for token in ids)
        group = int(row["group"], 16)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        begun = line[:60].decode(errors="replace")
        raise ValueError(f"{where}: {begun!r}…: no row of generations ({error})") from error
    if not (known and whole and 0 <= group < 2**64):
        raise ValueError(f"{where}: id {row['id']!r}: not a whole row of generations")
    if not any(mask):
        raise ValueError(f"{where}: id {row['id']!r}: no token of it is supervised: there is nothing to learn")
    return row


def generated_of(row: Mapping[str, Any]) -> Generated:
    """A row as a document."""
    return Generated(np.asarray(row["ids"], np.int32), np.asarray(row["loss_mask"], bool), int(row["group"], 16))


class GenerationsSource(SpanSource):
    """The rows of a folder of generations.

    Attributes:
      tokenizer_digest: of the tokenizer that its ids are of.
    """

    def __init__(self, folder: pathlib.Path):
        manifest = read_json(folder / MANIFEST)
        self.tokenizer_digest = str(manifest.get("tokenizer"))
        paths = shards_of(folder)
        if not paths:
            raise ValueError(f"{folder}: holds no generations; write them with mtpd_jax.corpus")
        self._supervised = self._tokens = 0

        def find(file: File) -> Iterator[tuple[int, int]]:
            for number, (start, raw) in enumerate(file.pieces(b"\n"), 1):
                if raw.strip():
                    row = parse_row(raw, f"{file.path}, line {number}")
                    self._supervised += sum(row["loss_mask"])
                    self._tokens += len(row["ids"])
                    yield start, start + len(raw)

        super().__init__(
            paths, find, lambda file, *span: generated_of(json.loads(file.read(*span))), reads="generations"
        )
        share = self._supervised / max(self._tokens, 1)
        tokens = f"{self._supervised:,} of {self._tokens:,} tokens are supervised ({share:.0%})"
        self.note = f"{len(self):,} answers: {tokens}"


@dataclasses.dataclass(frozen=True)
class GenerationsData(DataConfig, case="generations"):
    """A folder that ``mtpd_jax.corpus`` wrote: a model's own answers, by token id."""

    path: str = fields.field("", given("a folder that mtpd_jax.corpus wrote"), resumable=True)  # a digest tells what

    def open(self) -> GenerationsSource:
        return GenerationsSource(pathlib.Path(self.path).expanduser())
