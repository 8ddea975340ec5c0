"""What tables show: figures, their intervals, and dashes where there is none."""

import collections
import dataclasses
import io
import json
import os

import pytest
import rich.console

from experiments.quickstart import summarise, summary_table
from mtpd_jax import evaluate
from mtpd_jax.decoding.sampling import GREEDY, Sampling
from mtpd_jax.evaluation.acceptance import Acceptance, Interval, PlaceScore
from mtpd_jax.evaluation.comparison import Divergence
from mtpd_jax.evaluation.decoding import DecodingScore
from mtpd_jax.evaluation.quality import Quality, SpanScore
from mtpd_jax.evaluation.report import (
    acceptance_table,
    bounded,
    decoding_table,
    new_table,
    number,
    percent,
    place_table,
    text_table,
    write_json,
)
from mtpd_jax.evaluation.results import PromptReport, Report, Settings
from mtpd_jax.evaluation.scoring import HeadScore, MainScore, TextScore
from mtpd_jax.evaluation.slots import Bin, SlotReport, SlotScore
from mtpd_jax.evaluation.span_report import length_table, reliability_table, slot_table, span_table

NOTHING = Interval(None, None, None)
SETTINGS = Settings(
    "runs/a run", 650, Sampling(1.0, top_p=0.9), "speculative", 0.4, ("\n",), 7, 128, 4, 3, True, "1 x cpu"
)
PARTED = Divergence(3, 0.5, 0.5, 0.0, False)


def score(**fields):
    found = DecodingScore(
        tokens_per_pass=Interval(1.82, 1.7, 1.9),
        tokens_per_pass_without_bonus=Interval(0.82, 0.7, 0.9),
        acceptance=Acceptance((Interval(0.83, 0.8, 0.86), NOTHING), (Interval(0.83, 0.8, 0.86), Interval(0.0, 0, 0))),
        agreement=(Interval(0.7, 0.6, 0.8), Interval(0.6, 0.5, 0.7)),
        tokens_per_second=Interval(3237.4, 3000, 3400),
        speedup_over_plain=Interval(1.19, 1.1, 1.3),
        speedup_over_one_head=Interval(1.05, 1.0, 1.1),
        speedup_over_padded_plain=None,
        identical=True,
        divergences=(),
        distinct_4grams=0.5,
        prompts=10,
        turns=1,
        lossless=True,
    )
    return dataclasses.replace(found, **fields)


def shown(table):
    console = rich.console.Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    return [line.split() for line in console.export_text().splitlines()]


def test_numbers():
    assert (percent(0.8312), percent(None)) == ("83.1 %", "–")
    assert (number(1234.5, 0), number(None), number(float("nan"))) == ("1,234", "–", "–")
    assert bounded(Interval(1.0, 0.9, 1.3)) == "1.00 ±0.20"
    assert bounded(Interval(0.5, 0.4, 0.6), 100, 1) == "50.0 ±10.0"
    assert [bounded(one) for one in (Interval(1, 1, 1), Interval(1, None, None), NOTHING)] == ["1.00", "1.00", "–"]


def test_a_row_of_decoding():
    (row,) = [line for line in shown(decoding_table("x", {"2": score()})) if line[:1] == ["2"]]
    assert row == ["2", "83", "–", "83", "0", "1.82", "±0.10", "3,237", "1.19", "±0.10", "1.05", "yes"]
    for fields, word in (
        ({"identical": None}, "–"),
        ({"identical": False, "divergences": (dataclasses.replace(PARTED, tie=True),)}, "tie"),
        ({"identical": False, "divergences": (PARTED,)}, "NO"),
    ):
        (row,) = [line for line in shown(decoding_table("x", {"2": score(**fields)})) if line[:1] == ["2"]]
        assert row[-1] == word


def test_padded_plain_decoding_has_a_row_and_a_column():
    padded = [score(speedup_over_padded_plain=Interval(factor, 1, 2)) for factor in (1.5, 1.73, 1.0)]
    lines = shown(decoding_table("x", {"0": padded[0], "2": padded[1]}, padded[2]))
    rows = [line for line in lines if line and line[0] in ("0", "2")]
    assert [row[:2] for row in rows] == [["0", "83"], ["0", "padded"], ["2", "83"]]
    assert [row[-2] for row in rows] == ["1.50", "1.00", "1.73"]


def test_heads_beside_teacher_forcing():
    lines = shown(acceptance_table("x", {"0": score(), "2": score()}))
    assert ["1", "83.0", "±3.0", "83.0", "±3.0", "70.0", "±10.0", "13.0"] in lines
    assert ["2", "–", "0.0", "60.0", "±10.0", "–"] in lines


def test_heads_are_judged_only_where_some_draft():
    """A model without heads has no table of them, be it empty."""
    for by_heads, judged in (({"0": score()}, False), ({"0": score(), "2": score()}, True)):
        console = rich.console.Console(width=120, record=True, file=io.StringIO())
        evaluate.show(console, Report(SETTINGS, {}, {"x": PromptReport(by_heads)}))
        assert ("heads, %" in console.export_text()) is judged


def test_a_report_says_what_was_measured_and_how():
    """A page at a temperature is not to be taken for a greedy one."""
    decoded = {"x": PromptReport({"0": score()})}
    assert Report(SETTINGS, {}, decoded).words == (
        "step 650, temperature 1, seed 7, top 0.9 of probability, at most 128 new tokens, up to '\\n', "
        "drafts surer than 0.4, bit for bit, 4 at a time, 1 x cpu"
    )
    greedy = dataclasses.replace(SETTINGS, sampling=GREEDY, bit_exact=False, stop=(), min_confidence=0.0)
    assert Report(greedy, {}, decoded).words == "step 650, greedy, at most 128 new tokens, 4 at a time, 1 x cpu"
    console = rich.console.Console(width=200, record=True, file=io.StringIO())
    evaluate.show(console, Report(greedy, {}, {}))  # where no text was continued
    assert console.export_text().strip() == "step 650, 4 at a time, 1 x cpu"
    assert Report(greedy, {}, {}).to_json()["settings"]["sampling"]["temperature"] == 0


def test_scores_of_text():
    found = TextScore(MainScore(4.3894, 1.8534), (HeadScore(4.5, 0.144, 0.718), HeadScore(None, None, None)), 69989, 1)
    lines = shown(text_table({"validation": found}))
    assert ["validation", "main", "4.389", "1.853"] in lines
    assert ["69,989", "tokens"] in lines
    assert ["1", "4.500", "0.144", "71.8", "%"] in lines and ["2", "–", "–", "–"] in lines


def test_json_that_cannot_be_written_is_named(tmp_path):
    write_json(str(tmp_path / "a.json"), {"ü": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"ü": 1}
    with pytest.raises(ValueError, match="cannot be written"):
        write_json(str(tmp_path), {})


def test_json_has_no_nan_and_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(str(path), {"a": [1.5, float("nan")], "b": {"c": (float("inf"), None, 2, True)}})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": [1.5, None],
        "b": {"c": [None, None, 2, True]},
    }
    (tmp_path / "link.json").symlink_to(path)
    write_json(str(tmp_path / "link.json"), 3)
    assert (tmp_path / "link.json").is_symlink() and json.loads(path.read_text()) == 3
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(str(tmp_path / "pipe"), 4)
    assert os.read(reader, 10) == b"4\n"  # what is no file is written to, and not replaced
    os.close(reader)
    with pytest.raises(ValueError, match="No space left on device"):
        write_json("/dev/full", {})


def sixteen_heads():
    rates = tuple(Interval(0.8 - 0.01 * k, 0.7, 0.9) for k in range(16))
    return score(acceptance=Acceptance(rates, rates), agreement=rates, by_place=places(rates))


def places(rates):
    return tuple(PlaceScore(begin, end, 1234, Interval(1.5, 1.4, 1.6), rates) for begin, end in ((0, 64), (64, 128)))


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "name",
    ["text", "decoding", "padded", "acceptance", "places", "spans", "lengths", "slots", "reliability", "quickstart"],
)
def test_no_figure_is_cut_off(name, width):
    """On a narrow terminal a table takes more lines; every word of it is there, whole, and no line is longer."""
    long, wide = "/home/somebody/projects/stories/prompts_of_tinystories_validation.jsonl", sixteen_heads()
    plain = score(acceptance=Acceptance((), ()), agreement=())
    head, text = HeadScore(4.5431, 0.1441, 0.7181), TextScore(MainScore(4.389, 1.853), (), 123_456_789, 1)
    quality = Quality(*[Interval(0.5, 0.4, 0.6)] * 4)
    ways = {
        name: SpanScore("static", 16, 0.95, decoding, Interval(1.5, 1.4, 1.6), (3, 4), 31.0, quality)
        for name, decoding in (("plain", plain), ("confident 16 at 0.95", dataclasses.replace(wide, lossless=False)))
    }
    slots = SlotReport(
        tuple(SlotScore(0.9, 0.8, 0.7, 123_456) for _ in range(8)), (Bin(0.9, 1.0, 0.95, 0.93, 123_456),)
    )
    part = summarise({"0": plain, "4": wide, "16": wide})
    summary = {
        "parameters": 123_456_789, "train_seconds": 1234.5, "main": {"ce": 4.389, "bits_per_byte": 1.853},
        "heads": [dataclasses.asdict(head)] * 16, "decoding": {**part, "sampled": part},
    }  # fmt: skip
    table = {
        "text": lambda: text_table({long: dataclasses.replace(text, heads=(head,) * 16)}),
        "decoding": lambda: decoding_table(long, {"0": plain, "16": wide}, None, {"lookup": {"16": wide}}),
        "padded": lambda: decoding_table(long, {"0": plain, "16": wide}, plain),
        "acceptance": lambda: acceptance_table(long, {"16": wide}),
        "places": lambda: place_table(long, {"16": wide}),
        "spans": lambda: span_table(long, ways),
        "lengths": lambda: length_table(long, ways),
        "reliability": lambda: reliability_table(long, slots),
        "slots": lambda: slot_table(long, slots, text, text),
        "quickstart": lambda: summary_table(summary),
    }[name]()  # fmt: skip

    check_all_is_there(table, width)


def lines_of(table, columns):
    console = rich.console.Console(width=columns, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text().splitlines()


def check_all_is_there(table, columns):
    """Every letter is, and every word that a column can hold stands on one line."""
    letters, words = [], []
    for width in (columns, 400):
        lines = [line.replace("─", " ").split() for line in lines_of(table, width)]
        words.append(collections.Counter(word for line in lines for word in line if len(word) <= 20))
        letters.append(collections.Counter("".join(word for line in lines for word in line)))
    assert letters[0] == letters[1] and not words[1] - words[0]
    assert max(map(len, lines_of(table, columns))) <= columns


@pytest.mark.parametrize("whole", [(), ("rate", "rates")])
def test_tables_take_the_room_that_there_is(whole):
    """Long words and long lists take several lines where they have to, and one where they need not."""
    table = new_table("of things", ("thing", "rate", "rates"), left=("thing",), whole=whole)
    rates = " ".join(map(str, range(10, 26)))
    table.add_row("a_name_that_is_as_long_as_only_names_of_files_can_be", "1,234.56", rates)
    for width in (80, 100):
        check_all_is_there(table, width)
    assert len(lines_of(table, 400)) == len(lines_of(table, 120)) < len(lines_of(table, 80))
    assert any(rates in line for line in lines_of(table, 120))


def test_the_quickstart_leads_with_the_best_number_of_heads():
    """Its own figures, and not those of all heads, which stand below."""
    plain = score(acceptance=Acceptance((), ()), agreement=(), tokens_per_second=Interval(100.0, 90, 110))
    one = score(speedup_over_plain=Interval(1.4, 1.3, 1.5), tokens_per_second=Interval(140.0, 130, 150))
    two = score(speedup_over_plain=Interval(1.1, 1.0, 1.2), tokens_per_pass=Interval(2.4, 2.3, 2.5))
    greedy, sampled = summarise({"0": plain, "1": one, "2": two}), summarise({"0": plain, "1": two, "2": one})
    head = {"ce": 4.5, "kl": 0.1, "agreement": 0.7}
    summary = {
        "parameters": 1, "train_seconds": 1.0, "main": {"ce": 4.4, "bits_per_byte": 1.9}, "heads": [head, head],
        "decoding": {**greedy, "sampled": sampled},
    }  # fmt: skip
    lines = [" ".join(line) for line in shown(summary_table(summary)) if line]
    first = lines.index("best number of heads 1 2")
    assert lines[first + 1 : first + 4] == [
        "times plain decoding 1.40 1.40", "tokens per pass 1.82 1.82", "tokens/s, plain and so 100, 140 100, 140",
    ]  # fmt: skip
    assert "all heads: tokens per pass 2.40 1.82" in lines
