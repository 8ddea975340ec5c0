"""What a source of text holds: texts, or what a model wrote, as token ids; and the rule that holds some of it out."""

import dataclasses
import hashlib
from typing import TypeAlias

import numpy as np

from mtpd_jax.shapes import Bool, Int


@dataclasses.dataclass(frozen=True)
class Generated:
    """A prompt and what a model wrote after it, as it was written.

    Attributes:
      ids: [T]; of both, and of the token that ended it, if one did.
      supervised: [T]; which of them the model wrote.
      group: 64 bits; rows that tell of each other, the turns of a conversation, have the same.
    """

    ids: Int[np.ndarray, " T"]
    supervised: Bool[np.ndarray, " T"]
    group: int

    @property
    def prompt(self) -> Int[np.ndarray, " P"]:
        """What the model was given."""
        return self.ids[: int(np.argmax(self.supervised))]


Document: TypeAlias = str | Generated


def digest_of(content: bytes) -> int:
    """64 bits by which documents are told apart."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _digest(document: Document) -> int:
    return digest_of(document.encode("utf-8", errors="surrogatepass")) if isinstance(document, str) else document.group


def held_out(document: Document, fraction: float) -> bool:
    """Whether a document belongs to the validation split.

    It is decided by a hash of the text, or of the prompt, so exact duplicates always lie on the same side, and a
    document's side does not depend on what else is in the source.
    """
    return _digest(document) < fraction * 2**64


def selects(document: Document) -> bool:
    """Which half of the held-out documents one belongs to: by those of the one checkpoints are rated, and by those of
    the other they are reported."""
    return _digest(document) % 2 == 0
