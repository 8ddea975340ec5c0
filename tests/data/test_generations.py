"""A model's own answers as data: read as they were written, supervised where the model wrote, and nowhere else."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpd_jax import evaluate, train
from mtpd_jax.data.documents import Generated, digest_of, held_out
from mtpd_jax.data.generations import GenerationsData
from mtpd_jax.data.pipeline import Batch, TrainingData
from mtpd_jax.data.sources import open_source
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.losses.align import supervision_mask
from mtpd_jax.runs.workdir import open_workdir
from tests.builders import gradients, method_on, model_and_parameters, packed_batch, tiny_config


def row(number, prompt, answer, **other):
    return {
        "id": f"row-{number}", "turn": 0, "turns": 1, "group": f"{digest_of(str(number).encode()):016x}",
        "ids": [*prompt, *answer], "loss_mask": [0] * len(prompt) + [1] * len(answer), "finish": "end", **other,
    }  # fmt: skip


def rows(number=40, size=12):
    """Prompts of other ids than answers."""
    rng = np.random.default_rng(0)
    return [
        row(k, rng.integers(10, 100, 3 + k % 4).tolist(), rng.integers(100, 200, size - k % 5).tolist())
        for k in range(number)
    ]


def write(folder, found, tokenizer="0"):
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"tokenizer": tokenizer, "rows": len(found)}))
    (folder / "generations-00000.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    return str(folder)


def test_rows_are_what_was_written(tmp_path):
    written = rows()
    source = GenerationsData(path=write(tmp_path / "own", written)).open()
    assert len(source) == 40
    for found, expected in zip((source[i] for i in range(40)), written, strict=True):
        assert isinstance(found, Generated)
        assert found.ids.tolist() == expected["ids"] and found.supervised.tolist() == expected["loss_mask"]
        assert found.prompt.tolist() == expected["ids"][: expected["loss_mask"].index(1)]
    supervised, tokens = (
        sum(map(count, written)) for count in (lambda r: sum(r["loss_mask"]), lambda r: len(r["ids"]))
    )
    assert source.note.startswith(f"40 answers: {supervised} of {tokens} tokens are supervised")
    other = GenerationsData(path=write(tmp_path / "other", written[:-1] + rows(41)[-1:])).open()
    assert other.digest() != source.digest()


def test_every_token_is_packed_with_its_own_mask(tmp_path):
    """Also where a row is cut by the end of a sequence: prompts have ids under 100, and answers from 100 on."""
    config = tiny_config(
        data__source="generations", data__path=write(tmp_path / "own", rows()), data__validation_fraction=0.0
    )
    with TrainingData(config, open_source(config.data), tokenizer=None) as data:
        for _ in range(5):
            batch = next(data)
            there = batch.segment_ids != 0
            np.testing.assert_array_equal(batch.supervised[there], batch.tokens[there] >= 100)
            assert batch.supervised.any() and not batch.supervised[there].all()


def test_an_answer_is_supervised_from_its_first_token_to_its_last():
    """And what is not known is not: what follows an answer that was cut, nor where a prompt goes on."""
    segments = jnp.asarray([[1] * 6 + [2] * 4 + [0] * 2])
    supervised = jnp.asarray([[0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0]], bool)
    found = supervision_mask(segments, (1, 2), supervised)[:, 0]
    # The main head predicts t+1; head k does so from position t-k.
    assert found.astype(int).tolist() == [
        [0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0],
    ]
    whole = supervision_mask(segments, (1, 2), jnp.ones_like(supervised))
    np.testing.assert_array_equal(whole, supervision_mask(segments, (1, 2)))


@pytest.mark.parametrize("mode", ["joint", "posthoc"])
def test_prompts_teach_nothing(mode):
    """Gradients stay what they are, whatever follows within prompts: those of the weights of what is supervised."""
    more = {"objective__source": "x"} if mode == "posthoc" else {}
    config = tiny_config(objective__mode=mode, objective__beta=0.0, objective__alpha=0.3, **more)
    _, parameters = model_and_parameters(config)
    method, plain = method_on(config), packed_batch(config)
    supervised = jnp.asarray(np.random.default_rng(0).random(plain.tokens.shape) < 0.5)
    batch = Batch(plain.tokens, plain.segment_ids, plain.positions, supervised)
    trained, frozen = method.split(parameters)
    loss, sums, weights, _ = jax.jit(lambda trained: gradients(method, trained, batch, frozen))(trained)
    # The same, from the log-probabilities of every token.
    rows_of = jax.tree.map(lambda part: part[0], plain)
    hidden = method.model.apply({"params": parameters}, rows_of.tokens, rows_of.segment_ids, rows_of.positions)
    states = jnp.concatenate([hidden.main[None], hidden.heads])
    logp = np.asarray(jax.nn.log_softmax(jnp.einsum("jbtd,vd->jbtv", states, parameters["embedding"])))
    tokens, segments, chosen = (np.asarray(part)[0] for part in (plain.tokens, plain.segment_ids, supervised))
    for j in range(3):
        picked = [
            -logp[j, b, i, tokens[b, i + j + 1]]
            for b, i in np.ndindex(tokens.shape)
            if i + j + 1 < tokens.shape[1] and 0 != segments[b, i] == segments[b, i + j + 1] and chosen[b, i + j + 1]
        ]
        assert float(weights[j]) == len(picked) and float(sums.ce[j]) == pytest.approx(sum(picked), rel=1e-4)
    assert np.isfinite(float(loss))


@pytest.fixture(scope="module")
def own(workdir, tmp_path_factory):
    """Answers in the ids of a run's tokenizer."""
    tokenizer = open_workdir(str(workdir)).read_tokenizer(open_workdir(str(workdir)).read_config())
    return write(tmp_path_factory.mktemp("own") / "rows", rows(60), tokenizer.digest)


def posthoc(workdir, own, **more):
    return tiny_config(
        objective__mode="posthoc", objective__source=str(workdir), data__source="generations", data__path=own,
        training__steps=6, evaluation__every_steps=3, evaluation__prompts=4, **more,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_trains_on_them(workdir, own, tmp_path, capsys):
    """And is scored on held-out answers, of which the prompts do not count; its prompts are those of held-out rows."""
    config = posthoc(workdir, own)
    assert train.run(config, str(tmp_path / "run")).finished
    said = capsys.readouterr().err
    assert "60 answers: " in said and "decoded:" in said
    report = evaluate.run(str(tmp_path / "run"), split_name="validation")
    answers = [r for r in rows(60) if held_out(GenerationsData(path=own).open()[int(r["id"][4:])], 0.2)]
    assert report.text["validation"].tokens == sum(sum(r["loss_mask"]) for r in answers) > 0


def test_ids_of_another_tokenizer_are_refused(workdir, tmp_path):
    wrong = write(tmp_path / "rows", rows(), "of another tokenizer")
    with pytest.raises(ValueError, match=r"config.data.path: its token ids are of another tokenizer"):
        train.run(posthoc(workdir, wrong), str(tmp_path / "run"))
    with pytest.raises(ValueError, match="of another tokenizer"):
        train.run(tiny_config(data__source="generations", data__path=wrong), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_is_known_however_its_file_is_written(workdir, tmp_path):
    config = open_workdir(str(workdir)).read_config()
    file = workdir / "tokenizer.json"
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(file.read_text()), indent=7))
    one, other = (Tokenizer.load(path, config.tokenizer) for path in (file, tmp_path / "tokenizer.json"))
    assert one.digest == other.digest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss_mask": [0] * 5}, "no token of it is supervised: there is nothing to learn"),
        ({"loss_mask": [0, 1]}, "not a whole row"),
        ({"ids": [1, 2, -3, 4, 5]}, "not a whole row"),
        ({"ids": "12345"}, "not a whole row"),
        ({"ids": [1, 2, 3, 4, 2**31]}, "not a whole row"),
        ({"loss_mask": [0, 1, 0, 1, 1]}, "not a whole row"),
        ({"loss_mask": [1, 1, 1, 1, 1]}, "not a whole row"),
        ({"loss_mask": 1}, "no row of generations"),
        ({"turn": 1}, "not a whole row"),
        ({"group": "x"}, "no row of generations"),
        ({"loss_mask": [0, 0, 1, 1, 2]}, "not a whole row"),
    ],
)
def test_a_bad_row_is_refused_with_its_place(change, words, tmp_path):
    bad = {**row(0, [1, 2], [3, 4, 5]), **change}
    with pytest.raises(ValueError, match=rf"generations-00000.jsonl, line 2: .*{words}"):
        GenerationsData(path=write(tmp_path / "own", [row(1, [1], [2]), bad])).open()


def test_a_folder_that_is_not_finished_is_refused(tmp_path):
    """What a killed process left is not what the model writes: short prompts come first."""
    folder = tmp_path / "own"
    write(folder, rows(5))
    path = folder / "generations-00000.jsonl"
    whole = path.read_text()
    for end, words in ((-1, "ends within a row"), (whole[:-1].rindex("\n") + 1, "accounts for 4 of 5 prompts")):
        path.write_text(whole[:end])
        with pytest.raises(ValueError, match=words):
            GenerationsData(path=str(folder)).open()
    path.write_text(whole)
    assert len(GenerationsData(path=str(folder)).open()) == 5


def test_what_is_no_folder_of_generations_is_refused(tmp_path):
    with pytest.raises(ValueError, match="manifest.json: there is no such file"):
        GenerationsData(path=str(tmp_path)).open()
    folder = tmp_path / "own"
    write(folder, [])
    (folder / "generations-00000.jsonl").unlink()
    with pytest.raises(ValueError, match="holds no generations; write them with mtpd_jax.corpus"):
        GenerationsData(path=str(folder)).open()
