"""What decoding prompts in several ways is turned into: baselines, intervals, keys, and whose text it has to be."""

import dataclasses

import numpy as np
import pytest

from mtpd_jax.decoding.decoder import Continuation, Decoder
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.evaluation.decoding import (
    PADDED_PLAIN,
    compare_ways,
    decode_prompts,
    prompts_per_call,
    score_ways,
    ways_of,
)
from mtpd_jax.evaluation.ways import Asked, who_drafts
from tests.builders import tiny_config
from tests.decoding.models import END, PROMPTS, small_vocabulary


@pytest.fixture(scope="module")
def decoder():
    return Decoder(*small_vocabulary(), [END])


def score_decoding(decoder, prompts, ways, decoded, batch_size):
    return score_ways(compare_ways(decoder, prompts, ways, decoded), batch_size)


def with_seconds(continuations, seconds):
    return [dataclasses.replace(one, seconds=each) for one, each in zip(continuations, seconds, strict=True)]


def test_speed_is_over_the_fastest_plain_decoding(decoder):
    """A fast way has a large speed-up; both plain ways are baselines, each by its name."""
    ways = ways_of(Options(0, 12).sharing_width(2), [0, 1, 2])
    assert list(ways) == [0, 1, 2, PADDED_PLAIN]
    assert [(options.num_drafts, options.width) for options in ways.values()] == [(0, 1), (1, 8), (2, 8), (0, 8)]
    found = decode_prompts(decoder, PROMPTS, ways, batch_size=4, seed=0)
    tokens = np.array([len(one.tokens) for one in found[0]])
    assert all([one.tokens for one in way] == [one.tokens for one in found[0]] for way in found.values())
    seconds = {0: 2.0, 1: 3.0, 2: 1.0, PADDED_PLAIN: 4.0}
    timed = {way: with_seconds(found[way], [seconds[way]] * 4) for way in ways}
    scores = score_decoding(decoder, PROMPTS, ways, timed, batch_size=1)
    for way, score in scores.items():
        assert score.tokens_per_second.mean == pytest.approx(tokens.sum() / (4 * seconds[way]))
        assert score.speedup_over_plain.mean == pytest.approx(2.0 / seconds[way])
        assert score.speedup_over_one_head.mean == pytest.approx(3.0 / seconds[way])
        assert score.speedup_over_padded_plain.mean == pytest.approx(4.0 / seconds[way])
        assert score.identical and not score.failed and score.prompts == 4
    # Whose text it has to be is padded plain decoding's, whatever the fastest one wrote.
    other = [dataclasses.replace(one, tokens=(*one.tokens[:-1], 6 - one.tokens[-1])) for one in timed[0]]
    apart = score_decoding(decoder, PROMPTS, ways, {**timed, 0: other}, batch_size=1)
    assert apart[1].identical and apart[PADDED_PLAIN].identical and not apart[0].identical
    plain = ways_of(Options(0, 12), [0])
    alone = score_decoding(decoder, PROMPTS, plain, {0: timed[0]}, batch_size=1)[0]
    assert alone.speedup_over_one_head is alone.speedup_over_padded_plain is None


def test_prompts_of_one_call_are_one_measurement(decoder):
    """Their time is one reading: intervals of speed are over calls, those of acceptance over prompts."""
    ways = ways_of(Options(0, 12), [0, 1])
    found = decode_prompts(decoder, PROMPTS, ways, batch_size=4, seed=0)
    assert (prompts_per_call(1), prompts_per_call(2), prompts_per_call(4)) == (1, 8, 16)
    repeated = {way: 4 * found[way] for way in ways}  # two calls of eight
    timed = {0: with_seconds(repeated[0], [1.0] * 16), 1: with_seconds(repeated[1], [0.5] * 8 + [0.25] * 8)}
    prompts = 4 * PROMPTS
    faster = score_decoding(decoder, prompts, ways, timed, batch_size=2)[1].speedup_over_plain
    assert (faster.low, faster.high) == pytest.approx((2, 4))  # either call may be drawn twice
    one = score_decoding(decoder, prompts, ways, timed, batch_size=4)[1]
    assert one.speedup_over_plain.low is one.tokens_per_second.low is None and one.speedup_over_plain.mean > 2
    assert one.tokens_per_pass.low < one.tokens_per_pass.high


def test_text_that_is_not_plain_decodings_is_found_out(decoder):
    ways = ways_of(Options(0, 12), [0, 1])
    found = decode_prompts(decoder, PROMPTS, ways, batch_size=4, seed=0)
    first, *others = found[1]
    wrong = dataclasses.replace(first, tokens=(*first.tokens[:-1], (first.tokens[-1] + 1) % 7))
    score = score_decoding(decoder, PROMPTS, ways, {0: found[0], 1: [wrong, *others]}, batch_size=4)[1]
    assert score.identical is False and len(score.divergences) == 1
    assert score.divergences[0].index == len(first.tokens) - 1 and score.failed


@pytest.mark.slow
def test_sampled_text_depends_on_the_prompts_number_and_not_on_its_batch(decoder):
    """The same prompt four times gives four texts, whatever is decoded together; another seed gives others."""
    ways, prompts = ways_of(Options(0, 12, Sampling(3.0)), [0, 1]), [PROMPTS[1]] * 4

    def texts(batch_size, seed=0):
        found = decode_prompts(decoder, prompts, ways, batch_size=batch_size, seed=seed)
        return {way: [one.tokens for one in found[way]] for way in ways}

    together = texts(4)
    assert all(len(set(found)) > 2 for found in together.values())
    assert texts(1) == texts(2) == together
    assert texts(4, seed=1)[0] != together[0]
    scores = score_decoding(
        decoder, prompts, ways, decode_prompts(decoder, prompts, ways, batch_size=2, seed=0), batch_size=2
    )
    assert scores[1].identical is None and scores[1].divergences == ()


class Recorder:
    """Stands in for a decoder, and keeps what it was asked."""

    def __init__(self, rows):
        self.asked, self.rows = [], rows

    def check(self, prompts, options, batch_size):
        assert not self.asked, "something ran before everything was checked"

    def run(self, prompts, options, *, rows, transitions, seed, first_row):
        assert rows == self.rows and transitions is None
        self.asked.append((options.num_drafts, first_row, len(prompts), seed))
        return [Continuation((1,), (0,), 0, (), (), 0.1)] * len(prompts)


def test_ways_take_turns_batch_by_batch():
    """A slow minute hits all of them; and all of them decode the same prompts together."""
    for rows, calls in ((1, [(0, 1), (1, 1), (2, 1)]), (2, [(0, 8), (8, 8), (16, 3)])):
        recorder, done = Recorder(rows), []
        prompts = [np.array([1])] * sum(count for _, count in calls)
        ways = ways_of(Options(0, 4), [0, 2])
        found = decode_prompts(recorder, prompts, ways, batch_size=rows, seed=9, on_call=done.append)
        assert recorder.asked == [(heads, start, count, 9) for start, count in calls for heads in (0, 2)]
        assert done == [count for _, count in calls for _ in range(2)]
        assert {way: len(each) for way, each in found.items()} == {0: len(prompts), 2: len(prompts)}


class Clock(Recorder):
    """Takes other times in every turn: ``times`` by way and turn; two prompts, one by one."""

    def __init__(self, times):
        super().__init__(rows=1)
        self.times = times

    def run(self, prompts, options, **rest):
        turn = sum(asked[0] == options.num_drafts for asked in self.asked) // 2
        (found,) = super().run(prompts, options, **rest)
        return [dataclasses.replace(found, seconds=self.times[options.num_drafts][turn])]


def test_the_median_of_several_turns_counts():
    """Of all turns, each of which decodes everything; one that was upset counts no more than another."""
    clock, done = Clock({0: (9.0, 1.0, 2.0), 2: (0.5, 0.4, 7.0)}), []
    prompts, ways = [np.array([1])] * 2, ways_of(Options(0, 4), [0, 2])
    found = decode_prompts(clock, prompts, ways, batch_size=1, seed=9, turns=3, on_call=done.append)
    assert {way: [one.seconds for one in of_way] for way, of_way in found.items()} == {0: [2.0, 2.0], 2: [0.5, 0.5]}
    assert clock.asked == 3 * [(0, 0, 1, 9), (2, 0, 1, 9), (0, 1, 1, 9), (2, 1, 1, 9)] and done == [1] * 12


def test_ways_are_named():
    """Numbers for heads, as they are written in JSON; others by who drafts."""
    ways = ways_of(Options(0, 4), [0, 1, 4], ["heads", "lookup", "both"])
    assert list(ways) == [0, 1, 4, "lookup 1", "lookup 4", "both 1", "both 4"]
    assert [(each.drafter, each.num_drafts) for each in ways.values()][3:] == [
        ("lookup", 1), ("lookup", 4), ("both", 1), ("both", 4)
    ]  # fmt: skip
    assert list(ways_of(Options(0, 4), [0, 3], ["lookup"])) == [0, "lookup 3"]


def test_agreement_is_counted_where_heads_draft(decoder):
    """Up to the length that they were trained on, of the ways in which heads draft."""

    def counted(until):
        ways = ways_of(dataclasses.replace(Options(0, 12), draft_until=until), [0, 1])
        decoded = decode_prompts(decoder, PROMPTS, ways, batch_size=4, seed=0)
        return compare_ways(decoder, PROMPTS, ways, decoded)[1].counted.sum()

    assert 0 < counted(8) < counted(None)


def test_who_drafts_without_heads_drafts_unasked():
    """As many tokens as there are heads, or some where there are none; who needs heads says so."""
    plain, two = (tiny_config(heads__num_heads=number) for number in (0, 2))
    asked = {"heads": None, "strategy": None, "slots": None}
    assert who_drafts(plain, "run", drafter="lookup", **asked) == (4, "lookup", "speculative")
    assert who_drafts(two, "run", drafter="lookup", **asked) == (2, "lookup", "speculative")
    assert who_drafts(plain, "run", drafter="heads", **asked) == (0, "heads", "speculative")
    assert who_drafts(plain, "run", drafter="lookup", **asked | {"heads": 0})[0] == 0
    with pytest.raises(ValueError, match="drafter = 'both': expected another, for run has no heads"):
        who_drafts(plain, "run", drafter="both", **asked)
    drafts, _ = Asked(None, ["lookup"], None, None, None, bit_exact=False).ways(plain, "run", Options(0, 8))
    assert list(drafts) == [0, "lookup 1", "lookup 2", "lookup 4"]


@pytest.mark.slow
def test_scores_of_what_is_copied(decoder):
    """Held to plain decoding as the heads are; no head agrees with anything."""
    ways = ways_of(Options(0, 12), [0, 2], ["heads", "lookup", "both"])
    scores = score_decoding(decoder, PROMPTS, ways, decode_prompts(decoder, PROMPTS, ways, batch_size=4, seed=0), 4)
    assert all(score.identical for score in scores.values())
    assert [len(score.agreement) for score in scores.values()] == [0, 2, 0, 2]
    assert scores["lookup 2"].speedup_over_one_head is None and len(scores["lookup 2"].acceptance.conditional) == 2
