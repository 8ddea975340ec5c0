"""Sources, the split, the tokenizer, and the stream of packed batches."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest
import tokenizers
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtpd_jax.config import DataConfig, TokenizerConfig
from mtpd_jax.data.pipeline import TrainingData, put_on_devices
from mtpd_jax.data.sources import FileSource, held_out, open_source, split
from mtpd_jax.data.tokenizer import Tokenizer
from tests.builders import replace, tiny_config

END = "<|endoftext|>"


def data_config(**fields) -> DataConfig:
    return replace(tiny_config(), **{f"data__{name}": value for name, value in fields.items()}).data


@pytest.fixture(scope="module")
def stream(text_file):
    config = tiny_config(data__source="text", data__paths=(text_file,), training__batch_size=4)
    source = open_source(config.data)
    tokenizer = Tokenizer.train(split(source, 0.2, validation=False), 300, END, 10**6)
    return config, source, tokenizer


def test_python_source_is_the_standard_library_without_tests():
    source = open_source(data_config(source="python"))
    assert 400 < len(source) < 1500
    paths = [str(file.path) for file in source._files]
    assert any(path.endswith("argparse.py") for path in paths)
    assert not any("/test/" in path or "/tests/" in path or "site-packages" in path for path in paths)
    more = open_source(data_config(source="python", packages=True))
    assert len(more) > len(source) + 500
    assert any("site-packages" in str(file.path) and "jax" in str(file.path) for file in more._files)


def test_text_source_splits_at_separators(tmp_path):
    (tmp_path / "a.txt").write_text("one\n<SEP>\n\n<SEP>two ä\n")
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / "empty.txt").write_text("")
    source = open_source(data_config(source="text", paths=(str(tmp_path / "*.txt"),), separator="<SEP>"))
    assert [source[index] for index in range(len(source))] == ["one", "two ä", "three"]
    assert source[2] == "three" and source[0] == "one"  # in any order


def test_jsonl_source_reads_a_field(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"body": text, "id": 1}) for text in ("x\ny", "ü")) + "\n\n")
    source = open_source(data_config(source="jsonl", paths=(str(path),), field="body"))
    assert [source[0], source[1], len(source)] == ["x\ny", "ü", 2]
    with pytest.raises(ValueError, match="field 'text'"):
        open_source(data_config(source="jsonl", paths=(str(path),), field="text"))
    path.write_text(path.read_text() + "not JSON\n")  # found at once, not in the middle of a run
    with pytest.raises(ValueError, match="not JSON"):
        open_source(data_config(source="jsonl", paths=(str(path),), field="body"))


def test_tfds_source_without_tensorflow(tmp_path):
    """A data set built here, as ArrayRecord files, and read back by name."""
    import tensorflow_datasets as tfds

    class TinyTexts(tfds.core.GeneratorBasedBuilder):
        """Three texts."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"body": tfds.features.Text()}))

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number in range(3):
                yield number, {"body": f"text {number} é"}

    TinyTexts(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    fields = {"source": "tfds", "name": "tiny_texts", "directory": str(tmp_path)}
    source = open_source(data_config(field="body", **fields))
    assert sorted(source[index] for index in range(len(source))) == [f"text {number} é" for number in range(3)]
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match="config.data.field = 'text'"):
        open_source(data_config(field="text", **fields))
    with pytest.raises(ValueError, match="config.data.name = 'no_such_set'"):
        open_source(data_config(field="body", **{**fields, "name": "no_such_set"}))


def test_a_digest_is_that_of_the_contents(tmp_path):
    """One character of the same length changes it; where the files lie, and what they are called, does not."""

    def digest(folder, texts, **fields):
        (tmp_path / folder).mkdir(exist_ok=True)
        for number, text in enumerate(texts):
            (tmp_path / folder / f"{number}.txt").write_text(text)
        return open_source(data_config(paths=(str(tmp_path / folder / "*.txt"),), **fields)).digest()

    text = {"source": "text", "separator": "|"}
    first = digest("a", ["one|two", "three"], **text)
    assert digest("b", ["one|two", "three"], **text) == first
    others = [["one|twa", "three"], ["one|two|three"], ["three", "one|two"], ["one|tw", "othree"]]
    assert len({digest(f"c{number}", texts, **text) for number, texts in enumerate(others)} | {first}) == 5
    files = [tmp_path / "b" / "0.txt", tmp_path / "b" / "1.txt"]
    whole = FileSource(files).digest()
    assert FileSource(files[::-1]).digest() != whole
    files[0].write_text("one|twa")
    assert FileSource(files).digest() != whole


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "text", "paths": ("/no/such/*.txt",)}, "expected a file"),
        ({"source": "jsonl", "paths": ("/no/such.jsonl",)}, "expected a file"),
    ],
)
def test_missing_files_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        open_source(data_config(**fields))


def test_duplicates_lie_on_one_side_and_nothing_is_lost(stream):
    _, source, _ = stream
    sides = [list(split(source, 0.2, validation)) for validation in (True, False)]
    assert not set(sides[0]) & set(sides[1])
    assert len(sides[0]) + len(sides[1]) == len(source) > len(set(sides[0]) | set(sides[1]))
    assert 0 < len(sides[0]) < len(sides[1])
    shares = np.mean([held_out(f"document {number}", 0.1) for number in range(5000)])
    assert shares == pytest.approx(0.1, abs=0.015)


def test_tokenizer_is_never_trained_on_validation_text(tmp_path):
    """A word that only held-out documents contain is not in the vocabulary."""
    texts = [f"common words {number}" for number in range(200)]
    texts = [text + (" zyxwvut" * 20 if held_out(text + " zyxwvut" * 20, 0.2) else "") for text in texts]
    path = tmp_path / "a.txt"
    path.write_text(END.join(texts))
    source = open_source(data_config(source="text", paths=(str(path),)))
    both = [Tokenizer.train(documents, 350, END, 10**6) for documents in (split(source, 0.2, False), texts)]
    assert "zyxwvut" not in both[0].to_json() and "zyxwvut" in both[1].to_json()


def test_tokenizer_round_trips_any_text(stream, tmp_path):
    _, _, tokenizer = stream
    for text in ("hello", "  two  spaces\n\ttab", "ünïcödé 漢字 🙂", END + " is text here", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_id not in ids  # a document cannot end itself
        document, lengths = tokenizer.encode_document_and_bytes(text)
        assert document.tolist() == tokenizer.encode_document(text).tolist() == [*ids, tokenizer.end_id]
        assert lengths.sum() == len(text.encode()) and lengths[-1] == 0
    ids, lengths = tokenizer.encode_document_and_bytes("aß漢b")  # 1, 2, 3 and 1 bytes, of which two are split
    assert lengths[lengths > 0].tolist() == [1, 2, 3, 1] and lengths.tolist() == [1, 2, 0, 3, 0, 0, 1, 0]
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    assert (
        Tokenizer.load(path, TokenizerConfig(end_token=END)).encode("the cat").tolist()
        == tokenizer.encode("the cat").tolist()
    )
    with pytest.raises(ValueError, match="end_token = '<eos>'"):
        Tokenizer.load(path, TokenizerConfig(end_token="<eos>"))
    cutting = tokenizers.Tokenizer.from_file(str(path))
    cutting.enable_truncation(3)
    cutting.enable_padding(length=9)
    cutting.save(str(path))
    for text in ("the cat sat on the mat", "a"):  # whatever a file says of how long its texts should be
        assert (
            Tokenizer.load(path, TokenizerConfig(end_token=END)).encode(text).tolist()
            == tokenizer.encode(text).tolist()
        )
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected a readable tokenizer.json"):
        Tokenizer.load(path, TokenizerConfig(end_token=END))


def draw(data, count):
    return [
        np.stack([batch.tokens, batch.segment_ids, batch.positions]) for batch in (next(data) for _ in range(count))
    ]


def test_rows_hold_whole_documents_in_pieces(stream):
    """Every segment is a run of one training document; positions count it; nothing else is in the rows."""
    config, source, tokenizer = stream
    allowed = {tuple(tokenizer.encode_document(text)) for text in split(source, 0.2, False)}
    with TrainingData(config, source, tokenizer) as data:
        batches = draw(data, 12)
    ends = 0
    for tokens, segment_ids, positions in (row for batch in batches for row in np.moveaxis(batch[:, 0], 0, 1)):
        assert np.all(segment_ids > 0)  # an endless stream needs no padding
        for segment in range(1, segment_ids.max() + 1):
            piece = tuple(tokens[segment_ids == segment])
            assert positions[segment_ids == segment].tolist() == list(range(len(piece)))
            assert any(piece == document[i : i + len(piece)] for document in allowed for i in range(len(document)))
            ends += piece[-1] == tokenizer.end_id
    assert ends > 5


def test_order_depends_on_the_seed_and_changes_every_epoch(stream):
    config, source, tokenizer = stream

    def first(seed, count=40):
        with TrainingData(replace(config, training__seed=seed), source, tokenizer) as data:
            return np.concatenate(draw(data, count))

    np.testing.assert_array_equal(first(0), first(0))
    assert np.any(first(0) != first(1))
    # Without the shuffle of rows, documents follow each other as they were drawn: their order is told by their ends.
    unshuffled = replace(config, data__shuffle_window=0)
    with TrainingData(unshuffled, source, tokenizer) as data:
        stream_of_tokens = np.concatenate(draw(data, 60))[::3].ravel()
    drawn = np.split(stream_of_tokens, np.nonzero(stream_of_tokens == tokenizer.end_id)[0] + 1)
    with TrainingData(replace(unshuffled, training__seed=1), source, tokenizer) as data:
        assert np.any(np.concatenate(draw(data, 60))[::3].ravel() != stream_of_tokens)
    names = [piece.tobytes() for piece in drawn[:-1]]
    epoch = sum(1 for _ in split(source, 0.2, False))
    assert len(names) > 2 * epoch
    assert sorted(names[:epoch]) == sorted(names[epoch : 2 * epoch])  # each document once per epoch
    assert names[:epoch] != names[epoch : 2 * epoch]


@pytest.mark.parametrize("position", [0, 1, 5, 17])
def test_a_stored_state_continues_the_stream(stream, position):
    """At the beginning, inside a shuffle window and beyond an epoch; the state goes through JSON."""
    config, source, tokenizer = stream
    with TrainingData(config, source, tokenizer) as data:
        draw(data, position)
        state = json.loads(json.dumps(data.get_state()))
        expected = draw(data, 6)
    with TrainingData(config, source, tokenizer) as data:
        data.set_state(state)
        for left, right in zip(draw(data, 6), expected, strict=True):
            np.testing.assert_array_equal(left, right)


def test_other_data_are_refused(stream, text_file, tmp_path):
    config, source, tokenizer = stream
    with TrainingData(config, source, tokenizer) as data:
        state = data.get_state()
    path = tmp_path / "more.txt"
    other = replace(config, data__paths=(str(path),))
    text = pathlib.Path(text_file).read_text()
    for changed, count in ((text + END + "one more", 61), (text.replace("cat", "cats", 1), 60)):
        path.write_text(changed)
        with TrainingData(other, open_source(other.data), tokenizer) as data:
            with pytest.raises(ValueError, match=f"the {count} documents found are not the 60 that"):
                data.set_state(state)
    path.write_text(text)
    with TrainingData(other, open_source(other.data), tokenizer) as data:
        data.set_state(state)


def test_all_held_out_is_refused(stream):
    config, _, _ = stream
    with pytest.raises(ValueError, match="holds out all 60 documents"):
        open_source(replace(config, data__validation_fraction=0.999999).data)


def test_each_device_gets_its_rows_of_the_global_batch(stream):
    """What a process would transfer is the rows of its devices, in the same order for 1, 2 and 4 processes' devices."""
    config, source, tokenizer = stream
    with TrainingData(config, source, tokenizer) as data:
        batch = next(data)
    for devices in (1, 2, 4):
        sharding = NamedSharding(Mesh(np.array(jax.devices()[:devices]), "data"), PartitionSpec(None, "data"))
        placed = put_on_devices(batch, sharding).tokens
        rows = 4 // devices
        for shard in placed.addressable_shards:
            first = shard.device.id * rows
            np.testing.assert_array_equal(shard.data, batch.tokens[:, first : first + rows])
