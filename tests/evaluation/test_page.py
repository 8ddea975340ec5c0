"""The page of a report: one file that needs nothing else, and says what the tables say."""

import dataclasses
import html.parser
import re

import pytest

from mtpd_jax import evaluate, frontdoor
from mtpd_jax.decoding.decoder import Continuation
from mtpd_jax.evaluation.acceptance import Acceptance, Interval
from mtpd_jax.evaluation.page import model_of, page
from mtpd_jax.evaluation.quality import PLAIN as PLAIN_SPANS
from mtpd_jax.evaluation.quality import Quality, SpanScore
from mtpd_jax.evaluation.results import PromptReport, Report
from mtpd_jax.evaluation.samples import Sample
from mtpd_jax.evaluation.scoring import MainScore, TextScore
from mtpd_jax.evaluation.slots import Bin, SlotReport, SlotScore
from tests.evaluation.test_report import SETTINGS, places, score

PLAIN = score(
    tokens_per_pass=Interval(1.0, 1.0, 1.0), acceptance=Acceptance((), ()), agreement=(),
    tokens_per_second=Interval(100.0, 90, 110), speedup_over_plain=Interval(1.0, 1.0, 1.0),
)  # fmt: skip
TWO = score(tokens_per_pass=Interval(2.1, 2.0, 2.2), tokens_per_second=Interval(150.0, 140, 160))
SAMPLE = Sample("if a < b:", "2", "speculative", ((" return", 0), (" <b>", 1), ("\n", 2), ("again", -1)), 5, 2)


def page_of(ways, samples=(), **spans):
    """A page about a file of prompts "p"; ways whose names are no numbers fill in masks."""
    heads = {way: one for way, one in ways.items() if way.isdigit()}
    quality = Quality(Interval(0.25, 0.2, 0.3), Interval(0.5, 0.4, 0.6), Interval(0.7, 0.6, 0.8), Interval(0.1, 0, 0.2))
    masks = {
        way: SpanScore("static", 2, 0.0, one, Interval(1.7, 1.6, 1.8), (3, 1), 1.5, quality)
        for way, one in ways.items() if way not in heads
    }  # fmt: skip
    return page(Report(SETTINGS, {}, {"p": PromptReport(heads, spans=masks, samples=tuple(samples))}))


class Reader(html.parser.HTMLParser):
    """Text, and what marks it; every element that is opened has to be closed, but for those that need not be."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.marked, self.links = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self._note(attrs)
        if tag not in ("meta", "td", "th", "tr"):
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self._note(attrs)

    def _note(self, attrs):
        links = [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.links += [link for link in links if not link.startswith("#")]

    def handle_endtag(self, tag):
        if tag != "tr":
            assert self.open.pop()[0] == tag, tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1][1].get("title"):
            self.marked.append((data, self.open[-1][1]["title"]))


def read(written):
    reader = Reader()
    reader.feed(written)
    assert not reader.open
    return reader


def test_texts_stand_there_as_they_are_and_drafts_are_marked():
    written = page_of({"0": PLAIN, "2": TWO}, [SAMPLE])
    reader = read(written)
    assert "if a < b: return <b>\nagain" in "".join(reader.text)
    assert reader.marked[:3] == [(" <b>", "head 1"), ("\n", "head 2"), ("again", "copied")]
    text = "".join(reader.text)
    assert "5 tokens in 2 passes" in text and SETTINGS.workdir in text and ", ".join(SETTINGS.of_decoding) in text


def test_it_needs_nothing_else():
    written = page_of({"0": PLAIN, "2": TWO})
    assert not read(written).links and "<script" not in written and "@import" not in written
    assert not re.search(r"url\((?!#)", written)
    assert written.count("<svg") == 2


def test_the_fastest_way_leads_and_lossy_ways_say_so():
    """What loses nothing leads, however much faster another text would be."""
    lossy = score(speedup_over_plain=Interval(1.5, 1.4, 1.6), lossless=False, identical=False)
    two = dataclasses.replace(TWO, speedup_over_plain=Interval(1.2, 1.1, 1.3))

    def text_of(ways, samples=()):
        return " ".join("".join(read(page_of(ways, samples)).text).split())

    sample = dataclasses.replace(SAMPLE, way="confident 8 at 0.9", strategy="confident")
    text = text_of({"0": PLAIN, "2": two, "confident 8 at 0.9": lossy}, [sample, SAMPLE])
    assert (
        "Fastest with 2 drafts per round: 1.20 ±0.10 times plain" in text and "pass, without loss; 10 prompts" in text
    )
    assert "LOSSY, and so another text than plain decoding's: confident 8 at 0.9, 1.50 ±0.10 times" in text
    assert "passes, confident 8 at 0.9, LOSSY. Without" in text and "passes, 2 drafts per round. Without" in text
    assert "confident 8 at 0.9 (LOSSY)" in text
    slower = dataclasses.replace(two, speedup_over_plain=Interval(0.8, 0.7, 0.9))
    text = text_of({"0": PLAIN, "2": slower})
    assert "Plain decoding is fastest; 10 prompts" in text and "LOSSY" not in text and "without loss" not in text


def test_speed_and_quality_stand_together():
    """In one table; of plain decoding, too."""
    ways = {"0": PLAIN, "static 2": dataclasses.replace(TWO, lossless=False, identical=False), PLAIN_SPANS: PLAIN}
    text = " ".join("".join(read(page_of(ways)).text).split())
    worth = "0.25 ±0.0550.0 %70.0 %10.0 %0.501.70 ±0.101.575 25"
    assert f"1001.00yes{worth} static 2 (LOSSY)83 –83 02.10 ±0.101501.19 ±0.10no{worth}" in text
    assert "Plain decoding is fastest, without loss" in text and text.count("plain decoding–") == 1


def test_it_has_what_the_tables_have():
    """What slots come to, the teacher's text, and how far into a text drafts stand."""
    text, teacher = (TextScore(MainScore(ce, 1.5), (), 1234, 1) for ce in (4.389, 4.2))
    slots = SlotReport((SlotScore(0.9, 0.81, 0.7, 123_456),), (Bin(0.9, 1.0, 0.95, 0.93, 77),))
    two = dataclasses.replace(TWO, by_place=places(TWO.agreement))
    found = Report(SETTINGS, {"t": text}, {"p": PromptReport({"0": PLAIN, "2": two})}, {"t": teacher}, {"t": slots})
    shown = " ".join("".join(read(page(found)).text).split())
    for part in (
        "the teacher's4.2001.500", "190.0 %81.0 %70.0 %123,456", "0.9 to 1.095.0 %93.0 %77",
        "0 to 631,2341.50 ±0.1070 60", "64 and more1,234",
    ):  # fmt: skip
        assert part in shown


def test_a_stop_string_is_not_part_of_a_text():
    written = Continuation((1, 2, 3, 4), (0, 1, 2, 0), 2, (), (), 1.0)

    def decode(ids):
        return "".join("?ab<>"[token] for token in ids)

    found = Sample.of("?", "2", "speculative", written, decode, ["<>", "b<"])
    assert found.pieces == (("a", 0),) and found.tokens == 4
    assert "".join(text for text, _ in Sample.of("?", "2", "speculative", written, decode).pieces) == "ab<>"


def test_the_curve_is_cost_and_acceptance():
    """A round of two drafts takes 2.1 / 150 seconds, a plain step 1 / 100, and one draft what lies between."""
    one, two = 0.83, 0.0
    (zero, at_zero), (_, at_one), (_, at_two) = model_of({"0": PLAIN, "2": TWO})
    assert (zero, at_zero) == (0, 1.0)
    assert at_two == pytest.approx((1 + one + two) / (2.1 / 150) / 100)
    assert at_one == pytest.approx((1 + one) / ((2.1 / 150 + 1 / 100) / 2) / 100)


def test_a_model_without_heads_has_no_charts():
    assert "<svg" not in page_of({"0": PLAIN})


def test_evaluate_writes_it(workdir, text_file, tmp_path, monkeypatch):
    prompts, file = tmp_path / "prompts.jsonl", tmp_path / "page.html"
    prompts.write_text('{"prompt": "the cat"}\n{"prompt": "a big dog"}\n')
    arguments = [f"--workdir={workdir}", f"--prompts={prompts}", f"--text={text_file}", "--max_new_tokens=8"]
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments, f"--html={file}"])
    assert frontdoor.status_of(evaluate.main) == 0
    text = "".join(read(file.read_text()).text)
    assert "the cat" in text and "a big dog" in text and "teacher-forced" in text and str(prompts) in text
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments, f"--html={tmp_path / 'nowhere' / 'page.html'}"])
    assert frontdoor.status_of(evaluate.main) == 2
