"""Scores of text, acceptance rates and intervals against hand-written forms."""

import dataclasses
import math
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.sweep.arms import Arm
from mtpd_jax.config import MeshConfig
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.decoding.decoder import Continuation, Decoder
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.evaluation.acceptance import (
    acceptance_intervals,
    acceptance_of,
    ratio,
    tokens_per_pass,
    tokens_per_pass_without_bonus,
)
from mtpd_jax.evaluation.agreement import agreement_of_heads, count_agreement
from mtpd_jax.evaluation.comparison import distinct_ngrams, first_divergence
from mtpd_jax.evaluation.scoring import batches, make_scorer, score_documents, windows
from mtpd_jax.losses.objective import scoring_objective
from mtpd_jax.model.backbone import LanguageModel
from mtpd_jax.sharding import make_mesh
from tests.builders import model_and_parameters, tiny_config
from tests.decoding.models import CONTEXT, PROMPTS, forward, small_vocabulary


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
        found = ratio([rng.binomial(tried, 0.6).tolist()], [tried.tolist()])
        assert found.low < found.mean < found.high
        assert found.low < 0.6 < found.high
        return found.high - found.low

    assert width(400) < width(20) / 2
    assert ratio([[3]], [[4]]) == type(ratio([[3]], [[4]]))(0.75, None, None)
    with warnings.catch_warnings():  # of a library, about resamples in which nothing was tried
        warnings.simplefilter("error")
        assert ratio([[1, 0]], [[2, 0]]) == type(ratio([[3]], [[4]]))(0.5, None, None)


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
    part = {"tokens": [3] * 3, "tried": [[n] * 3 for n in tried], "accepted": [[n] * 3 for n in accepted]}
    arm = Arm("", [{"seed": 0, "decoding": {"greedy": {"3": part}}}])
    swept = [arm.cumulative("greedy", 3, k).of_seeds()[0] for k in (1, 2, 3)]
    assert [None if np.isnan(value) else value for value in swept] == list(cumulative)


def test_intervals_are_paired():
    """A ratio that every prompt has has no interval, however different the prompts are."""
    tried = np.random.default_rng(0).integers(1, 100, 30)
    found = ratio([(tried / 2).tolist()], [tried.tolist()])
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


def test_batches_are_padded():
    (first, second) = batches([np.array([1, 2]), np.array([3]), np.array([4, 5, 6])], 2, 4)
    assert first.tokens.tolist() == [[1, 2, 0, 0], [3, 0, 0, 0]]
    assert second.segment_ids.tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]


@pytest.fixture(scope="module")
def scored():
    config = tiny_config()
    model, parameters = model_and_parameters(config)
    tokenizer = Tokenizer.train(["a cat sat on the mat"] * 3, 300, "<|endoftext|>", 1000)
    return config, model, parameters, tokenizer


def test_text_scores_against_numpy(scored):
    config, model, parameters, tokenizer = scored
    documents = ["the cat saß on the mat; " * 9, "a mat", ""]
    mesh = make_mesh(MeshConfig(-1, 1, 1, 1))
    found = score_documents(
        make_scorer(model, scoring_objective(config), mesh), parameters, documents, tokenizer, mesh,
        num_heads=2, length=32, batch_size=8,
    )  # fmt: skip
    nats, kl, agree, count, scored_bytes = np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(3), 0
    for text in documents:
        ids, byte_lengths = tokenizer.encode_document_and_bytes(text)
        pieces = [len(tokenizer.decode([token]).encode()) for token in ids[:-1]]
        assert sum(byte_lengths) == len(text.encode())
        if "ß" not in text:
            scored_bytes += sum(pieces[1:])
        else:
            scored_bytes += len(text.encode()) - pieces[0]
        for window in windows(ids, 32):
            row = jnp.asarray(window)[None]
            hidden = model.apply({"params": parameters}, row, jnp.ones_like(row), jnp.arange(len(window))[None])
            states = np.concatenate([hidden.main[None], hidden.heads])[:, 0].astype(np.float64)
            logits = states @ np.asarray(parameters["embedding"], np.float64).T
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
    config, model, parameters, tokenizer = scored
    mesh = make_mesh(MeshConfig(-1, 1, 1, 1))
    scorer = make_scorer(model, scoring_objective(config), mesh)
    ended = score_documents(
        scorer, parameters, ["a cat " * 200], tokenizer, mesh, num_heads=2, length=32, batch_size=8,
        on_batch=lambda: False,
    )  # fmt: skip
    assert ended is None


def test_divergence_names_place_and_margin(scored):
    _, model, parameters, _ = scored
    decoder = Decoder(model, parameters, end_id=0, context=64)
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
    likeliest = int(Decoder(model, parameters, 0, 64).run([np.array([5, 6, 7])], Options(0, 1))[0].tokens[0])
    twin = 298 if likeliest != 298 else 297
    embedding = parameters["embedding"].at[twin].set(parameters["embedding"][likeliest])
    decoder = Decoder(model, {**parameters, "embedding": embedding}, 0, 64)
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
    decoder = Decoder(coarse, parameters, end_id=0, context=64)
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


@pytest.mark.parametrize("scanned", [False, True])
def test_agreement_beside_acceptance(scanned):
    """Per prompt and head, on what plain decoding wrote, against the training path; the token from prefill is none.

    Of a model whose heads are right now and then: with one that never is, every way of counting gives zero.
    """
    model, parameters = small_vocabulary()
    decoder = Decoder(model, parameters, end_id=-1, context=CONTEXT, scanned=scanned)  # every text has its full length
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
    # On sampled text, the main head's choice is not what was written.
    drawn = decoder.run(PROMPTS, Options(0, 40, Sampling(2.0)))
    for number, (prompt, found) in enumerate(zip(PROMPTS, drawn, strict=True)):
        text = [*prompt.tolist(), *found.tokens]
        choice = logits(text).argmax(-1)
        places = [target for target in range(len(prompt) + 1, len(text)) if target - 2 >= 0]
        expected = sum(choice[1, t - 2] == choice[0, t - 1] for t in places)
        assert count_agreement(decoder, PROMPTS, drawn, 1)[0][0, number] == expected
        assert expected != sum(choice[1, t - 2] == text[t] for t in places)
    rates = agreement_of_heads(decoder, PROMPTS, plain, 6)
    assert [rate.mean for rate in rates] == pytest.approx((agreed.sum(1) / counted.sum(1)).tolist())
