"""What masks are worth: slot by slot beside the teacher, and what was written several tokens at a time."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpd_jax import evaluate, frontdoor, train
from mtpd_jax.decoding.options import Options
from mtpd_jax.evaluation.comparison import common
from mtpd_jax.evaluation.quality import span_ways
from mtpd_jax.evaluation.scoring import TextScore
from mtpd_jax.evaluation.slots import score_slots
from mtpd_jax.evaluation.ways import Asked
from mtpd_jax.methods.standalone import Standalone
from mtpd_jax.model.backbone import unembedding_of
from mtpd_jax.run import open_run
from tests.builders import method_on, random_parameters, tiny_config

# With what is written after it, longer than a training sequence.
LONG = "a dog sat on the mat, and the cat was there, and one more big dog sat"


def student_config(**overrides):
    return tiny_config(**{
        "heads__num_heads": 0, "objective__mode": "standalone", "objective__source": "-", "objective__k_max": 3,
        "objective__regions": 2, "objective__end_ids": (3,), "model__mask_embedding": True, **overrides,
    })  # fmt: skip


@pytest.mark.parametrize("labels", ["teacher", "data"])
def test_slot_by_slot_the_student_stands_beside_its_teacher(labels):
    """Counts from plain passes, one slot at a time: whatever it was trained by, it is asked to write."""
    config = student_config(objective__labels=labels, objective__written="data")
    method = method_on(config)
    assert isinstance(method, Standalone)
    student = random_parameters(method.model, seed=1)
    # Nearly the same model, so that they agree now and then.
    teacher = {name: part for name, part in student.items() if name != "mask_embedding"}
    rng = np.random.default_rng(0)
    rows = [rng.integers(4, 300, size).astype(np.int32) for size in (32, 32, 20, 9, 31)]
    found = score_slots(config, method.mesh, student, teacher, ((row, None) for row in rows), batch_size=2)
    logits = {}

    def after(parameters, text):
        model = method.model if "mask_embedding" in parameters else method.teacher_model
        if model not in logits:
            run = jax.jit(lambda p, row: model.apply({"params": p}, row, jnp.ones_like(row), jnp.arange(40)[None]).main)
            logits[model] = run
        row = jnp.asarray(np.pad(text, (0, 40 - len(text))))[None]
        scores = np.asarray(logits[model](parameters, row)[0, len(text) - 1] @ unembedding_of(parameters).T)
        probabilities = np.exp(scores - scores.max())
        return int(scores.argmax()), float(probabilities.max() / probabilities.sum())

    tokens, agreed, chained, sure = np.zeros((4, 3))
    bins = np.zeros((10, 2))
    for number, row in enumerate(rows):
        offset = number % 14
        for region in range(3):
            anchor = 14 * region + 13 - offset
            if anchor >= len(row):
                continue
            written, right_so_far = [], True
            for j in range(3):
                choice, confidence = after(student, [*row[: anchor + 1], *[300] * j])
                label, _ = after(teacher, [*row[: anchor + 1], *written])
                right_so_far &= choice == label
                tokens[j], agreed[j], chained[j] = (
                    tokens[j] + 1,
                    agreed[j] + (choice == label),
                    chained[j] + right_so_far,
                )
                sure[j] += confidence
                if j:
                    bins[min(int(confidence * 10), 9)] += 1, choice == label
                written.append(choice)
                if choice == 3:
                    break
    assert [slot.tokens for slot in found.slots] == tokens.tolist() and tokens[0] >= 7
    np.testing.assert_allclose([slot.agreement for slot in found.slots], agreed / tokens)
    np.testing.assert_allclose([slot.chain for slot in found.slots], chained / tokens)
    np.testing.assert_allclose([slot.confidence for slot in found.slots], sure / tokens, rtol=1e-4)
    assert agreed[0] == tokens[0]  # the same model, on the same text
    assert [one.tokens for one in found.reliability] == bins[:, 0].tolist()
    rights = [one.agreement for one in found.reliability if one.tokens]
    np.testing.assert_allclose(rights, (bins[:, 1] / np.maximum(bins[:, 0], 1))[bins[:, 0] > 0])


def test_every_place_of_a_text_begins_a_span_and_batches_are_nobody_s_business():
    """14 tokens of text in a region, so in 14 rows each place does once; but for what does not count."""
    config = student_config(model__context=32)  # as long as a row, which has fewer slots than what is asked here
    method = method_on(config)
    student = random_parameters(method.model, seed=1)
    teacher = random_parameters(method.teacher_model, seed=2)
    row = np.random.default_rng(0).integers(4, 300, 32).astype(np.int32)

    def found(batch_size, counted=None):
        return score_slots(config, method.mesh, student, teacher, [(row, counted)] * 14, batch_size)

    whole = found(8)
    assert whole.slots[0].tokens == 32
    for one, other in zip(whole.slots, found(24).slots, strict=True):  # of eight devices, three rows each
        assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(other), rel=1e-5)
    assert found(8, np.arange(32) >= 20).slots[0].tokens == 13  # the span after a prompt's last token is one


def test_ways_are_every_strategy_with_every_length_and_confidence():
    options = Options(0, 8, drafter="masks")
    ways = span_ways(options, ["static", "confident", "verified"], [2, 4], [0.5, 0.9])
    assert list(ways) == [
        "static 2", "static 4", "confident 2 at 0.5", "confident 2 at 0.9", "confident 4 at 0.5", "confident 4 at 0.9",
        "verified 2", "verified 2 at 0.5", "verified 2 at 0.9", "verified 4", "verified 4 at 0.5", "verified 4 at 0.9",
    ]  # fmt: skip
    assert ways["verified 4 at 0.9"].num_drafts == 3 and ways["static 2"].min_confidence == 0
    assert common((1, 2, 3), (1, 2, 4, 5)) == 2 and common((1, 2), (1, 2, 3)) == 2 and common((), (1,)) == 0


@pytest.fixture(scope="module")
def student(text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("standalone")
    base = {"data__source": "text", "data__paths": (text_file,), "heads__num_heads": 0, "training__steps": 10}
    longer = {"model__context": 64, "training__sequence_length": 48}
    train.run(tiny_config(**base, **longer), str(folder / "source"))
    taught = {"objective__mode": "standalone", "objective__source": str(folder / "source"), "objective__k_max": 3}
    train.run(tiny_config(**base, **taught, objective__regions=4), str(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("the cat", LONG, "one more big")))
    return path


@pytest.mark.slow
def test_what_is_written_is_worth_what_the_teacher_says(student, prompts, tmp_path, monkeypatch, capsys):
    """Speed and quality in one table; lossy ways say so, and are no failure; JSON holds all of it."""
    arguments = [
        f"--workdir={student}", f"--prompts={prompts}", "--split=validation", "--max_new_tokens=12", "--slots=2,3",
        "--confidences=0.001,0.9", f"--json={tmp_path / 'x.json'}",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    monkeypatch.setenv("COLUMNS", "80")
    assert frontdoor.status_of(evaluate.main) == 0
    output = capsys.readouterr().out
    assert "LOSSY" in output and "…" not in output and max(map(len, output.splitlines())) <= 80
    report = json.loads((tmp_path / "x.json").read_text())
    spans, opened = report["decoding"][str(prompts)]["spans"], open_run(str(student))
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    own = [one.tokens for one in opened.generate(texts, heads=0, max_new_tokens=12)]
    theirs = [one.tokens for one in opened.teacher.generate(texts, max_new_tokens=12)]
    scorer = opened.teacher.scorer(1, 64)
    assert len(opened.encode(LONG)) + 12 > opened.config.training.sequence_length

    def nats(written):
        found = []
        for text, tokens in zip(texts, written, strict=True):
            prompt = opened.encode(text)
            ids = np.concatenate([prompt, tokens]).astype(np.int32)
            (scored,) = scorer.score(opened.teacher.parameters, [(ids, np.zeros_like(ids))])
            found.append(scored.ce[0, len(prompt) - 1 :].sum() / len(tokens))
        return np.array(found)

    for name, score in spans.items():
        lossless = name.startswith(("plain", "verified"))
        assert score["decoding"]["lossless"] is lossless
        written = sum(len(tokens) - 1 for tokens in (own if lossless else [[0] * 12] * 3))
        stood = sum((k + 1) * n for k, n in enumerate(score["lengths"]))
        assert written <= stood <= written + 3 * name.startswith("verified")  # the last pass may end with a guess
        quality = score["quality"]
        if lossless:
            assert quality["same_as_own"]["mean"] == quality["kept"]["mean"] == 1
            assert quality["teacher_ce"]["mean"] == pytest.approx((nats(own) - nats(theirs)).mean(), abs=1e-4)
    believed = opened.generate(texts, strategy="static", slots=3, max_new_tokens=12)
    written = [one.tokens for one in believed]
    quality = spans["static 3"]["quality"]
    assert quality["teacher_ce"]["mean"] == pytest.approx((nats(written) - nats(theirs)).mean(), abs=1e-4)
    kept = sum(common(one, other) for one, other in zip(written, own, strict=True)) / sum(map(len, own))
    assert quality["kept"]["mean"] == pytest.approx(kept)
    assert spans["static 3"]["lengths"] == [0, 3, 9]  # the last pass of each has room for two
    assert quality["same_as_teacher"]["mean"] == np.mean([a == b for a, b in zip(written, theirs, strict=True)])
    assert report["teacher"]["validation"]["main"]["ce"] != report["text"]["validation"]["main"]["ce"]
    # The teacher reads as much text before a token as the student, though it was trained on longer sequences.
    windows = opened.teacher.scorer(4, opened.config.training.sequence_length)
    assert opened.config.training.sequence_length < opened.teacher.config.training.sequence_length
    sums = windows.sum_documents(opened.teacher.parameters, opened.trained.held_out_documents())
    assert report["teacher"]["validation"]["main"]["ce"] == pytest.approx(TextScore.of(sums).main.ce, rel=1e-5)
    assert len(report["slots"]["validation"]["slots"]) == 3
    # A page shows what the longest spans wrote of which every guess is verified.
    samples = report["decoding"][str(prompts)]["samples"]
    assert [one["way"] for one in samples] == ["verified 3"] * 3
    shown = ["".join(text for text, _ in one["pieces"]) for one in samples]
    assert shown == [opened.tokenizer.decode(tokens) for tokens in own]


def test_lengths_are_also_those_of_the_texts_themselves(student, prompts):
    """The mean of their own figures beside the pooled one; and the places that were read for a token: five by five."""
    report = evaluate.run(str(student), prompts=str(prompts), max_new_tokens=12, spans=["verified"], slots=[3])
    spans, opened = report.decoding[str(prompts)].spans, open_run(str(student))
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    for name, width, way in (("verified 3", 5, {"strategy": "verified", "slots": 3}), ("plain", 1, {"heads": 0})):
        found = opened.generate(texts, **way, max_new_tokens=12)
        sizes, passes = np.array([len(one.tokens) - 1 for one in found]), np.array([one.passes for one in found])
        assert spans[name].effective_k_mean_of_means.mean == pytest.approx((sizes / passes).mean())
        assert spans[name].tokens_read == pytest.approx(width * passes.sum() / sizes.sum())


def test_without_a_guess_nothing_is_believed(student):
    """Spans of one token are plain decoding's, whatever the strategy; another text would be a failure."""
    opened = open_run(str(student))
    for strategy in ("static", "confident", "verified"):
        (one,) = opened.generate(["the cat"], strategy=strategy, slots=1, max_new_tokens=12, compare=True)
        assert one.lossless and one.identical
    assert not opened.generate(["the cat"], strategy="static", slots=2, max_new_tokens=12)[0].lossless


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spans": ["heads"]}, "--spans=heads: expected some of"),
        ({"slots": [1]}, "--slots=1: expected at least 2"),
        ({"slots": [1000]}, "slots = 1000: expected at most 64, the longest text of this model"),
        ({"slots": 4}, "slots = 4: expected a list of integers"),
        ({"confidences": 0.9}, "confidences = 0.9: expected a list of numbers"),
        ({"spans": ["confident"], "confidences": [1.5]}, "min_confidence = 1.5: expected a probability"),
        ({"drafters": ["masks"]}, "--drafters=masks: expected others; --spans=verified"),
        ({"strategy": "static"}, "--strategy=static: expected --spans=static instead"),
        ({"min_confidence": 0.5}, "--min_confidence=0.5: expected --confidences=0.5 instead"),
    ],
)
def test_what_cannot_be_measured_is_said(student, prompts, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate.run(str(student), prompts=str(prompts), max_new_tokens=4, **arguments)


@pytest.mark.slow
def test_passes_share_one_width_and_others_may_draft_for_a_student(student, prompts, monkeypatch, capsys):
    """What is verified is plain decoding's text at that width, bit for bit; both tables are printed."""
    report = evaluate.run(
        str(student), prompts=str(prompts), max_new_tokens=8, bit_exact=True, drafters=["lookup"], heads=[0, 2],
        spans=["verified"], slots=[3],
    )  # fmt: skip
    (found,) = report.decoding.values()
    assert found.padded_plain is not None and not found.failed and set(found.others["lookup"]) == {"1", "2"}
    config, asked = open_run(str(student)).config, Asked([0, 2], ["lookup"], None, [2, 6], [0.5], bit_exact=True)
    drafts, spans = asked.ways(config, str(student), Options(0, 8))
    # The width of the longest: a token, five drafts and five masks, in eights.
    assert {way.pass_width for name, way in {**drafts, **spans}.items() if name != 0} == {16}
    for name, score in found.spans.items():
        if name.startswith("verified"):
            assert score.decoding.identical and score.quality.same_as_own.mean == score.quality.kept.mean == 1
    arguments = [f"--workdir={student}", f"--prompts={prompts}", "--max_new_tokens=4", "--drafters=lookup", "--heads=2"]
    arguments += ["--spans=static", "--slots=2"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    assert frontdoor.status_of(evaluate.main) == 0
    output = capsys.readouterr().out
    assert "filling in masks" in output and "lookup 2" in output


def test_a_model_without_masks_has_no_spans(workdir, prompts):
    for name, value in (("spans", ["static"]), ("slots", [2]), ("confidences", [0.9])):
        with pytest.raises(ValueError, match=f"--{name}: expected none"):
            evaluate.run(str(workdir), prompts=str(prompts), max_new_tokens=4, **{name: value})
