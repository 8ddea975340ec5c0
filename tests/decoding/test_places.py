"""Rounds by their place in the text, and texts that go on beyond what heads were trained on."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mtpd_jax import evaluate, generate, open_run, train
from mtpd_jax.data.sources import UnknownData
from mtpd_jax.decoding import decoder as decoder_module
from mtpd_jax.decoding.decoder import Decoder
from mtpd_jax.decoding.drafters.drafter import drafting
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.rows import Rows, places
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.evaluation.acceptance import by_place
from mtpd_jax.run import Run
from mtpd_jax.runs.origin import completed
from mtpd_jax.runs.workdir import open_workdir
from tests.builders import replace
from tests.decoding.models import PROMPTS, small_vocabulary

LONG = 200


def test_places_double():
    assert places(64) == [0] and places(65) == [0, 64] and places(300) == [0, 64, 128, 256]


def rounds_of(prompt, found, drafts):
    """(place, drafts accepted) of every round, from who proposed which token: each ends with the main head's own."""
    at, accepted, rounds = len(prompt) + 1, 0, []
    for proposer in found.proposers[1:]:
        if proposer:
            accepted += 1
        else:
            rounds.append((at, accepted))
            at, accepted = at + accepted + 1, 0
    return rounds + ([(at, accepted)] if accepted else [])


@pytest.mark.parametrize("kind", [pytest.param("cascade", marks=pytest.mark.slow), "shared"])
def test_rounds_are_counted_where_they_begin(kind):
    """Against the texts themselves; and all places together are what is counted of a text."""
    model, parameters = small_vocabulary(kind)
    found = Decoder(model, parameters, []).run(PROMPTS, Options(4, LONG), rows=2)
    for prompt, one in zip(PROMPTS, found, strict=True):
        rounds = rounds_of(prompt, one, 4)
        assert len(rounds) == one.passes == sum(place.passes for place in one.by_place)
        ends = [place.begin for place in one.by_place[1:]] + [10**9]
        assert all(place.passes for place in one.by_place)
        for place, end in zip(one.by_place, ends, strict=True):
            here = [accepted for at, accepted in rounds if place.begin <= at < end]
            assert place.passes == len(here)
            assert place.accepted == tuple(sum(accepted > k for accepted in here) for k in range(4))
            assert all(a <= t <= place.passes for a, t in zip(place.accepted, place.tried, strict=True))
        for name in ("tried", "accepted"):
            assert tuple(np.sum([getattr(place, name) for place in one.by_place], axis=0)) == getattr(one, name)
    scores = by_place(found)
    assert [score.begin for score in scores] == [0, 64, 128] and scores[0].end == 64
    for number, score in enumerate(scores):
        passes = [one.by_place[number].passes for one in found]
        accepted = [sum(one.by_place[number].accepted) for one in found]
        assert score.passes == sum(passes)
        assert score.tokens_per_pass_without_bonus.mean == pytest.approx(sum(accepted) / sum(passes))


@pytest.mark.parametrize(
    ("kind", "rows"),
    [("shared", 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("cascade", 2), ("shared", 1)])],
)
def test_beyond_what_was_trained_text_is_plain(kind, rows):
    """Before, it is drafted as ever; and the text is the same, whoever else is in the batch."""
    model, parameters = small_vocabulary(kind)
    decoder, until = Decoder(model, parameters, []), 90
    options = Options(4, LONG)
    free = decoder.run(PROMPTS, options, rows=rows)
    bound = decoder.run(PROMPTS, dataclasses.replace(options, draft_until=until), rows=rows)
    for prompt, one, other in zip(PROMPTS, free, bound, strict=True):
        assert one.tokens == other.tokens
        begun = rounds_of(prompt, other, 4)
        drafted = [(at, accepted) for at, accepted in begun if at + 4 <= until]
        assert drafted == rounds_of(prompt, one, 4)[: len(drafted)] and len(drafted) > 5
        assert all(accepted == 0 for at, accepted in begun if at + 4 > until)
        assert other.tried[0] == len(drafted) and other.passes == len(begun) > one.passes
        assert other.by_place[2].tried == (0, 0, 0, 0) and other.by_place[2].passes > 50
    assert sum(one.by_place[2].tried[0] for one in free) > 0


@pytest.mark.parametrize(
    "options", [{"min_confidence": 0.4}, pytest.param({"drafter": "both", "pass_width": 8}, marks=pytest.mark.slow)]
)
def test_all_that_heads_draft_is_bound(options):
    model, parameters = small_vocabulary()
    decoder, bound = Decoder(model, parameters, []), Options(4, LONG, draft_until=60, **options)
    plain = decoder.run(PROMPTS, bound.with_drafts(0))
    found = decoder.run(PROMPTS, bound)
    assert [one.tokens for one in found] == [one.tokens for one in plain]
    assert all(place.tried == (0, 0, 0, 0) for one in found for place in one.by_place[1:])
    copied = decoder.run(PROMPTS, dataclasses.replace(bound, drafter="lookup", min_confidence=0.0))
    assert any(place.tried[0] for one in copied for place in one.by_place[1:])  # which nobody trained


@pytest.mark.slow
def test_sampled_text_beyond_is_the_main_heads(monkeypatch):
    """Its draws are those of plain decoding, which begins at the same text."""
    model, parameters = small_vocabulary()
    decoder = Decoder(model, parameters, [])
    bound = Options(4, 100, Sampling(1.0), draft_until=1)
    found, plain = (decoder.run(PROMPTS, options, seed=3) for options in (bound, bound.with_drafts(0)))
    assert [one.tokens for one in found] == [one.tokens for one in plain]
    assert all(one.tried == (0, 0, 0, 0) for one in found)
    # Also in the rounds in which another row drafts.
    until = max(map(len, PROMPTS)) + 40
    prompts, bound = [np.arange(until, dtype=np.int32) % 7, *PROMPTS], dataclasses.replace(bound, draft_until=until)
    found, plain = (decoder.run(prompts, options, seed=3, rows=4) for options in (bound, bound.with_drafts(0)))
    assert found[0].tokens == plain[0].tokens and found[0].tried == (0, 0, 0, 0)
    assert any(one.tried[0] and one.tokens != other.tokens for one, other in zip(found, plain, strict=True))


def test_rows_draft_up_to_where_heads_were_trained_and_finished_ones_do_not():
    rows = Rows.start(jnp.ones((4, 7), jnp.int32), jnp.array([3, 6, 7, 3]), 4, 9, 20)
    rows = dataclasses.replace(rows, finished=jnp.array([False, False, False, True]))
    assert drafting(rows, Options(4, 9, draft_until=10)).tolist() == [True, True, False, False]
    assert drafting(rows, Options(4, 9)).tolist() == [True, True, True, False]


def test_memory_is_asked_for_the_caches_that_there_are(monkeypatch):
    """One where all depths share it, and else one per depth."""
    asked = []
    monkeypatch.setattr(decoder_module, "check_decoding", lambda model, drafts, heads, *_: asked.append(heads))
    for kind in ("shared", "cascade"):
        Decoder(*small_vocabulary(kind), []).check(PROMPTS, Options(4, 8))
    assert asked == [1, 4]


def test_a_text_may_not_be_longer_than_the_backbone_was_made_for(workdir):
    source = open_run(str(workdir)).config
    config = replace(source, objective__mode="posthoc", objective__source=str(workdir), model__context=33)
    with pytest.raises(ValueError, match="model.context = 33: expected at most 32, the length of texts"):
        completed(config, open_workdir("/nowhere"))
    assert completed(replace(config, model__context=32), open_workdir("/nowhere")).context == 32


def test_of_an_imported_model_only_what_its_folder_says_is_known(workdir):
    """Its sequences are what text is scored in, and say nothing of what its heads were trained on."""
    run = open_run(str(workdir))

    def until(data):
        config = dataclasses.replace(replace(run.config, model__context=128), data=data)
        return Run(dataclasses.replace(run.trained, config=config)).draft_until()

    assert until(run.config.data) == run.config.training.sequence_length == 32
    assert until(UnknownData()) is None
    assert until(UnknownData(heads_length=64)) == 64 and until(UnknownData(heads_length=128)) is None


@pytest.fixture(scope="module")
def longer(workdir, text_file, tmp_path_factory):
    """A run that was trained on 32 tokens, of texts up to 128."""
    path = tmp_path_factory.mktemp("longer") / "run"
    config = open_run(str(workdir)).config
    train.run(replace(config, model__context=128, training__steps=80), str(path))
    return path


@pytest.mark.slow
def test_it_is_said_in_one_line_and_may_be_asked_for(longer, capsys, tmp_path):
    found = generate.run(str(longer), ["the cat", "a dog"], max_new_tokens=100, compare=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "trained on texts of 32 tokens" in line]
    assert len(said) == 1 and "2 of 2 texts are decoded plainly" in said[0]
    assert all(one.identical for one in found)
    asked = generate.run(str(longer), ["the cat", "a dog"], max_new_tokens=100, past_trained_length=True)
    assert "trained on texts of" not in capsys.readouterr().err
    assert sum(one.passes for one in asked) < sum(one.passes for one in found)
    assert [one.tokens for one in asked] == [one.tokens for one in found]
    generate.run(str(longer), ["the cat"], max_new_tokens=8)
    generate.run(str(longer), ["the cat"], max_new_tokens=100, heads=0)
    assert "trained on texts of" not in capsys.readouterr().err
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "a dog ran"}\n')
    reports = [
        evaluate.run(str(longer), prompts=str(tmp_path / "prompts.jsonl"), max_new_tokens=100, past_trained_length=past)
        for past in (False, True)
    ]
    assert capsys.readouterr().err.count("trained on texts of 32 tokens") == 1
    plain, drafted = (next(iter(report.decoding.values())).heads["2"].by_place[-1] for report in reports)
    assert plain.begin == drafted.begin == 64
    assert plain.conditional[0].mean is None and drafted.conditional[0].mean is not None
