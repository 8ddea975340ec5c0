"""Random-access collections of documents, and the rule that holds some of them out."""

import dataclasses
import glob
import hashlib
import pathlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from mtpd_jax import fields
from mtpd_jax.config import DataConfig
from mtpd_jax.data.documents import Document, held_out
from mtpd_jax.data.files import File, json_field, plain_pieces
from mtpd_jax.fields import POSITIVE, given

# Tests, and modules that are tables of data rather than code.
_LEFT_OUT = {"test", "tests", "idle_test", "testing", "encodings", "pydoc_data", "site-packages", "__pycache__"}
# A file of more bytes without a separator is cut into documents. Our choice: essays and stories stay whole.
_PLAIN_FROM = 1 << 16


Find = Callable[[File], Iterator[tuple[int, int]]]
Parse = Callable[[File, int, int], Document]


class Source(Protocol):
    """A fixed, ordered collection of documents.

    Attributes:
      note: what has to be said of how they were made; nothing where there is nothing to say.
      tokenizer_digest: of the tokenizer that its ids are of; empty of texts.
    """

    note: str
    tokenizer_digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Document:
        """Returns one document."""
        ...

    def digest(self) -> str:
        """A hash of the contents: equal for the same documents, wherever they lie."""
        ...


class FileSource:
    """One document per file: programs, some of which are in another encoding; a byte that is no UTF-8 is replaced."""

    note = tokenizer_digest = ""

    def __init__(self, paths: Sequence[pathlib.Path]):
        self._files = [File(path) for path in paths]

    def digest(self) -> str:
        return _digest_of(file.digest().encode() for file in self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> str:
        file = self._files[index]
        return file.read(0, file.size).decode("utf-8", errors="replace")


class SpanSource:
    """Documents that are byte ranges of files; the files are scanned once for the ranges and then read at random.

    Args:
      paths: the files.
      find: yields the (start, end) of every document of a file, each of them checked: a bad one must not turn up hours
        into a run.
      parse: turns (file, start, end) into a document.
      reads: says what ``parse`` takes of the bytes.
    """

    tokenizer_digest = ""

    def __init__(self, paths: Sequence[pathlib.Path], find: Find, parse: Parse, reads: str):
        self._files = [File(path) for path in paths]
        self._parse, self._reads = parse, reads
        self._spans = [(number, *span) for number, file in enumerate(self._files) for span in find(file)]
        self.note = ""

    def digest(self) -> str:
        spans = np.asarray(self._spans, np.int64).tobytes()
        return _digest_of([self._reads.encode(), spans, *(file.digest().encode() for file in self._files)])

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: Any) -> Document:
        number, start, end = self._spans[index]
        return self._parse(self._files[number], start, end)


class TfdsSource:
    """A tensorflow-datasets data set, read through its ArrayRecord or array files without TensorFlow.

    It may be too large to be read for a digest: name, version, split and sizes stand for what it holds.
    """

    def __init__(self, name: str, split: str, directory: str, field: str):
        import tensorflow_datasets as tfds

        self.note = self.tokenizer_digest = ""
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
        # Its text is bytes in the field that was named.
        first = self._records[0] if len(self._records) else {field: b""}
        if not isinstance(first.get(field), bytes):
            texts = [name for name, value in first.items() if isinstance(value, bytes)]
            raise ValueError(f"config.data.field = {field!r}: expected a field that holds text: {', '.join(texts)}")

    def digest(self) -> str:
        return _digest_of([self._outline.encode()])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> str:
        raw = self._records[index][self._field]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"config.data.field = {self._field!r}, record {index}: byte {error.start} is not UTF-8"
            ) from error


def open_source(config: DataConfig) -> Source:
    """Opens the documents that a config names.

    Raises:
      ValueError: a path matches nothing, a line is not JSON or lacks the field, a data set cannot be read, there is
        no document at all, or every document is held out.
    """
    source: Source = config.open()
    if not len(source):
        raise ValueError(f"config.data.source = {config.source!r}: found no document")
    fraction = config.validation_fraction
    if next(split(source, fraction, validation=False), None) is None:
        raise ValueError(f"config.data.validation_fraction = {fraction}: holds out all {len(source)} documents")
    return source


def identity(source: Source) -> dict[str, Any]:
    """What a run records of its documents, to know them again: how many there are, and their digest."""
    return {"documents": len(source), "digest": source.digest()}


def holds_out(source: Source, fraction: float) -> bool:
    """Whether any document belongs to the validation split."""
    return fraction > 0 and next(split(source, fraction, validation=True), None) is not None


def split(source: Source, fraction: float, validation: bool) -> Iterator[Document]:
    """Yields one side's documents in the source's order."""
    for index in range(len(source)):
        document = source[index]
        if held_out(document, fraction) == validation:
            yield document


def _digest_of(parts: Iterable[bytes]) -> str:
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
    files: dict[pathlib.Path, None] = {}
    for pattern in patterns:
        matches = [path for path in map(pathlib.Path, sorted(glob.glob(pattern, recursive=True))) if path.is_file()]  # noqa: PTH207
        if not matches:
            raise ValueError(f"{name} = {pattern!r}: expected a file, or a glob that matches one")
        files.update(dict.fromkeys(matches))
    return list(files)


_FILES = given("at least one file or glob")
_TEXT_FIELD = given("the name of the field that holds the text")


@dataclasses.dataclass(frozen=True)
class PythonData(DataConfig, case="python"):
    """The source code of the Python that runs this: one document per file."""

    packages: bool = fields.field(True)  # also read every package installed beside the standard library

    def open(self) -> Source:
        return FileSource(_python_files(self.packages))


@dataclasses.dataclass(frozen=True)
class TextData(DataConfig, case="text"):
    """Text files, each of several documents."""

    paths: tuple[str, ...] = fields.field((), _FILES, resumable=True)  # files or globs; a digest tells what they hold
    separator: str = fields.field("<|endoftext|>", given("the text that stands between documents"))  # in these files

    def open(self) -> Source:
        separator, cut = self.separator.encode(), []

        def find(file: File) -> Iterator[tuple[int, int]]:
            # A large file without separators is no single document.
            plain = file.size > _PLAIN_FROM and not file.holds(separator)
            if plain:
                cut.append(file.path)
            for start, raw in plain_pieces(file) if plain else file.pieces(separator):
                file.decode(start, raw)
                if raw.strip():
                    yield start, start + len(raw)

        paths = expand(self.paths, "config.data.paths")
        source = SpanSource(paths, find, lambda file, *span: file.text(*span).strip("\n"), reads="text")
        if cut:
            which = str(cut[0]) if len(cut) == 1 else f"{len(cut)} files"
            source.note = (
                f"{which}: without {self.separator!r}; cut into documents of 4 to 8 kB, at blank lines if possible"
            )
        return source


@dataclasses.dataclass(frozen=True)
class JsonlData(DataConfig, case="jsonl"):
    """Files of JSON lines: one document per line."""

    paths: tuple[str, ...] = fields.field((), _FILES, resumable=True)  # files or globs; a digest tells what they hold
    field: str = fields.field("text", _TEXT_FIELD)  # of a document

    def open(self) -> Source:
        name = self.field
        return SpanSource(
            expand(self.paths, "config.data.paths"),
            lambda file: _json_lines(file, name),
            lambda file, start, end: json_field(file.read(start, end), name, str(file.path)),
            reads=name,
        )


@dataclasses.dataclass(frozen=True)
class TfdsData(DataConfig, case="tfds"):
    """A tensorflow-datasets data set that was prepared with ``file_format="array_record"``."""

    # With its config, if it has several: "c4/en".
    name: str = fields.field("", given("the name of a tensorflow-datasets data set"))
    split: str = fields.field("train")  # the split to read
    directory: str = fields.field("")  # where the prepared data set lies; empty: tensorflow-datasets' default
    field: str = fields.field("text", _TEXT_FIELD)  # of a document

    def open(self) -> Source:
        return TfdsSource(self.name, self.split, self.directory, self.field)


@dataclasses.dataclass(frozen=True)
class UnknownData(DataConfig, case="unknown"):
    """What an imported model was trained on: it is not here, and nothing of it can be held out."""

    # Tokens of the texts that its heads were trained on, where its folder says so; None: nobody knows.
    heads_length: int | None = fields.field(None, POSITIVE, as_before=None)

    def open(self) -> Source:
        raise ValueError(
            "config.data.source = 'unknown': what an imported model was trained on is not here; score files with --text"
        )


def _json_lines(file: File, field: str) -> Iterator[tuple[int, int]]:
    """Yields the ranges of lines that are not empty."""
    for number, (start, raw) in enumerate(file.pieces(b"\n"), 1):
        if raw.strip():
            json_field(raw, field, f"{file.path}, line {number}")
            yield start, start + len(raw)


def _python_files(packages: bool) -> list[pathlib.Path]:
    """Sorted by their path below the library, so that the order is the same wherever Python is installed."""
    roots = [pathlib.Path(sysconfig.get_path("stdlib"))]
    if packages:
        roots.append(pathlib.Path(sysconfig.get_path("purelib")))
    files = []
    for root in roots:
        # In an order that does not depend on the machine.
        relative = sorted(path.relative_to(root) for path in root.rglob("*.py"))
        files += [root / path for path in relative if _LEFT_OUT.isdisjoint(path.parts) and (root / path).stat().st_size]
    return files
