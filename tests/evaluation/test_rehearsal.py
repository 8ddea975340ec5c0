"""What a run does before its first step, and with held-out prompts on its way: proof, figures, best checkpoint."""

import dataclasses
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mtpd_jax import open_run, train
from mtpd_jax.data.documents import Generated, held_out, selects
from mtpd_jax.data.sources import open_source
from mtpd_jax.decoding.decoder import Decoder
from mtpd_jax.decoding.drafters.chain import ChainHeads
from mtpd_jax.decoding.drafters.heads import Heads
from mtpd_jax.decoding.options import Options
from mtpd_jax.evaluation import held_out as held_out_module
from mtpd_jax.evaluation.held_out import HeldOut, HeldOutPrompts
from mtpd_jax.evaluation.proof import ParityError, prove_parity
from mtpd_jax.model import chains
from mtpd_jax.model.views import Rotation
from mtpd_jax.runs.choice import candidates, latest_step, parse_choice, ratings_of
from mtpd_jax.runs.origin import beginning, completed
from mtpd_jax.runs.workdir import open_workdir
from mtpd_jax.sharding import make_mesh
from tests.builders import method_on, replace, tiny_config
from tests.runs.runs import lines

KINDS = {
    "cascade": {"heads__kind": "cascade"},
    "shared": {"heads__kind": "recurrent", "heads__cache": "shared"},
}


@pytest.fixture(scope="module")
def config(workdir, text_file):
    """Heads on the backbone of a finished run."""
    return tiny_config(
        objective__mode="posthoc", objective__source=str(workdir), data__source="text", data__paths=(text_file,),
        training__steps=20, evaluation__every_steps=5, evaluation__prompts=8, checkpoint__every_steps=50,
        checkpoint__keep=1, heads__num_heads=3, **KINDS["shared"],
    )  # fmt: skip


# The proof.


def no_chain(real):
    return lambda query, first, later, segment_ids: real(query, first, later[-1:], segment_ids)


def no_documents(real):
    return lambda query, first, later, segment_ids: real(query, first, later, 0 * segment_ids)


class Stale(ChainHeads):
    """A window that is never moved."""

    def confirm(self, state, before, after, hidden):
        return state


def break_(part, patch):
    """One fault of the decoder, or of the training path, as other projects had them."""
    if part == "positions":
        patch.setattr(chains, "Rotation", SimpleNamespace(of=lambda at, config: Rotation.of(2 * at, config)))
    if part == "a mask without the chain":
        patch.setattr(chains, "attend_to_chain", no_chain(chains.attend_to_chain))
    if part == "states of the round before":
        patch.setattr(Heads, "of", classmethod(lambda cls, network, options, alone=True: Stale(network, options)))
    if part == "a mask without documents":
        patch.setattr(chains, "attend_to_chain", no_documents(chains.attend_to_chain))
    if part == "the wrong token":
        patch.setattr(ChainHeads, "draft", wrong_token(ChainHeads.draft))


def wrong_token(real):
    def draft(self, parameters, rows, state, keys):
        return real(
            self, parameters, dataclasses.replace(rows, tokens=jax.numpy.roll(rows.tokens, 1, axis=1)), state, keys
        )

    return draft


@pytest.mark.parametrize(
    "part",
    [
        "positions",
        pytest.param("a mask without the chain", marks=pytest.mark.slow),
        pytest.param("a mask without documents", marks=pytest.mark.slow),
        pytest.param("states of the round before", marks=pytest.mark.slow),
        pytest.param("the wrong token", marks=pytest.mark.slow),
    ],
)
def test_heads_that_would_not_decode_as_they_are_trained_are_not_trained(part, config, tmp_path, monkeypatch):
    """With the depth, and by how much; and there is no checkpoint."""
    break_(part, monkeypatch)
    with pytest.raises(ParityError, match=r"at depth [123] the logits of drafts differ by \d") as raised:
        train.run(config, str(tmp_path / "run"))
    assert len(str(raised.value).splitlines()) == 1
    assert latest_step(open_workdir(str(tmp_path / "run"))) is None and not lines(tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("shared", (2, 2, 2, 1)),
        pytest.param("cascade", (1, 1, 1, 1), marks=pytest.mark.slow),
        pytest.param("cascade", (2, 2, 2, 1), marks=pytest.mark.slow),
        pytest.param("shared", (1, 1, 1, 1), marks=pytest.mark.slow),
    ],
)
def test_what_is_right_is_proved_whatever_it_begins_as(kind, shape, config, capsys, tmp_path):
    """Heads begin with output projections of zero, which would hide their attention: noise is added for the proof. On a
    mesh the model is decoded with as it lies there."""
    mesh = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor", "mesh__expert"), shape, strict=True))
    config = replace(config, training__steps=3, **mesh, **{"heads__cache": "per_depth", **KINDS[kind]})
    config = replace(config, optimizer__warmup_steps=1)
    assert train.run(config, str(tmp_path / "run")).finished
    said = capsys.readouterr().err
    assert "proved on" in said
    drafts, difference = said.split("proved on ")[1].split(" drafts: decoding computes what training does, to ")
    assert int(drafts) >= 6 and 0 < float(difference.split()[0]) < 1e-5


def test_the_parameters_that_are_trained_are_not_those_of_the_proof(config, workdir):
    method = method_on(completed(config, open_workdir("/nowhere")), make_mesh(config.mesh))
    run = open_run(str(workdir))
    whole = method.initial_parameters(jax.random.key(0), run.parameters)
    before = jax.tree.map(np.array, whole)
    prove_parity(method, whole, open_source(config.data), run.tokenizer)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, whole))


# Prompts.


def test_documents_that_rate_are_others_than_those_that_report(config, workdir):
    """Both are held out, and of each there are as many as were asked for, or as there are."""
    source = open_source(config.data)
    tokenizer = open_run(str(workdir)).tokenizer
    method = method_on(replace(config, evaluation__prompts=5), make_mesh(config.mesh))
    evaluation = HeldOut.of(method, source, tokenizer)
    prompts = evaluation._decoding._prompts
    there = [selects(source[i]) for i in range(len(source)) if held_out(source[i], 0.2)]
    assert there.count(True) > 3 and there.count(False) > 2
    assert (len(prompts.rating), len(prompts.reporting)) == (3, 2)
    beginnings = {
        rates: {tuple(tokenizer.encode_prompt(source[i])[:8]) for i in range(len(source))
                if held_out(source[i], 0.2) and selects(source[i]) is rates}
        for rates in (True, False)
    }  # fmt: skip
    assert {tuple(prompt) for prompt in prompts.rating} <= beginnings[True]
    assert {tuple(prompt) for prompt in prompts.reporting} <= beginnings[False]
    assert not {tuple(prompt) for prompt in prompts.rating} & {tuple(prompt) for prompt in prompts.reporting}


def test_prompts_leave_room_in_what_the_heads_are_trained_on(config, workdir):
    """Of own generations the prompts are those that were answered, whole."""
    tokenizer = open_run(str(workdir)).tokenizer
    rows = [
        Generated(np.arange(length + 3, dtype=np.int32) % 250, np.arange(length + 3) >= length, group)
        for group, length in enumerate([3, 4, 5, 20, 6, 7])
    ]
    found = HeldOutPrompts.of(config, 6, lambda: iter(rows), tokenizer)
    assert [len(prompt) for prompt in found.rating] == [3, 5, 6] and [len(p) for p in found.reporting] == [4, 7]
    assert max(map(len, found.rating + found.reporting)) + found.new_tokens <= config.training.sequence_length
    assert HeldOutPrompts.of(config, 6, lambda: iter(rows[:1]), tokenizer) is None


def test_too_little_held_out_text_is_said(config, workdir, monkeypatch):
    monkeypatch.setattr(held_out_module, "selects", lambda document: True)
    run = open_run(str(workdir))
    evaluation = HeldOut.of(method_on(run.config, run.mesh), open_source(config.data), run.tokenizer)
    assert not evaluation.note and not evaluation.rates  # of a run that asks for no prompts
    evaluation = HeldOut.of(
        method_on(replace(run.config, evaluation__prompts=4), run.mesh), open_source(config.data), run.tokenizer
    )
    assert "nothing is decoded while training" in evaluation.note and not evaluation.rates
    assert not any("decoded" in name for name in evaluation(run.parameters, lambda: True))


# Figures, and the best checkpoint.


def with_ratings(patch, ratings):
    """Checkpoints are rated so, one after the other."""
    given, real = iter(ratings), held_out_module.HeldOutDecoding.__call__

    def call(self, parameters, keep_going):
        return {**real(self, parameters, keep_going), "selection/tokens_per_pass": next(given)}

    patch.setattr(held_out_module.HeldOutDecoding, "__call__", call)


@pytest.fixture(scope="module")
def rated(config, tmp_path_factory):
    """A run whose second rating of four is the best."""
    path = tmp_path_factory.mktemp("rated") / "run"
    with pytest.MonkeyPatch.context() as patch:
        with_ratings(patch, [1.25, 1.5, 1.5 - 1e-9, 1.1])
        assert train.run(config, str(path)).finished
    return path


def test_checkpoints_are_rated_by_the_prompts_that_are_not_reported(config, rated):
    run = open_run(str(rated), checkpoint="newest")
    decoding = HeldOut.of(method_on(run.config), open_source(config.data), run.tokenizer)._decoding
    prompts, options = decoding._prompts, Options(3, decoding._prompts.new_tokens)
    found = {}
    for name in ("rating", "reporting"):
        written = run.decoder.run(getattr(prompts, name), options)
        found[name] = sum(len(one.tokens) - 1 for one in written) / sum(one.passes for one in written)
    assert found["rating"] != found["reporting"]
    values = decoding(run.parameters, lambda: True)
    assert values["selection/tokens_per_pass"] == pytest.approx(found["rating"])
    assert values["decoded/tokens_per_pass"] == pytest.approx(found["reporting"])


def test_what_is_written_is_what_decoding_comes_to(config, rated):
    """The reporting prompts, decoded again with the finished run, one by one."""
    run = open_run(str(rated), checkpoint="newest")
    last = lines(rated)[-1]
    source = open_source(config.data)
    prompts = HeldOut.of(method_on(run.config), source, run.tokenizer)._decoding._prompts
    options = Options(3, prompts.new_tokens)
    found = [run.decoder.run([prompt], options)[0] for prompt in prompts.reporting]
    passes, tokens = sum(one.passes for one in found), sum(len(one.tokens) - 1 for one in found)
    assert last["decoded/tokens_per_pass"] == pytest.approx(tokens / passes)
    accepted = [sum(one.accepted[k] for one in found) for k in range(3)]
    tried = [sum(one.tried[k] for one in found) for k in range(3)]
    assert last["decoded/tokens_per_pass_without_bonus"] == pytest.approx(sum(accepted) / passes)
    assert last["decoded/head_1/conditional"] == pytest.approx(accepted[0] / tried[0])
    assert {f"decoded/head_{k}/{rate}" for k in (1, 2, 3) for rate in ("conditional", "cumulative")} <= set(last)


def test_the_best_checkpoint_is_kept_beside_the_newest_and_opened(rated):
    """There is one wherever prompts were decoded; of a tie, the newest would count."""
    folder = open_workdir(str(rated))
    assert [line["step"] for line in lines(rated) if "selection/tokens_per_pass" in line] == [5, 10, 15, 20]
    assert sorted(int(path.name) for path in (rated / "checkpoints").iterdir()) == [10, 20]
    assert ratings_of(folder) == {10: 1.5, 20: 1.1}
    steps = {choice: open_run(str(rated), checkpoint=choice).step for choice in (None, "best", "newest", 10, "20")}
    assert steps == {None: 10, "best": 10, "newest": 20, 10: 10, "20": 20}
    assert candidates(folder, None) == [10, 20] and candidates(folder, "newest") == [20, 10]


@pytest.mark.slow
def test_the_best_stays_the_best_after_a_restart(config, rated, tmp_path, monkeypatch):
    """It is read from the metrics, and a later one that is worse does not take its place."""
    again = shutil.copytree(rated, tmp_path / "run")
    with_ratings(monkeypatch, [1.2])
    assert train.run(replace(config, training__steps=25), str(again)).finished
    ratings = ratings_of(open_workdir(str(again)))
    assert max(ratings, key=ratings.get) == 10 and set(ratings) == {10, 25}
    assert ratings[25] < 1.5


@pytest.mark.slow
def test_where_the_text_changes_the_newest_is_opened(text_file, tmp_path, monkeypatch):
    """A main head that repeats itself is easy to draft for: joint training is not rated by its drafts alone."""
    with_ratings(monkeypatch, [2.0, 1.0])
    config = tiny_config(
        data__source="text", data__paths=(text_file,), training__steps=4, evaluation__every_steps=2,
        evaluation__prompts=4, checkpoint__every_steps=2, checkpoint__keep=1,
    )  # fmt: skip
    assert train.run(config, str(tmp_path / "run")).finished
    steps = {choice: open_run(str(tmp_path / "run"), checkpoint=choice).step for choice in (None, "best", "newest")}
    assert steps == {None: 4, "best": 2, "newest": 4}


def test_a_second_stage_starts_from_the_checkpoint_that_is_named(config, rated):
    for choice, step in ((None, 10), ("newest", 20), ("best", 10), ("20", 20)):
        named = {"objective__source": str(rated), "objective__initial_heads": "source"}
        second = replace(config, **named, objective__source_checkpoint=choice)
        nowhere = open_workdir("/nowhere")
        origin = beginning(completed(second, nowhere), nowhere, make_mesh(config.mesh))
        assert origin.record["step"] == step
    with pytest.raises(ValueError, match="objective.source_checkpoint = 'latest': expected newest, best, or a step"):
        replace(config, objective__source_checkpoint="latest").validate()


def test_one_prompt_cannot_both_rate_and_be_reported(config):
    with pytest.raises(ValueError, match="evaluation.prompts = 1: expected none, or at least two"):
        replace(config, evaluation__prompts=1).validate()


def test_runs_that_rate_nothing_are_opened_as_before(workdir):
    assert open_run(str(workdir)).step == 10
    with pytest.raises(ValueError, match="no checkpoint that was rated .* ask for newest"):
        open_run(str(workdir), checkpoint="best")
    with pytest.raises(ValueError, match="expected newest, best, or the step"):
        parse_choice("latest")


def test_a_damaged_best_gives_way(rated, tmp_path, capsys):
    broken = shutil.copytree(rated, tmp_path / "run")
    for file in (broken / "checkpoints" / "10" / "parameters").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert open_run(str(broken)).step == 20
    said = capsys.readouterr().err
    assert "damaged: 10" in said and "step 20 is used instead" in said


def test_a_decoder_takes_other_parameters_without_compiling_again(workdir):
    run = open_run(str(workdir))
    decoder = Decoder(run.trained.model, run.parameters, run.tokenizer.end_ids, run.mesh)
    prompts = [np.array([3, 1, 2], np.int32)]
    first = decoder.run(prompts, Options(2, 8))[0].tokens
    other = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), run.parameters)
    compiled = dict(decoder._compiled)
    second = decoder.with_parameters(other).run(prompts, Options(2, 8))[0].tokens
    assert decoder._compiled == compiled and second != first
    fresh = Decoder(run.trained.model, other, run.tokenizer.end_ids, run.mesh)
    assert fresh.run(prompts, Options(2, 8))[0].tokens == second
    assert decoder.run(prompts, Options(2, 8))[0].tokens == first
