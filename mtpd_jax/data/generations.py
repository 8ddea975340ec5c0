"""What a model wrote itself, as data: token ids and which of them it wrote, never text that would be cut anew.

``data.written`` says what stands in a folder of generations.
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
from mtpd_jax.data.written import MANIFEST, shards_of, validate
from mtpd_jax.fields import given


def generated_of(row: Mapping[str, Any]) -> Generated:
    """A row as a document."""
    return Generated(np.asarray(row["ids"], np.int32), np.asarray(row["loss_mask"], bool), int(row["group"], 16))


class GenerationsSource(SpanSource):
    """The rows of a folder of generations, which has to be finished: what is written first are the short prompts.

    Attributes:
      tokenizer_digest: of the tokenizer that its ids are of.
    """

    def __init__(self, folder: pathlib.Path):
        self.tokenizer_digest = str(read_json(folder / MANIFEST).get("tokenizer"))
        counts = validate(folder)
        if not counts.ok:
            raise ValueError(f"{folder}: holds no generations; write them with mtpd_jax.corpus")

        def find(file: File) -> Iterator[tuple[int, int]]:
            return ((start, start + len(raw)) for start, raw in file.pieces(b"\n") if raw)

        super().__init__(
            shards_of(folder), find, lambda file, *span: generated_of(json.loads(file.read(*span))), reads="generations"
        )
        tokens = counts.tokens + counts.given
        supervised = f"{counts.tokens:,} of {tokens:,} tokens are supervised ({counts.tokens / tokens:.0%})"
        self.note = f"{len(self):,} answers: {supervised}"


@dataclasses.dataclass(frozen=True)
class GenerationsData(DataConfig, case="generations"):
    """A folder that ``mtpd_jax.corpus`` wrote: a model's own answers, by token id."""

    # A digest tells what it holds.
    path: str = fields.field("", given("a folder that mtpd_jax.corpus wrote"), resumable=True)

    def open(self) -> GenerationsSource:
        return GenerationsSource(pathlib.Path(self.path).expanduser())
