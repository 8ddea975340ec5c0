"""Files of text: in pieces of any size, unchanged while they are in use, refused with a place where they are none."""

import json
import os
import pathlib
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpd_jax import evaluate, train
from mtpd_jax.data import files as files_module
from mtpd_jax.data import sources as sources_module
from mtpd_jax.data.files import File, json_field, plain_pieces, read_text
from mtpd_jax.data.prompts import prompts_of
from mtpd_jax.data.sources import holds_out, identity, open_source, split
from tests.builders import replace, tiny_config


def data_config(**fields):
    return replace(tiny_config(), **{f"data__{name}": value for name, value in fields.items()}).data


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([b"a", b"|", b"||", b"|-|", b"|-", b"\n", b"long piece "]), max_size=30), st.integers(1, 9)
)
def test_pieces_are_those_of_splitting(tmp_path_factory, parts, chunk):
    """Whatever lies on the border of two chunks."""
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    content = b"".join(parts)
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files_module, "_CHUNK", chunk)
        file = File(path)
        for separator in (b"|", b"|-|", b"\n"):
            found = list(file.pieces(separator))
            assert [piece for _, piece in found] == content.split(separator)
            assert all(content[start : start + len(piece)] == piece for start, piece in found)
            assert file.holds(separator) == (separator in content)


def test_a_file_that_changes_while_it_is_used_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one|two|three")
    source = open_source(data_config(source="text", paths=(str(path),), separator="|"))
    assert source[1] == "two"
    os.truncate(path, 5)
    with pytest.raises(ValueError, match=r"a\.txt: was changed while it was in use"):
        source[2]
    path.write_text("one|twa|three")
    with pytest.raises(ValueError, match=r"a\.txt: was changed"):
        source[0]


def test_data_that_are_cut_end_a_run_with_their_name(text_file, tmp_path, monkeypatch):
    """And not with a signal, from whichever thread reads them."""
    path = tmp_path / "documents.txt"
    path.write_bytes(pathlib.Path(text_file).read_bytes())
    config = tiny_config(
        data__source="text", data__paths=(str(path),), training__steps=500, evaluation__every_steps=500
    )
    real = train.make_step

    def cutting(*arguments):
        os.truncate(path, 100)
        return real(*arguments)

    monkeypatch.setattr(train, "make_step", cutting)
    with pytest.raises(ValueError, match=r"documents\.txt: was changed while it was in use"):
        train.run(config, str(tmp_path / "run"))


def test_digests_of_large_files_are_kept(tmp_path, monkeypatch):
    """Until anything about the file changes, its times included, which cannot all be set back."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files_module, "_CACHED_FROM", 10)
    path = tmp_path / "a.txt"
    path.write_text("one, and two")
    os.utime(path, (1e9, 1e9))
    first = File(path).digest()
    assert len(list((tmp_path / "cache").rglob("*/digests/*"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(File, "read", lambda *_: pytest.fail("read again"))
        assert File(path).digest() == first
    path.write_text("one, and twa")
    os.utime(path, (1e9, 1e9))
    second = File(path).digest()
    assert second != first
    path.write_text("one, and two")
    assert File(path).digest() == first  # written a moment ago: counted, and not kept
    assert len(list((tmp_path / "cache").rglob("*/digests/*"))) == 2
    for kept in (tmp_path / "cache").rglob("*/digests/*"):
        kept.write_text("")  # as a crash may leave it
    os.utime(path, (1e9, 1e9))
    assert File(path).digest() == first
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    assert File(path).digest() == first
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert File(path).digest() == first


def test_a_file_that_was_only_touched_is_used_on(tmp_path):
    """Once it has been counted, the same bytes are the same file, whatever its times say."""
    path = tmp_path / "a.txt"
    path.write_text("one|two|three")
    source = open_source(data_config(source="text", paths=(str(path),), separator="|"))
    source.digest()
    os.utime(path, (1e9, 1e9))
    assert [source[number] for number in range(3)] == ["one", "two", "three"]
    path.write_text("one|twa|three")
    with pytest.raises(ValueError, match="was changed"):
        source[0]


def test_text_may_come_through_a_pipe(tmp_path):
    """Which can be read only once; what is read at random has to be a file."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(b"\xef\xbb\xbfthe cat"))
    writer.start()
    assert read_text(tmp_path / "pipe", "--prompt_file") == "the cat"
    writer.join()
    with pytest.raises(ValueError, match="pipe: expected a file"):
        File(tmp_path / "pipe")


def test_json_lines_end_where_lines_end(tmp_path):
    """Not at the separators that Unicode has beside; a byte order mark is no text."""
    path = tmp_path / "a.jsonl"
    texts = ["one\u2028line", "next\u0085line", "formfeed\x0c", "last"]
    path.write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(json.dumps({"prompt": t}, ensure_ascii=False) for t in texts).encode()
    )
    source = open_source(data_config(source="jsonl", paths=(str(path),), field="prompt"))
    assert [source[number] for number in range(len(source))] == texts
    assert prompts_of(str(path)) == texts
    assert prompts_of(str(path), 2) == texts[:2]
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone<|endoftext|>two")
    source = open_source(data_config(source="text", paths=(str(tmp_path / "b.txt"),)))
    assert [source[0], source[1]] == ["one", "two"]
    assert read_text(tmp_path / "b.txt", "--text") == "one<|endoftext|>two"


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b'{"text": "a"}\n\n{"text": "caf\xe9"}\n', r"a\.file, line 3"),
        (b'{"text": "a"}\nnone\n', r"a\.file, line 2: 'none'…: expected a JSON object"),
        (b'{"text": "\\ud800"}\n', r"a\.file, line 1: field 'text': character 0 \('\\ud800'\) is no character"),
        (b"[" * 100_000, r"a\.file, line 1"),
        (b'{"text": 3}', r"a\.file, line 1: field 'text' = 3: expected text"),
    ],
    ids=["bytes", "words", "surrogate", "nested", "number"],
)
def test_bad_lines_are_named_by_file_and_line(tmp_path, content, place):
    path = tmp_path / "a.file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=place):
        open_source(data_config(source="jsonl", paths=(str(path),)))
    path.write_bytes(content.replace(b'"text"', b'"prompt"'))
    with pytest.raises(ValueError, match=place.replace("'text'", "'prompt'")):
        prompts_of(str(path))


def test_bytes_that_are_no_text_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n<|endoftext|>two\nthree caf\xe9")
    place = r"a\.txt, line 3: byte 30 \(0xe9\) is not UTF-8"
    with pytest.raises(ValueError, match=place):
        open_source(data_config(source="text", paths=(str(path),)))
    with pytest.raises(ValueError, match=place):
        read_text(path, "--text")
    with pytest.raises(ValueError, match="--text .*no.txt.*: cannot be read"):
        read_text(tmp_path / "no.txt", "--text")
    with pytest.raises(ValueError, match="here: field 'a' = None"):
        json_field('{"a": null}', "a", "here")


def test_plain_text_is_cut_into_documents(tmp_path):
    """At blank lines where it can be, never within a character, nothing lost; and it is said."""
    paragraph = "Wörter und Sätze. " * 30 + "\n\n"
    for name, text in {"book": paragraph * 200, "lines": "zeile ä\n" * 20_000, "solid": "ä漢" * 30_000}.items():
        path = tmp_path / f"{name}.txt"
        path.write_text(text)
        pieces = [piece for _, piece in plain_pieces(File(path))]
        assert b"".join(pieces) == text.encode()
        assert all(4096 <= len(piece) <= 8192 for piece in pieces[:-1]) and len(pieces[-1]) <= 8192
        assert name != "book" or all(piece.endswith(b"\n\n") for piece in pieces)
        source = open_source(data_config(source="text", paths=(str(path),)))
        assert len(source) == len(pieces) and str(path) in source.note and "cut into documents" in source.note
        assert "".join(source[i] for i in range(len(source))).replace("\n", "") == text.replace("\n", "")
    (tmp_path / "essay.txt").write_text("Ein Wort. " * 6000)
    essay = open_source(data_config(source="text", paths=(str(tmp_path / "essay.txt"),)))
    assert len(essay) == 1 and not essay.note  # as long as it is shorter than 64 kB
    assert sources_module._PLAIN_FROM == 65536
    (tmp_path / "essay.txt").write_text("Ein Wort. " * 6000 + "<|endoftext|>" + "Ein Wort. " * 6000)
    assert len(open_source(data_config(source="text", paths=(str(tmp_path / "essay.txt"),)))) == 2


@pytest.mark.parametrize(
    ("documents", "fraction"),
    [(["the cat sat on a mat " * 20] * 9, 0.2), pytest.param(["one", "two"], 0, marks=pytest.mark.slow)],
)
def test_nothing_held_out_is_said_once(tmp_path, capsys, documents, fraction):
    """And trained all the same, on all of it."""
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>".join(documents))
    config = tiny_config(
        data__source="text", data__paths=(str(path),), data__validation_fraction=fraction, training__steps=4,
        evaluation__every_steps=2, logging__every_steps=2,
    )  # fmt: skip
    source = open_source(config.data)
    assert not holds_out(source, fraction) and len(list(split(source, fraction, validation=False))) == len(documents)
    assert train.run(config, str(tmp_path / "run")).finished
    said = capsys.readouterr().err
    assert said.count("nothing is held out") == 1 and "  held out:" not in said and "\n\n" not in said
    assert "eval/" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_the_same_data_may_lie_elsewhere(text_file, tmp_path):
    """A run goes on with them, and is evaluated with them; others are refused."""
    places = [tmp_path / name for name in ("a.txt", "b.txt")]
    content = pathlib.Path(text_file).read_bytes()
    config = tiny_config(data__source="text", data__paths=(str(places[0]),), training__steps=4)
    places[0].write_bytes(content)
    first = identity(open_source(config.data))
    train.run(config, str(tmp_path / "run"))
    places[0].rename(places[1])
    moved = replace(config, data__paths=(str(places[1]),))
    assert identity(open_source(moved.data)) == first
    assert train.run(moved, str(tmp_path / "run")).finished  # a finished run is told where they are now
    assert evaluate.run(str(tmp_path / "run"), split_name="validation", limit=1).text
    assert train.run(replace(moved, training__steps=6), str(tmp_path / "run")).step == 6
    places[1].write_bytes(content.replace(b"cat", b"car"))
    with pytest.raises(ValueError, match="have changed"):
        train.run(replace(moved, training__steps=8), str(tmp_path / "run"))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ValueError, match=r"another config: data\.paths differs"):  # nothing tells them apart yet
        train.run(moved, str(tmp_path / "new"))
