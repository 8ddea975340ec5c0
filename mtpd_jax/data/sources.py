"""Random-access collections of documents, and the rule that holds some of them out."""

import glob
import hashlib
import json
import mmap
import pathlib
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from mtpd_jax.config import DataConfig

# Tests, and modules that are tables of data rather than code.
_LEFT_OUT = {"test", "tests", "idle_test", "testing", "encodings", "pydoc_data", "site-packages", "__pycache__"}


class Source(Protocol):
    """A fixed, ordered collection of documents."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> str:
        """Returns the text of one document."""
        ...

    def digest(self) -> str:
        """A hash of the contents: equal for the same documents, wherever they lie."""
        ...


class FileSource:
    """One document per file."""

    def __init__(self, paths: Sequence[pathlib.Path]):
        self._paths = paths

    def digest(self) -> str:
        return _digest_of(path.read_bytes() for path in self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> str:
        return self._paths[index].read_text(encoding="utf-8", errors="replace")


class SpanSource:
    """Documents that are byte ranges of files; the files are scanned once for the ranges and then read at random.

    Args:
      paths: the files.
      find: yields the (start, end) of every document in a file's bytes.
      parse: turns the bytes of one document into its text.
      reads: says what ``parse`` takes of the bytes.
    """

    def __init__(self, paths: Sequence[pathlib.Path], find: Any, parse: Any, reads: str):
        self._maps: list[bytes | mmap.mmap] = [_map(path) for path in paths]
        self._parse, self._reads = parse, reads
        self._spans = [(file, *span) for file, content in enumerate(self._maps) for span in find(content)]

    def digest(self) -> str:
        return _digest_of([self._reads.encode(), np.asarray(self._spans, np.int64).tobytes(), *self._maps])

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: Any) -> str:
        file, start, end = self._spans[index]
        return self._parse(self._maps[file][start:end])


class TfdsSource:
    """A tensorflow-datasets data set, read through its ArrayRecord or array files without TensorFlow.

    It may be too large to be read for a digest: name, version, split and sizes stand for what it holds.
    """

    def __init__(self, name: str, split: str, directory: str, field: str):
        import tensorflow_datasets as tfds

        try:
            builder: Any = tfds.builder(name, data_dir=directory or None)
            self._records = builder.as_data_source(split)
        except Exception as error:  # the library raises many kinds, and all of them mean that this set cannot be read
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(
                f"config.data.name = {name!r}, split {split!r}: not readable as a random-access data set ({reason}); "
                "prepare it with file_format='array_record', or name another"
            ) from error
        self._field = field
        info = builder.info
        self._outline = f"{info.full_name} {split} {field} {len(self._records)} {info.dataset_size}"
        first = self._records[0] if len(self._records) else {field: b""}
        if not isinstance(first.get(field), bytes):
            texts = [name for name, value in first.items() if isinstance(value, bytes)]
            raise ValueError(f"config.data.field = {field!r}: expected a field that holds text: {', '.join(texts)}")

    def digest(self) -> str:
        return _digest_of([self._outline.encode()])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> str:
        return self._records[index][self._field].decode("utf-8", errors="replace")


def open_source(config: DataConfig) -> Source:
    """Opens the documents that a config names.

    Raises:
      ValueError: a path matches nothing, a line is not JSON or lacks the field, a data set cannot be read, there is
        no document at all, or every document is held out.
    """
    if config.source == "python":
        source: Source = FileSource(_python_files(config.packages))
    elif config.source == "text":
        separator = config.separator.encode()
        source = SpanSource(
            expand(config.paths, "config.data.paths"),
            lambda content: _between(content, separator),
            lambda raw: raw.decode("utf-8", errors="replace").strip("\n"),
            reads="text",
        )
    elif config.source == "jsonl":
        source = SpanSource(
            expand(config.paths, "config.data.paths"),
            lambda content: _json_lines(content, config.field),
            lambda raw: json_field(raw, config.field),
            reads=config.field,
        )
    else:
        source = TfdsSource(config.name, config.split, config.directory, config.field)
    if not len(source):
        raise ValueError(f"config.data.source = {config.source!r}: found no document")
    fraction = config.validation_fraction
    if next(split(source, fraction, validation=False), None) is None:
        raise ValueError(f"config.data.validation_fraction = {fraction}: holds out all {len(source)} documents")
    return source


def identity(source: Source) -> dict[str, Any]:
    """What a run records of its documents, to know them again: how many there are, and their digest."""
    return {"documents": len(source), "digest": source.digest()}


def held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split.

    It is decided by a hash of the text, so exact duplicates always lie on the same side, and a document's side
    does not depend on what else is in the source.
    """
    digest = hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def split(source: Source, fraction: float, validation: bool) -> Iterator[str]:
    """Yields one side's documents in the source's order."""
    for index in range(len(source)):
        text = source[index]
        if held_out(text, fraction) == validation:
            yield text


def _digest_of(parts: Iterable[bytes | mmap.mmap]) -> str:
    """One hash of several pieces of bytes, and of where each ends."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()


def expand(patterns: Sequence[str], name: str) -> list[pathlib.Path]:
    """Expands globs to files, sorted, each once.

    Raises:
      ValueError: a pattern matches no file; ``name`` says where it was given.
    """
    found: dict[pathlib.Path, None] = {}
    for pattern in patterns:
        matches = [path for path in map(pathlib.Path, sorted(glob.glob(pattern, recursive=True))) if path.is_file()]  # noqa: PTH207
        if not matches:
            raise ValueError(f"{name} = {pattern!r}: expected a file, or a glob that matches one")
        found.update(dict.fromkeys(matches))
    return list(found)


def json_field(line: str | bytes, field: str) -> str:
    """Reads a text field of one line of JSON.

    Raises:
      ValueError: the line is not a JSON object with that field as text.
    """
    try:
        value = json.loads(line)[field]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        start = line[:60].decode("utf-8", errors="replace") if isinstance(line, bytes) else line[:60]
        raise ValueError(f"line {start!r}…: expected a JSON object with a field {field!r}") from error
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} = {value!r}: expected text")
    return value


def _json_lines(content: bytes | mmap.mmap, field: str) -> Iterator[tuple[int, int]]:
    """Yields the ranges of lines, each of them checked: a bad one must not turn up hours into a run."""
    for start, end in _between(content, b"\n"):
        json_field(content[start:end], field)
        yield start, end


def _python_files(packages: bool) -> list[pathlib.Path]:
    """Sorted by their path below the library, so that the order is the same wherever Python is installed."""
    roots = [pathlib.Path(sysconfig.get_path("stdlib"))]
    if packages:
        roots.append(pathlib.Path(sysconfig.get_path("purelib")))
    files = []
    for root in roots:
        relative = sorted(path.relative_to(root) for path in root.rglob("*.py"))
        files += [root / path for path in relative if _LEFT_OUT.isdisjoint(path.parts) and (root / path).stat().st_size]
    return files


def _map(path: pathlib.Path) -> bytes | mmap.mmap:
    if not path.stat().st_size:
        return b""  # an empty file cannot be mapped
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _between(content: bytes | mmap.mmap, separator: bytes) -> Iterator[tuple[int, int]]:
    """Yields the ranges between separators, leaving out those that hold white space only."""
    start = 0
    for match in re.finditer(re.escape(separator), content):
        if content[start : match.start()].strip():
            yield start, match.start()
        start = match.end()
    if content[start:].strip():
        yield start, len(content)
