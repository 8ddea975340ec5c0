"""The standalone experiment: arms that differ in what they say they do, and a page from rows alone."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import standalone
from experiments.pretrained import Given
from experiments.standalone_figures import (
    as_teacher,
    at_equal_speed,
    cost_of_believing,
    fell,
    kept,
    mean_of_means,
    places_per_token,
    same,
    speed,
    stood,
    teacher_ce,
    tokens_per_pass,
)
from experiments.standalone_report import UNTRAINED, heads_beside
from experiments.sweep.arms import Arm
from experiments.sweep.report import differences
from experiments.sweep.rows import Row, SpanCounts, SpanMeasures
from experiments.sweep.runner import Code
from experiments.sweep.runs import Run
from experiments.sweep.scale import MODES
from experiments.sweep.spans import ways
from mtpd_jax import frontdoor
from mtpd_jax.evaluation.quality import PLAIN
from tests.experiments.rows import TEXTS, made_up_row

DIGESTS = {"backbone": "b" * 64, "text": "t" * 64, "held_out": "h" * 64}


def runs_of(scale):
    made = standalone.scale_of(scale, Given("-", "-", "-", None, DIGESTS))
    return {one.name: Run(one, 0, made) for one in standalone.variants_of(standalone.SIZES[scale])}


@pytest.mark.parametrize("scale", standalone.SIZES)
def test_every_arm_can_be_run_and_none_twice(scale):
    runs = runs_of(scale)
    assert len({run.key() for run in runs.values()}) == len(runs)
    objectives = {name: run.config().objective for name, run in runs.items()}
    assert all(run.family == "standalone" for run in runs.values())
    settings = {name: (one.written, one.labels) for name, one in objectives.items()}
    assert settings["online hard"] == ("student", "teacher") and settings["online soft"] == ("student", "distribution")
    assert settings["offline"] == ("data", "teacher") and settings["ground truth"] == ("data", "data")
    assert (objectives["fixed k=5"].k_min, objectives["fixed k=5"].k_max) == (5, 5)
    assert objectives["fixed k=8"].k_min == 8 and objectives["prefix loss"].prefix_weight == 1
    assert runs["longer online hard"].config().training.steps == 4 * runs["online hard"].config().training.steps
    untrained = runs[UNTRAINED].config()
    assert untrained.training.steps == 1 and untrained.optimizer.learning_rate < 1e-9


def made_up_spans(longest, confident_nats):
    """A pass of ``confident`` writes two tokens, of ``verified`` 1.5; what is believed is worse by a nat a token."""

    def counts(way, options):
        lossy = way.startswith(("static", "confident"))
        passes = 96 if way == PLAIN else 48 if lossy else 64
        return SpanCounts(
            tokens=[97] * TEXTS, passes=[passes] * TEXTS, seconds=[passes / 1000] * TEXTS,
            accepted=[[passes // 4] * TEXTS] * options.num_drafts, kept=[20 if lossy else 97] * TEXTS,
            as_teacher=[10 if lossy else 30] * TEXTS,
            nats=[97 * (1 + confident_nats * lossy)] * TEXTS, distinct_4grams=0.7, lossless=not lossy,
        )  # fmt: skip

    slots = [
        {"agreement": 0.9 / place, "chain": 0.5, "confidence": 0.6, "tokens": 100} for place in range(1, longest + 1)
    ]
    bins = [
        {"low": i / 10, "high": (i + 1) / 10, "confidence": 0.1 * i, "agreement": 0.1 * i, "tokens": 5}
        for i in range(10)
    ]
    named = {mode: {str(way): counts(str(way), one) for way, one in ways(mode, longest, 96).items()} for mode in MODES}
    return SpanMeasures(named, [97] * TEXTS, [48.5] * TEXTS, [300.0] * TEXTS, {"slots": slots, "reliability": bins})


def made_up(run, confident_nats=1.0):
    longest = run.config().objective.k_max
    return dataclasses.replace(made_up_row(run), spans=made_up_spans(longest, confident_nats))


def test_rows_are_read_as_they_are_written():
    row = made_up(runs_of("stories_19m")["online hard"])
    again = Row.of(json.loads(json.dumps(row.to_json())))
    assert again == row and again.spans == row.spans


def test_figures_are_what_they_are_counted_from():
    run = runs_of("stories_19m")["online hard"]
    arm = Arm("x", [made_up(Run(run.variant, seed, run.scale)) for seed in range(2)])

    def of(counts):
        return counts.of_seeds().tolist()

    assert of(tokens_per_pass(arm, "confident 8 at 0.9")) == [2.0, 2.0]
    assert of(tokens_per_pass(arm, "verified", "sampled")) == [1.5, 1.5]
    assert of(speed(arm, "confident 8 at 0.9")) == pytest.approx([2.0, 2.0])
    assert of(teacher_ce(arm, "confident 8 at 0.9")) == pytest.approx([1.5, 1.5])  # 2 nats a token, less half a nat
    assert of(teacher_ce(arm, PLAIN)) == pytest.approx([0.5, 0.5])
    assert of(cost_of_believing(arm, "static 2")) == pytest.approx([1.0, 1.0])
    assert of(teacher_ce(arm, "verified 2", "sampled")) == pytest.approx([0.5, 0.5])
    assert of(places_per_token(arm, "static 4")) == [7 / 2] * 2 and of(places_per_token(arm, PLAIN)) == [1.0] * 2
    assert of(stood(arm, "static 4", 3)) == [0.25, 0.25]
    assert of(kept(arm, "static 2")) == pytest.approx([20 / 97] * 2)
    assert of(same(arm, "static 2")) == [0.0, 0.0] and of(same(arm, "verified 2")) == [1.0, 1.0]
    assert of(as_teacher(arm, "static 2")) == pytest.approx([10 / 97] * 2)


def test_texts_that_differ_are_counted_where_they_must_not():
    """Of what was verified, and not of what was believed, nor of plain decoding beside itself."""
    row = made_up(runs_of("stories_19m")["online hard"])
    greedy = row.spans.ways["greedy"]
    lossless = sum(way.lossless for way in greedy.values()) - 1
    heads = sum(len(way.tokens) for number, way in row.decoding["greedy"].by_heads.items() if number)
    assert f"differ from plain decoding's: 0 of {lossless * TEXTS + heads}, 0" in differences([row])
    for name in ("verified 2", "static 2"):
        greedy[name] = dataclasses.replace(greedy[name], kept=[97] * (TEXTS - 1) + [96])
    greedy["verified 3"] = dataclasses.replace(greedy["verified 3"], tokens=[98] + [97] * (TEXTS - 1))
    assert "differ from plain decoding's: 2 of" in differences([row])


def test_the_mean_over_texts_is_not_the_pooled_one():
    """Nor is a text equal to plain decoding's that goes on where that ends."""
    arm = Arm("x", [made_up(runs_of("stories_19m")["online hard"])])
    greedy = arm.rows[0].spans.ways["greedy"]
    passes, tokens = [96] * (TEXTS - 1) + [24], [97] * (TEXTS - 1) + [96]
    greedy["verified 2"] = dataclasses.replace(greedy["verified 2"], passes=passes, tokens=tokens)
    assert mean_of_means(arm, "verified 2").of_seeds() == pytest.approx([(TEXTS - 1 + 95 / 24) / TEXTS])
    pooled = (96 * (TEXTS - 1) + 95) / sum(passes)
    assert tokens_per_pass(arm, "verified 2").of_seeds() == pytest.approx([pooled])
    assert same(arm, "verified 2").of_seeds() == pytest.approx([1 - 1 / TEXTS])


@pytest.mark.parametrize("guesses", [1, 3])
def test_guesses_that_fell_are_counted_from_passes_and_what_stood(guesses):
    """Against the decoder's rule, played through: after a pass in which a guess fell there is none to verify."""
    arm = Arm("x", [made_up(runs_of("stories_19m")["online hard"])])
    rng, passes, accepted, broken = np.random.default_rng(0), [], [], []
    for length in range(20, 20 + TEXTS):
        at_least, fallen, ready = np.zeros(guesses, int), 0, False
        for _ in range(length):
            stands = int(count_leading(rng.random(guesses) < 0.7)) if ready else 0
            at_least[:stands] += 1
            ready, fallen = not (ready and stands < guesses), fallen + (ready and stands < guesses)
        passes.append(length)
        accepted.append(at_least.tolist())
        broken.append(fallen)
    greedy = arm.rows[0].spans.ways["greedy"]
    name = f"verified {guesses + 1}"
    way = dataclasses.replace(greedy["verified 2"], passes=passes, accepted=np.transpose(accepted).tolist())
    greedy[name] = way
    assert fell(arm, name).of_seeds() == pytest.approx([sum(broken) / sum(passes)])
    assert len({of % 2 for of in broken}) == 2 and sum(broken) > 20


def count_leading(true):
    return np.cumprod(true).sum()


def with_frontier(arm, ce_by_k, plain):
    """An arm that believes spans of so many tokens whole, and pays so many nats per token for it."""
    for row in arm.rows:
        greedy = row.spans.ways["greedy"]
        way = dataclasses.replace(greedy["static 2"], tokens=[121] * TEXTS)
        for k, ce in {1: plain, **ce_by_k}.items():
            name = f"static {k}" if k > 1 else PLAIN
            greedy[name] = dataclasses.replace(way, passes=[120 // k] * TEXTS, nats=[121 * (0.5 + ce)] * TEXTS)
        for name in [one for one in greedy if one.startswith("static") and int(one[-1]) not in ce_by_k]:
            del greedy[name]
    return arm


def test_frontiers_are_compared_where_both_are_and_between_what_was_measured():
    """Two nats per token more beside one, from a text that is half a nat worse: 0.5 + k - 1 nats apart, from 1 to 3."""
    run = runs_of("stories_19m")["online hard"]
    arm, base = (Arm("x", [made_up(Run(run.variant, seed, run.scale)) for seed in range(2)]) for _ in range(2))
    with_frontier(arm, {3: 4.5}, 0.5)
    with_frontier(base, {2: 1.0, 4: 3.0, 5: 9.0}, 0.0)
    found = at_equal_speed(arm, base, "static")
    assert found.reach == 3.0
    assert found.seeds == pytest.approx([1.5, 1.5])
    for interval, mean in ((found.ce, 1.5), (found.believing, 1.0)):
        assert (interval.mean, interval.low, interval.high) == pytest.approx((mean,) * 3)
    assert at_equal_speed(base, arm, "static").ce.mean == pytest.approx(-1.5)


def test_a_way_without_a_length_is_at_the_longest_spans():
    arm = Arm("x", [made_up(runs_of("stories_19m")["online hard"])])
    passes = {"verified 2": 50, "verified 3": 60, "verified 8": 70, "verified 8 at 0.9": 80}
    for name, number in passes.items():
        way = arm.rows[0].spans.ways["greedy"][name]
        arm.rows[0].spans.ways["greedy"][name] = dataclasses.replace(way, passes=[number] * TEXTS)
    for name, number in (("verified", 70), ("verified 2", 50), ("verified at 0.9", 80)):
        assert tokens_per_pass(arm, name).of_seeds().tolist() == [96 / number]


@pytest.mark.slow
def test_the_page_has_every_arm_speed_beside_quality_and_the_claims(monkeypatch, tmp_path):
    monkeypatch.setattr(standalone, "RESULTS", tmp_path)
    folder = tmp_path / "stories_19m"
    folder.mkdir()
    (folder / "inputs.json").write_text(json.dumps({"standalone": DIGESTS, "posthoc": DIGESTS}))
    rows = []
    for name, run in runs_of("stories_19m").items():
        for seed in (0, 1, 2) if run.variant.seeds is None else run.variant.seeds:
            worse = 2.0 if name == "ground truth" else 1.0
            rows.append(made_up(Run(run.variant, seed, run.scale), worse).to_json())
    (folder / "standalone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("experiments.sweep.experiment.Code", lambda: Code(lambda family: "made up"))
    monkeypatch.setattr("sys.argv", ["x", "--scale=stories_19m"])
    assert frontdoor.status_of(standalone.main) == 0
    text = (folder / "standalone.md").read_text()
    assert "Left out" not in text and "nan" not in text and "**not** that of plain decoding" in text
    (claim,) = [
        line.split(" | ")
        for line in text[text.index("at static 2") :].split("##")[0].splitlines()
        if line.startswith("| a teacher in place of the text")
    ]
    assert claim[3].startswith("-1.00 (") and claim[5].startswith("yes")
    assert claim[6].startswith("-1.00 (") and claim[7].startswith("yes")
    at_equal = text[text.index("at equal speed, static") :].split("##")[0]
    (claim,) = [row.split(" | ") for row in at_equal.splitlines() if row.startswith("| a teacher in place of the text")]
    assert claim[2] == "1 to 2.00" and claim[3].startswith("-0.50 (") and claim[5].startswith("yes")
    assert all(f"\n| {steps} | 0" in text for steps in (0, 10))  # of what training comes to
    believed = [line for line in text.splitlines() if line.startswith("| confident 8 at 0.9 |")]
    assert believed and all("**yes**" in line and ("+1.50" in line or "+2.50" in line) for line in believed)
    (beside,) = [line for line in text.splitlines() if line.startswith("| online hard | verified 8 at 0.9 |")]
    assert "1.50 (1.50 to 1.50)" in beside and "2.00 (2.00 to 2.00)" in beside and "75 (75 to 75)" in beside
    assert (folder / "standalone.png").stat().st_size > 10_000


def test_heads_stand_beside_if_they_were_made_from_the_same(tmp_path):
    row = made_up_row(runs_of("stories_19m")["online hard"])
    heads = dataclasses.replace(row, variant="cascade kl pre text")
    (tmp_path / "posthoc.jsonl").write_text(json.dumps(heads.to_json()) + "\n")
    inputs = tuple(DIGESTS.items())
    assert not heads_beside(tmp_path, inputs)  # of which nothing is known
    (tmp_path / "inputs.json").write_text(json.dumps({"posthoc": {**DIGESTS, "backbone": "o" * 64}}))
    assert not heads_beside(tmp_path, inputs)
    (tmp_path / "inputs.json").write_text(json.dumps({"posthoc": DIGESTS}))
    assert list(heads_beside(tmp_path, inputs)) == ["MTP-D's heads, frozen backbone"]


@pytest.mark.slow
def test_what_a_student_is_measured_by(tmp_path, text_file):
    """From a run: every way of every mode, and the teacher's own text beside."""
    from experiments.sweep.measure import measure
    from mtpd_jax import train
    from tests.builders import tiny_config

    base = {"data__source": "text", "data__paths": (text_file,), "heads__num_heads": 0, "training__steps": 3}
    short = {
        "optimizer__warmup_steps": 1, "checkpoint__every_steps": 100, "evaluation__every_steps": 2,
        "logging__every_steps": 1,
    }  # fmt: skip
    train.run(tiny_config(**base, **short), str(tmp_path / "source"))
    student = {"objective__mode": "standalone", "objective__source": str(tmp_path / "source"), "objective__k_max": 2}
    train.run(tiny_config(**base, **short, **student), str(tmp_path / "run"))
    scale = dataclasses.replace(
        runs_of("stories_19m")["online hard"].scale, texts=2, prompt_tokens=6, new_tokens=6, held_out="", inputs=()
    )
    measured = measure(str(tmp_path / "run"), [0], scale)
    found = measured.spans
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    agreed = [line["slot_2/agreement"] for line in lines]
    assert [(point["step"], point["slot_2/agreement"]) for point in measured.curve] == [
        (2, pytest.approx(np.mean(agreed[:2]))), (3, agreed[2])
    ]  # fmt: skip
    assert set(found.ways["greedy"]) == set(map(str, ways("greedy", 2, 6)))
    assert all(way.startswith(("plain", "verified")) for way in found.ways["sampled"])
    plain = found.ways["greedy"][PLAIN]
    for name, way in found.ways["greedy"].items():
        assert way.lossless is name.startswith(("plain", "verified"))
        assert not way.lossless or (way.tokens == plain.tokens == way.kept and way.nats == plain.nats)
        written = np.asarray(way.passes) + np.sum(way.accepted, axis=0, dtype=int)
        assert (written + 1 == way.tokens).all()
    assert len(found.teacher_nats) == len(found.teacher_text) == 2 and found.slots["slots"][1]["tokens"] > 0
