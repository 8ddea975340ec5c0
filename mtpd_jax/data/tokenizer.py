"""The tokenizer: a byte-level BPE trained on the training split, or any tokenizer.json that can end a document."""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from mtpd_jax.config import TokenizerConfig

Decode = Callable[[Sequence[int]], str]
# How SentencePiece names a token that is one byte.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# What stands for a character of which some tokens are missing.
INCOMPLETE = "\ufffd"
# Tokens that are decoded with those after them: some of them may write nothing.
_CONTEXT = 4


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      begin_ids: of the token before every document and prompt; empty where there is none.
      end_id: the id of the token that ends every document.
      end_ids: those of all tokens that end a text in decoding, that one first.
      size: the largest id, and one: the rows that an embedding must have. Ids may have gaps.
    """

    def __init__(
        self,
        library_tokenizer: tokenizers.Tokenizer,
        end_token: str,
        more_end_tokens: Sequence[str] = (),
        begin_token: str = "",
    ):
        """Wraps a tokenizer of the ``tokenizers`` library; for the other arguments see ``TokenizerConfig``.

        Raises:
          ValueError: one of the tokens is not in its vocabulary.
        """

        def id_of(token: str, field: str) -> int:
            found = library_tokenizer.token_to_id(token)
            if found is None:
                raise ValueError(f"config.tokenizer.{field} = {token!r}: not in the tokenizer's vocabulary")
            return found

        # A document that spells out the end token must not be able to end itself.
        library_tokenizer.encode_special_tokens = True
        library_tokenizer.no_truncation()
        library_tokenizer.no_padding()
        self._tokenizer = library_tokenizer
        self.begin_ids = (id_of(begin_token, "begin_token"),) if begin_token else ()
        self.end_id = id_of(end_token, "end_token")
        self.end_ids = (self.end_id, *(id_of(token, "more_end_tokens") for token in more_end_tokens))
        self.size: int = 1 + max(library_tokenizer.get_vocab(with_added_tokens=True).values())

    @classmethod
    def train(
        cls,
        documents: Iterable[str],
        vocabulary_size: int,
        end_token: str,
        limit: int,
        more_end_tokens: Sequence[str] = (),
        begin_token: str = "",
    ) -> "Tokenizer":
        """Trains a byte-level BPE.

        Args:
          documents: training documents, never validation ones.
          vocabulary_size: ids, at most; a small text yields fewer.
          end_token: becomes id 0.
          limit: stop reading after this many bytes of text.
          more_end_tokens, begin_token: of those that come out.
        """
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            special_tokens=[end_token],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(_at_most(documents, limit), trainer)
        return cls(bpe, end_token, more_end_tokens, begin_token)

    @classmethod
    def load(cls, path: epath.PathLike, config: TokenizerConfig) -> "Tokenizer":
        """Loads a tokenizer.json, with the tokens around a text that a config names.

        Raises:
          ValueError: the file is missing or is not a tokenizer, or lacks one of the tokens.
        """
        return cls(cls.open(path), config.end_token, config.more_end_tokens, config.begin_token)

    @staticmethod
    def open(path: epath.PathLike) -> tokenizers.Tokenizer:
        """Opens a tokenizer.json as the library does; see ``load``."""
        try:
            text = epath.Path(path).read_bytes().decode("utf-8")
            return tokenizers.Tokenizer.from_str(text)
        except UnicodeDecodeError as error:
            raise ValueError(f"tokenizer {str(path)!r}: byte {error.start} is not UTF-8") from error
        except OSError as error:
            raise ValueError(f"tokenizer {str(path)!r}: cannot be read ({error.strerror or error})") from error
        except Exception as error:  # the library raises a bare Exception for a file that it cannot parse
            raise ValueError(f"tokenizer {str(path)!r}: expected a readable tokenizer.json ({error})") from error

    @property
    def digest(self) -> str:
        """A hash of what it does, however its file is written."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The contents of a tokenizer.json."""
        return self._tokenizer.to_str()

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, [T] int32, without any token around it."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_prompt(self, text: str) -> np.ndarray:
        """Token ids of a text that is to be continued, [T] int32: those of a document's beginning."""
        return np.concatenate([np.asarray(self.begin_ids, np.int32), self.encode(text)])

    def encode_rendered(self, text: str) -> np.ndarray:
        """Token ids of what a chat template wrote, [T] int32: special tokens are those that their names stand for."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def encode_document(self, text: str) -> np.ndarray:
        """Token ids of a document and the end token after it, [T+1] int32."""
        return np.append(self.encode_prompt(text), np.int32(self.end_id))

    @property
    def special_tokens(self) -> set[str]:
        """Names of the tokens that write nothing in a text."""
        return {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}

    @property
    def added_tokens(self) -> dict[str, int]:
        """Ids of the tokens that were added to the vocabulary, special or not, by name."""
        return {token.content: id for id, token in self._tokenizer.get_added_tokens_decoder().items()}

    def decode(self, ids: Sequence[int] | np.ndarray, special: bool = False) -> str:
        """The text of token ids; special tokens write nothing, or their names."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=not special)

    def text_after(self, prompt: np.ndarray) -> Decode:
        """What turns ids that stand after a prompt into text.

        By themselves they would be a text's beginning, where SentencePiece's tokenizers drop a space.
        """
        context = prompt[-_CONTEXT:].tolist()
        before = self.decode(context)
        if before.endswith(INCOMPLETE):  # half a character, which would become another with what follows
            return self.decode
        return lambda ids: self.decode([*context, *ids])[len(before) :]

    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes, perhaps half a character, that each id writes in a text; special tokens write none.

        Raises:
          ValueError: the tokenizer writes tokens in a way that is not known here.
        """
        to_bytes = _writer_of(json.loads(self._tokenizer.to_str())["decoder"])
        special = {id for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        found = [b""] * self.size
        for token, id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            found[id] = b"" if id in special else to_bytes(token)
        return found

    def encode_document_and_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a document with its end token, and the UTF-8 bytes that each stands for, both [T+1].

        The tokens around the text stand for none. A character that is split over several tokens counts with the first
        of them.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.asarray([*encoding.ids, self.end_id], np.int32)
        # Offsets count characters; their ends are made to partition the text, whatever the tokenizer strips.
        ends = np.array([end for _, end in encoding.offsets], np.int64)
        ends[-1:] = len(text)
        # From characters to bytes.
        character_bytes = [len(character.encode("utf-8", errors="replace")) for character in text]
        bytes_before = np.concatenate([[0], np.cumsum(character_bytes, dtype=np.int64)])
        lengths = np.diff(bytes_before[np.maximum.accumulate(ends)], prepend=0)
        before = np.asarray(self.begin_ids, np.int32)
        return np.concatenate([before, ids]), np.concatenate([np.zeros_like(before), lengths, [0]])


def _writer_of(decoder: dict[str, Any] | None) -> Callable[[str], bytes]:
    """What turns a token's name into the bytes that it writes, by the description of a library's decoder."""
    parts = decoder.get("decoders", [decoder]) if decoder else []
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        by_character = _byte_level()
        return lambda token: bytes(
            itertools.chain(*([by_character[c]] if c in by_character else c.encode() for c in token))
        )
    if "ByteFallback" in kinds or "Metaspace" in kinds:  # SentencePiece: a mark for the space, <0x0A> for a byte
        return lambda token: (
            bytes([int(token[3:5], 16)]) if _BYTE.fullmatch(token) else token.replace("\u2581", " ").encode()
        )
    raise ValueError(
        "stop strings need a tokenizer that is byte-level or SentencePiece's; "
        f"the run's has the decoders {', '.join(sorted(kinds)) or 'none'}"
    )


def _byte_level() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies (GPT-2): those that can be seen for themselves."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _at_most(documents: Iterable[str], limit: int) -> Iterator[str]:
    seen = 0
    for document in documents:
        yield document
        seen += len(document.encode("utf-8", errors="replace"))
        if seen >= limit:
            return
