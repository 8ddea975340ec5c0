"""Files of text: read at random for as long as a run lasts, refused with file and place where they are no text."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

_CHUNK = 1 << 24
_BOM = b"\xef\xbb\xbf"
# Digests of larger files are kept from start to start. Our choice: smaller ones are read in milliseconds.
_CACHED_FROM = 1 << 22
# Text without separators is cut at the first blank line, line end or space between these many bytes. Our choice: the
# shorter is about the 1,024 tokens of a sequence.
_PIECE, _LONGEST_PIECE = 4096, 8192


class File:
    """A file that must stay as it is while it is read: it is never mapped into memory, where a cut would be fatal."""

    def __init__(self, path: pathlib.Path):
        """Opens a file.

        Raises:
          ValueError: it is none, but a pipe, say, which can be read only once.
        """
        self.path, self._digest = path, ""
        if not path.is_file():
            raise ValueError(f"{path}: expected a file")
        with path.open("rb") as file:
            self._state = _state(os.fstat(file.fileno()))
            self._begin = len(_BOM) if file.read(len(_BOM)) == _BOM else 0

    @property
    def size(self) -> int:
        """Bytes."""
        return self._state[0]

    def read(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` to ``end``.

        Raises:
          ValueError: the file is not what it was when it was opened.
        """
        with self.path.open("rb", buffering=0) as file:
            content = os.pread(file.fileno(), end - start, start)
            while len(content) < end - start and (
                more := os.pread(file.fileno(), end - start - len(content), start + len(content))
            ):
                content += more  # a single call reads 2 GiB at most
            state = _state(os.fstat(file.fileno()))
        if len(content) < end - start or (state != self._state and not self._only_touched(state)):
            raise ValueError(f"{self.path}: was changed while it was in use; put it back and run the command again")
        return content

    def _only_touched(self, state: tuple[int, int]) -> bool:
        """Whether it is the time alone that changed; then the file is used on."""
        before, self._state = self._state, state
        if state[0] == before[0] and self._digest and self._count_digest() == self._digest:
            return True
        self._state = before
        return False

    @property
    def begin(self) -> int:
        """The place of the first byte that is text: after a byte order mark."""
        return self._begin

    def chunks(self) -> Iterator[bytes]:
        """All of its text, in order."""
        return self._parts(self._begin, self.size)

    def _parts(self, begin: int, end: int) -> Iterator[bytes]:
        for start in range(begin, end, _CHUNK):
            yield self.read(start, min(end, start + _CHUNK))

    def pieces(self, separator: bytes) -> Iterator[tuple[int, bytes]]:
        """Yields what stands between separators: the place of its first byte, and the bytes."""
        # Only what stands after the last separator is held, and searched from where it may begin.
        held, offset, searched = bytearray(), self._begin, 0
        for chunk in self.chunks():
            held += chunk
            begin = 0
            while (end := held.find(separator, max(begin, searched))) >= 0:
                yield offset + begin, bytes(held[begin:end])
                begin = end + len(separator)
            del held[:begin]
            offset += begin
            searched = max(0, len(held) - len(separator) + 1)
        yield offset, bytes(held)

    def holds(self, separator: bytes) -> bool:
        """Whether the separator occurs."""
        seen = b""
        for chunk in self.chunks():
            seen = seen[max(0, len(seen) - len(separator) + 1) :] + chunk
            if separator in seen:
                return True
        return False

    def _lines_before(self, offset: int) -> int:
        return sum(part.count(b"\n") for part in self._parts(0, offset))

    def text(self, start: int, end: int) -> str:
        """Decodes a part of the file.

        Raises:
          ValueError: it is not UTF-8; the message says where.
        """
        return self.decode(start, self.read(start, end))

    def decode(self, start: int, raw: bytes) -> str:
        """Decodes bytes that were read from ``start`` on; see ``text``."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            at = start + error.start
            raise _no_text(self.path, self._lines_before(at), at, raw[error.start]) from None

    def digest(self) -> str:
        """SHA-256 of the contents, kept from start to start for a large file that nobody has touched since."""
        kept = _kept_digest(self.path) if self.size >= _CACHED_FROM else None
        self._digest = _read_kept(kept) or self._count_digest()
        # A file that was written a moment ago can be written again without its time changing.
        if kept is not None and time.time() - self.path.stat().st_mtime > 2:
            _keep(kept, self._digest)
        return self._digest

    def _count_digest(self) -> str:
        whole = hashlib.sha256()
        for part in self._parts(0, self.size):
            whole.update(part)
        return whole.hexdigest()


def _state(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _kept_digest(path: pathlib.Path) -> pathlib.Path | None:
    """Where a file's digest is kept: by name, size, number and times, of which the last cannot be set back.

    None where nobody is at home.
    """
    stat = path.stat()
    key = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    try:
        root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    except RuntimeError:
        return None
    return root / "mtpd_jax" / "digests" / hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _read_kept(kept: pathlib.Path | None) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        digest = kept.read_text(encoding="ascii") if kept is not None else ""
        return digest if re.fullmatch("[0-9a-f]{64}", digest) else None
    return None


def _keep(kept: pathlib.Path, digest: str) -> None:
    with contextlib.suppress(OSError):  # it is a matter of speed alone
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_name(f"{kept.name}.{os.getpid()}")
        temporary.write_text(digest, encoding="ascii")
        temporary.replace(kept)


def read_text(path: str | pathlib.Path, name: str) -> str:
    """A whole file of text, a byte order mark left out.

    Raises:
      ValueError: it cannot be read, or is not UTF-8; ``name`` says where the path was given.
    """
    try:
        raw = pathlib.Path(path).read_bytes()  # at once, for it may be a pipe
    except OSError as error:
        raise ValueError(f"{name} {str(path)!r}: cannot be read ({error.strerror or error})") from error
    begin = len(_BOM) if raw.startswith(_BOM) else 0
    try:
        return raw[begin:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = begin + error.start
        raise _no_text(path, raw.count(b"\n", 0, at), at, raw[at]) from None


def _no_text(path: str | pathlib.Path, lines_before: int, at: int, byte: int) -> ValueError:
    return ValueError(f"{path}, line {lines_before + 1}: byte {at} (0x{byte:02x}) is not UTF-8")


def read_json(path: epath.Path | pathlib.Path) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
      ValueError: it is not there, or holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return found


def json_digest(value: Any) -> str:
    """A hash of a value as JSON, whatever the order of an object's fields."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def json_field(line: str | bytes, field: str, where: str) -> str:
    """Reads a text field of one line of JSON.

    Raises:
      ValueError: the line is not a JSON object with that field as text; ``where`` names file and line.
    """
    try:
        value = json.loads(line)[field]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        start = line[:60].decode("utf-8", errors="replace") if isinstance(line, bytes) else line[:60]
        raise ValueError(f"{where}: {start!r}…: expected a JSON object with a field {field!r}") from error
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {field!r} = {value!r}: expected text")
    check_text(value, f"{where}: field {field!r}")
    return value


def check_text(text: str, where: str) -> None:
    """Checks that a text is one: half of a surrogate pair, or a byte that was no UTF-8, stands for no character.

    Raises:
      ValueError: naming the place.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start} ({text[error.start]!a}) is no character: not UTF-8"
        ) from None


def plain_pieces(file: File) -> Iterator[tuple[int, bytes]]:
    """Cuts text without separators into documents, where it can at blank lines; yields places and bytes."""
    # What is too short for a piece waits for the next chunk.
    held, offset = b"", file.begin
    for chunk in file.chunks():
        held += chunk
        begin = 0
        while len(held) - begin > _LONGEST_PIECE:
            end = _end_of_piece(held, begin)
            yield offset + begin, held[begin:end]
            begin = end
        held, offset = held[begin:], offset + begin
    yield offset, held


def _end_of_piece(text: bytes, begin: int) -> int:
    for mark in (b"\n\n", b"\n", b" "):
        at = text.find(mark, begin + _PIECE, begin + _LONGEST_PIECE)
        if at >= 0:
            return at + len(mark)
    end = begin + _LONGEST_PIECE
    while text[end] & 0xC0 == 0x80 and end > begin + _PIECE:  # not in the middle of a character
        end -= 1
    return end
