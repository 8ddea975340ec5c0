"""Scores of text, acceptance rates and intervals against hand-written forms."""

import dataclasses
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.sweep.arms import Arm
from experiments.sweep.runs import Run, Variant
from experiments.sweep.scale import SCALES
from mtpd_jax.config import MeshConfig
from mtpd_jax.data.pipeline import Batch
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.decoding.decoder import Continuation, Decoder
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.evaluation.acceptance import (
    acceptance_intervals,
    acceptance_of,
    tokens_per_pass,
    tokens_per_pass_without_bonus,
)
from mtpd_jax.evaluation.agreement import count_agreement
from mtpd_jax.evaluation.comparison import distinct_ngrams, first_divergence
from mtpd_jax.evaluation.likelihood import loglikelihoods
from mtpd_jax.evaluation.scoring import ScoredText, Scorer, TextScore, TextSums, windows
from mtpd_jax.evaluation.statistics import Counts, Interval, mean_of
from mtpd_jax.losses import scores as scores_module
from mtpd_jax.model.backbone import LanguageModel
from mtpd_jax.sharding import make_mesh
from tests.builders import model_and_parameters, tiny_config
from tests.decoding.models import PROMPTS, forward, small_vocabulary
from tests.experiments.rows import made_up_row


def continuation(tokens, passes, tried, accepted):
    return Continuation(tuple(tokens), (0,) * len(tokens), passes, tuple(tried), tuple(accepted), 0.1)


FOUND = [continuation(range(11), 4, (4, 3, 0), (3, 2, 0)), continuation(range(6), 4, (4, 1, 0), (1, 0, 0))]


def test_rates_by_their_definition():
    rates = acceptance_of(FOUND)
    assert rates.conditional == (4 / 8, 2 / 4, None)
    assert rates.cumulative == (0.5, 0.25, 0.0)  # none of head 3's drafts ever stood
    assert tokens_per_pass(FOUND).mean == (10 + 5) / 8
    assert tokens_per_pass_without_bonus(FOUND).mean == (5 + 1) / 8


def test_intervals_hold_the_mean_and_shrink():
    rng = np.random.default_rng(0)

    def width(prompts):
        tried = rng.integers(20, 30, prompts)
        found = mean_of(Counts.of_prompts([rng.binomial(tried, 0.6).tolist()], [tried.tolist()]))
        assert found.low < found.mean < found.high
        assert found.low < 0.6 < found.high
        return found.high - found.low

    assert width(400) < width(20) / 2
    assert mean_of(Counts.of_prompts([[3]], [[4]])) == Interval(0.75, None, None)
    with warnings.catch_warnings():  # about resamples in which nothing was tried: they say nothing
        warnings.simplefilter("error")
        assert mean_of(Counts.of_prompts([[1, 0]], [[2, 0]])) == Interval(0.5, 0.5, 0.5)
        assert mean_of(Counts.of_prompts([[0, 0]], [[0, 0]])) == Interval(None, None, None)


def test_a_head_never_tried_has_no_rate():
    intervals = acceptance_intervals([continuation(range(3), 2, (2, 0), (0, 0))] * 2)
    assert intervals.conditional[1].mean is None
    assert intervals.conditional[0].mean == 0


@pytest.mark.parametrize(
    ("tried", "accepted", "cumulative"),
    [
        ((0, 0, 0), (0, 0, 0), (None, None, None)),
        ((4, 0, 0), (0, 0, 0), (0, 0, 0)),
        ((4, 2, 0), (2, 0, 0), (0.5, 0, 0)),
        ((4, 0, 0), (2, 0, 0), (0.5, 0, 0)),  # accepted, and then always the end of the text
        ((4, 2, 1), (2, 1, 1), (0.5, 0.25, 0.25)),
    ],
)
def test_cumulative_acceptance_is_zero_from_the_first_zero_on(tried, accepted, cumulative):
    """And nothing only where head 1 was never tried: in evaluation, with its interval, and in sweeps."""
    found = [continuation(range(3), 4, tried, accepted)] * 3
    assert acceptance_of(found).cumulative == cumulative
    for rate, expected in zip(acceptance_intervals(found).cumulative, cumulative, strict=True):
        assert (rate.mean, rate.low, rate.high) == (expected,) * 3
    row = made_up_row(Run(Variant("", {"heads.num_heads": 3}), 0, SCALES["cpu"]))
    way = row.decoding["greedy"].by_heads[3]
    changed = {"tried": [[n] * 3 for n in tried], "accepted": [[n] * 3 for n in accepted]}
    row.decoding["greedy"].by_heads[3] = dataclasses.replace(way, **changed)
    arm = Arm("", [row])
    swept = [arm.cumulative("greedy", 3, k).of_seeds()[0] for k in (1, 2, 3)]
    assert [None if np.isnan(value) else value for value in swept] == list(cumulative)


def test_intervals_are_paired():
    """A ratio that every prompt has has no interval, however different the prompts are."""
    tried = np.random.default_rng(0).integers(1, 100, 30)
    found = mean_of(Counts.of_prompts([(tried / 2).tolist()], [tried.tolist()]))
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_distinct_ngrams():
    assert distinct_ngrams([[1, 2, 3, 4, 5]]) == 1
    assert distinct_ngrams([[1] * 8]) == 1 / 5
    assert distinct_ngrams([[1, 2]]) is None


def test_windows_score_every_token_but_the_first_once():
    for length in (1, 2, 5, 8, 9, 15, 16):
        ids = np.arange(length)
        targets = [token for window in windows(ids, 8) for token in window[1:]]
        assert targets == list(range(1, length))
        assert all(len(window) <= 8 for window in windows(ids, 8))


@pytest.fixture(scope="module")
def scored():
    config = tiny_config(model__context=64)
    model, parameters = model_and_parameters(config)
    tokenizer = Tokenizer.train(["a cat sat on the mat"] * 3, 300, "<|endoftext|>", 1000)
    return config, model, parameters, tokenizer


def test_text_scores_against_numpy(scored):
    _, model, parameters, tokenizer = scored
    documents = ["the cat saß on the mat; " * 9, "a mat", ""]
    scorer = Scorer(model, tokenizer, make_mesh(MeshConfig(-1, 1, 1, 1)), 32, batch_size=8)
    found = TextScore.of(scorer.sum_documents(parameters, documents))
    nats, kl, agree, count, scored_bytes = np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(3), 0
    logits_of = forward(model, parameters)
    for text in documents:
        ids, byte_lengths = tokenizer.encode_document_and_bytes(text)
        pieces = [len(tokenizer.decode([token]).encode()) for token in ids[:-1]]
        assert sum(byte_lengths) == len(text.encode())
        if "ß" not in text:
            scored_bytes += sum(pieces[1:])
        else:
            scored_bytes += len(text.encode()) - pieces[0]
        for window in windows(ids, 32):
            logits = logits_of(window).astype(np.float64)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            for k in range(3):
                for i in range(len(window) - 1 - k):
                    teacher, student = log_p[0, i + k], log_p[k, i]
                    nats[k] -= student[window[i + k + 1]]
                    kl[k] += np.sum(np.exp(teacher) * (teacher - student))
                    agree[k] += teacher.argmax() == student.argmax()
                    count[k] += 1
    assert found.tokens == count[0] and found.bytes == scored_bytes
    assert found.main.ce == pytest.approx(nats[0] / count[0], rel=1e-5)
    assert found.main.bits_per_byte == pytest.approx(nats[0] / math.log(2) / scored_bytes, rel=1e-5)
    for k in (1, 2):
        assert found.heads[k - 1].ce == pytest.approx(nats[k] / count[k], rel=1e-5)
        assert found.heads[k - 1].kl == pytest.approx(kl[k] / count[k], rel=1e-4)
        assert found.heads[k - 1].agreement == pytest.approx(agree[k] / count[k])


def test_scoring_can_be_ended(scored):
    _, model, parameters, tokenizer = scored
    scorer = Scorer(model, tokenizer, make_mesh(MeshConfig(-1, 1, 1, 1)), 32, batch_size=8)
    assert scorer.sum_documents(parameters, ["a cat " * 200], lambda: False) is None
    assert scorer.sum_documents(parameters, ["a cat " * 200], lambda: True) is not None


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [((-1, 1, 1, 1), None), ((2, 2, 2, 1), None), pytest.param((1, 1, 1, 1), 24, marks=pytest.mark.slow)],
)
def test_every_token_of_a_text_is_scored_in_its_place(scored, shape, chunk, monkeypatch):
    """Whatever is scored beside it, wherever windows and chunks are cut, on any mesh: against the training path."""
    _, model, parameters, tokenizer = scored
    if chunk is not None:
        real = scores_module.choose_tiling
        small = lambda *arguments: dataclasses.replace(real(*arguments), chunk_rows=chunk)  # noqa: E731
        monkeypatch.setattr(scores_module, "choose_tiling", small)
    devices = jax.devices()[:1] if shape == (1, 1, 1, 1) else None
    scorer = Scorer(model, tokenizer, make_mesh(MeshConfig(*shape), devices), 32, batch_size=4)
    texts = [tokenizer.encode_document_and_bytes("the cat sat on a mat, " * count) for count in (7, 1, 0, 12, 2)]
    found, logits_of = list(scorer.score(parameters, texts)), forward(model, parameters)
    assert len(found) == len(texts)
    rows = Batch(*np.ones((3, 8, 32), np.int32))
    scores = scorer._score(parameters, rows)
    assert all(part.is_fully_replicated for part in jax.tree.leaves(scores))  # for every process to read
    for (ids, sizes), text in zip(texts, found, strict=True):
        assert text.tokens.tolist() == ids[1:].tolist() and text.bytes.tolist() == sizes[1:].tolist()
        assert text.ce.shape == (3, len(ids) - 1) and text.greedy.shape == (len(ids) - 1,)
        for number, window in enumerate(windows(ids, 32)):
            logits = logits_of(window).astype(np.float64)
            for t in range(len(window) - 1):
                place, choice = 31 * number + t, logits[0, t].argmax()
                assert text.greedy[place] == (choice == window[t + 1])
                for k in range(3):
                    assert text.supervised[k, place] == (t >= k)
                    if t >= k:
                        own = logits[k, t - k]
                        nats = np.log(np.exp(own - own[window[t + 1]]).sum())
                        assert text.ce[k, place] == pytest.approx(nats, rel=1e-4)
                        assert text.agrees[k, place] == (own.argmax() == choice)
        assert not text.ce[:, :][~text.supervised].any() and not text.kl[0].any()
    assert np.concatenate([text.kl[1:].ravel() for text in found]).max() > 0.01
    sums = sum((text.sums() for text in found), TextSums.nothing(2))
    assert sums.weight[0] == sum(len(ids) - 1 for ids, _ in texts) and sums.weight[2] < sums.weight[1]


def test_loglikelihoods_against_the_training_path(scored):
    """Sums over the continuation's own tokens, and whether greedy decoding would have written it."""
    _, model, parameters, tokenizer = scored
    scorer = Scorer(model, tokenizer, make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1]), 32, batch_size=2)
    decoder = Decoder(model, jax.device_put(parameters, jax.devices()[0]), [0])
    prompt = tokenizer.encode("the cat")
    written = decoder.run([prompt], Options(0, 4))[0].tokens
    cases = [
        ("the cat", " sat on"),
        ("the cat ", "sat on"),
        ("", "a mat"),
        ("the mat; " * 30, "cat"),
        ("a", " cat sat"),
    ]
    found, logits_of = loglikelihoods(scorer, parameters, *zip(*cases, strict=True)), forward(model, parameters)
    assert found[0] == found[1]  # white space between them is the continuation's
    for (context, continuation), likelihood in zip(cases, found, strict=True):
        ids = tokenizer.encode(context + continuation)
        count = len(ids) - len(tokenizer.encode(context.rstrip()))
        ids = ids if context.strip() else np.array([tokenizer.end_id, *ids])
        logits = logits_of(ids[-32:]).astype(np.float64)[0, -count - 1 : -1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        targets = ids[-count:]
        assert likelihood.tokens == count
        assert likelihood.nats == pytest.approx(log_p[np.arange(count), targets].sum(), rel=1e-4)
        assert likelihood.greedy == bool((logits.argmax(-1) == targets).all())
    assert not any(likelihood.greedy for likelihood in found)
    text = np.array([*prompt, *written])
    (scored_text,) = scorer.score(parameters, [(text, text)])
    assert scored_text.greedy[-len(written) :].all()
    for contexts, continuations in ((["a"], []), (["a"], [""]), (["a"], ["cat " * 99])):
        with pytest.raises(ValueError, match="continuation"):
            loglikelihoods(scorer, parameters, contexts, continuations)


def test_a_continuation_is_greedy_if_all_of_it_is(scored):
    """Of a scorer that says so of all tokens, or of all but the last."""
    *_, tokenizer = scored

    class Says:
        length = 32

        def __init__(self, last):
            self.tokenizer, self.last = tokenizer, last

        def score(self, parameters, texts):
            for ids, sizes in texts:
                greedy = np.ones(len(ids) - 1, bool)
                greedy[-1] = self.last
                zeros = np.zeros((1, len(ids) - 1), np.float32)
                yield ScoredText(ids[1:], sizes[1:], zeros == 0, zeros, zeros, zeros == 0, greedy)

    for last in (True, False):
        (found,) = loglikelihoods(Says(last), None, ["the"], [" cat sat on"])
        assert found.tokens > 1 and found.greedy == last


def test_divergence_names_place_and_margin(scored):
    _, model, parameters, _ = scored
    decoder = Decoder(model, parameters, [0])
    prompt = np.array([5, 6, 7])
    plain = decoder.run([prompt], Options(0, 6))[0]
    assert first_divergence(decoder, [5, 6, 7], plain, plain) is None
    other = continuation([*plain.tokens[:3], 299, *plain.tokens[4:]], 1, (), ())
    found = first_divergence(decoder, [5, 6, 7], plain, other)
    assert found.index == 3 and not found.tie
    text = jnp.asarray([5, 6, 7, *plain.tokens[:3]])[None]
    hidden = model.apply({"params": parameters}, text, jnp.ones_like(text), jnp.arange(6)[None]).main[0, -1]
    logits = np.asarray(parameters["embedding"] @ hidden)
    first, second = np.sort(logits)[::-1][:2]
    assert found.margin == pytest.approx(first - second, rel=1e-3)
    assert found.shortfall == pytest.approx(first - logits[299], rel=1e-3)
    assert found.rounding == 0
    shorter = first_divergence(decoder, [5, 6, 7], plain, continuation(plain.tokens[:4], 1, (), ()))
    assert (shorter.index, shorter.shortfall, shorter.tie) == (4, None, False)


def test_a_tie_is_between_the_tokens_that_were_written(scored):
    """Two tokens share the largest logit. One of them for the other is a tie; an unlikely one for either is none."""
    _, model, parameters, _ = scored
    likeliest = int(Decoder(model, parameters, [0]).run([np.array([5, 6, 7])], Options(0, 1))[0].tokens[0])
    twin = (likeliest + 32) % 288  # where a product's loops treat it alike
    embedding = parameters["embedding"].at[twin].set(parameters["embedding"][likeliest])
    decoder = Decoder(model, {**parameters, "embedding": embedding}, [0])
    logits = decoder.logits_at([5, 6, 7], "float32")
    assert logits[likeliest] == logits[twin] == logits.max()
    plain = continuation([likeliest], 1, (), ())
    assert first_divergence(decoder, [5, 6, 7], plain, continuation([twin], 1, (), ())).tie
    unlikely = first_divergence(decoder, [5, 6, 7], plain, continuation([int(logits.argmin())], 1, (), ()))
    assert unlikely.margin == 0 and unlikely.shortfall > 1 and not unlikely.tie
    assert not first_divergence(decoder, [5, 6, 7], continuation([int(logits.argmin())], 1, (), ()), plain).tie


def test_a_divergence_in_bfloat16_is_held_to_float32(scored):
    """The margin is float32's on the rounded weights; twice the distance between both dtypes' logits is a tie."""
    _, model, parameters, _ = scored
    coarse = LanguageModel(dataclasses.replace(model.config, dtype="bfloat16"), model.heads_config)
    decoder = Decoder(coarse, parameters, [0])
    plain = decoder.run([np.array([5, 6, 7])], Options(0, 6))[0]
    other = continuation([299, *plain.tokens[1:]], 1, (), ())
    found = first_divergence(decoder, [5, 6, 7], plain, other)
    exact, rounded = (decoder.logits_at([5, 6, 7], dtype) for dtype in ("float32", "bfloat16"))
    assert found.margin == pytest.approx(float(np.diff(np.sort(exact)[-2:])[0]))
    assert found.rounding == pytest.approx(np.abs(exact - rounded).max()) and found.rounding > 1e-4
    assert found.shortfall == pytest.approx(float(exact.max() - exact[299]))
    assert found.tie == (found.shortfall < 2 * found.rounding)
    second = continuation([int(np.argsort(exact)[-2]), *plain.tokens[1:]], 1, (), ())
    assert first_divergence(decoder, [5, 6, 7], plain, second).tie == (found.margin < 2 * found.rounding)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scanned", "chunk"),
    [(False, 16), (False, 512), (True, 16)],
)
def test_agreement_beside_acceptance(scanned, chunk):
    """Per prompt and head, on what plain decoding wrote, against the training path; the token from prefill is none.

    Of a model whose heads are right now and then: with one that never is, every way of counting gives zero.
    """
    model, parameters = small_vocabulary()
    # Every text has its full length, and is read in one chunk or in several.
    decoder = Decoder(model, parameters, [-1], scanned=scanned, chunk=chunk)
    plain = decoder.run(PROMPTS, Options(0, 40))
    agreed, counted = count_agreement(decoder, PROMPTS, plain, 6)
    logits = forward(model, parameters)
    for number, (prompt, found) in enumerate(zip(PROMPTS, plain, strict=True)):
        text = [*prompt.tolist(), *found.tokens]
        choice = logits(text).argmax(-1)
        for k in range(1, 5):
            places = [target for target in range(len(prompt) + 1, len(text)) if target - 1 - k >= 0]
            assert counted[k - 1, number] == len(places)
            assert agreed[k - 1, number] == sum(choice[k, t - 1 - k] == choice[0, t - 1] for t in places)
    assert np.all(agreed.sum(1) > 5) and np.all(agreed.sum(1)[:4] < counted.sum(1)[:4] - 5)
    assert len({tuple(row) for row in agreed}) == 6  # every head has its own, looped ones too
    # Up to where heads draft, there are fewer places.
    _, until = count_agreement(decoder, PROMPTS, plain, 1, until=20)
    assert until[0].tolist() == [len(range(max(len(prompt), 1) + 1, 20)) for prompt in PROMPTS]
    # On sampled text, the main head's choice is not what was written.
    drawn = decoder.run(PROMPTS, Options(0, 40, Sampling(2.0)))
    for number, (prompt, found) in enumerate(zip(PROMPTS, drawn, strict=True)):
        text = [*prompt.tolist(), *found.tokens]
        choice = logits(text).argmax(-1)
        places = [target for target in range(len(prompt) + 1, len(text)) if target - 2 >= 0]
        expected = sum(choice[1, t - 2] == choice[0, t - 1] for t in places)
        assert count_agreement(decoder, PROMPTS, drawn, 1)[0][0, number] == expected
        assert expected != sum(choice[1, t - 2] == text[t] for t in places)
