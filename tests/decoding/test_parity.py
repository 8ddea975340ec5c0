"""The decoder's heads compute what the trainer's heads compute: draft logits against the training path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mtpd_jax.decoding.drafting import draft

from mtpd_jax.decoding import speculative
from mtpd_jax.decoding.network import Network
from mtpd_jax.decoding.options import Options
from tests.builders import platform
from tests.decoding.models import PROMPTS, all_logits, forward, small_vocabulary

NEW_TOKENS, LONG = 24, 80


def rounds(model, parameters, options, scanned):
    """Decodes greedily and yields, round by round, the rows before it, the drafts, and how many were accepted."""
    network = Network(model, platform(), scanned, True if options.adaptive else None)
    laid_out = network.parameters(parameters)
    width = max(map(len, PROMPTS))
    prompts = jnp.asarray(np.stack([np.pad(p, (0, width - len(p))) for p in PROMPTS]))
    lengths = jnp.asarray([len(p) for p in PROMPTS], jnp.int32)
    keys = jax.vmap(jax.random.key)(jnp.arange(len(PROMPTS)))
    state = speculative.prefill(network, laid_out, prompts, lengths, keys, options, -1, width)

    @jax.jit
    def one_round(state):
        drafts, heads = draft(network, laid_out, state.rows, state.heads, keys, options)
        candidates, accepted, cache, hidden = speculative.verify(network, laid_out, state, drafts, keys, options)
        return drafts, accepted, speculative.advance(state, drafts, candidates, accepted, cache, heads, hidden, -1)

    while not bool(state.rows.finished.all()):
        before = jax.device_get(state.rows)
        drafts, accepted, state = one_round(state)
        yield before, jax.device_get(drafts), np.asarray(accepted)
    yield jax.device_get(state.rows), None, None


def packed_logits(model, parameters, texts):
    """The training path on one packed row that holds all texts: logits [K+1, T, V], and where each text begins."""
    tokens = np.concatenate(texts)[None]
    segments = np.concatenate([np.full(len(text), number) for number, text in enumerate(texts, 1)])[None]
    positions = np.concatenate([np.arange(len(text)) for text in texts])[None]
    hidden = jax.jit(model.apply)({"params": parameters}, *map(jnp.asarray, (tokens, segments, positions)))
    return np.asarray(all_logits(parameters, hidden))[:, 0], np.cumsum([0, *map(len, texts)])


def check_parity(kind, options, scanned):
    """Every depth's draft logits, in every round, equal the training path's on the same tokens, also when packed."""
    model, parameters = small_vocabulary(kind)
    logits, seen, found, compared = forward(model, parameters), set(), [], 0
    *played, (end, _, _) = rounds(model, parameters, options, scanned)
    for before, drafts, accepted in played:
        for row in np.nonzero(~before.finished)[0]:
            n, count = int(before.length[row]), int(drafts.count[row])
            text = np.concatenate([before.tokens[row, :n], drafts.tokens[row]])
            # Heads run deeper than a row is sure of where they are due, or another row is.
            ran = count + int(np.any(drafts.logits[row, count:], axis=-1).sum())
            expected = logits(text)[1:, n - 2][:ran]
            error = np.abs(drafts.logits[row, :ran] - expected).max()
            assert error <= 1e-5 * np.abs(expected).max(), (row, n, error)
            seen.add((count, int(accepted[row])))
            found.append((row, n, drafts.logits[row], min(count, int(accepted[row]) + 1)))
    texts = [end.tokens[row, : end.length[row]] for row in range(len(PROMPTS))]
    packed, begin = packed_logits(model, parameters, texts)
    for row, n, found_logits, right in found:  # the drafts before the first rejected one are the text's own tokens
        for k in range(right):
            if n + k < len(texts[row]):
                error = np.abs(found_logits[k] - packed[k + 1, begin[row] + n - 2]).max()
                assert error <= 1e-5 * np.abs(packed).max(), (row, n, k, error)
                compared += 1
    assert compared > 50
    return seen


@pytest.mark.optimised
@pytest.mark.parametrize("kind", ["cascade", "recurrent"])
@pytest.mark.parametrize("scanned", [False, True])
def test_draft_logits_equal_training_logits(kind, scanned):
    """After acceptances and rejections of every length, for several prompts."""
    seen = {accepted for _, accepted in check_parity(kind, Options(4, NEW_TOKENS), scanned)}
    assert {0, 4} < seen  # rejected at once, all accepted, and something between


@pytest.mark.optimised
@pytest.mark.parametrize("min_confidence", [0.3, 0.5])
def test_parity_after_rounds_that_stopped_early(min_confidence):
    """Heads that several short rounds did not reach draft as if they had been run all along."""
    seen = check_parity("cascade", Options(4, LONG, min_confidence=min_confidence), True)
    assert len({count for count, _ in seen}) == 3


@pytest.mark.optimised
def test_parity_of_heads_that_fell_as_far_behind_as_they_may():
    """Two heads that are never sure: every round makes one draft, so that the second head runs only when it is due. It
    is due at the last moment: one token later, an entry that a rejected draft made would stay in its cache."""
    check_parity("cascade", Options(2, LONG, min_confidence=0.999), True)


@pytest.mark.parametrize("window", [1, 3])
def test_parity_notices_caches_that_keep_rejected_drafts(monkeypatch, window):
    """The text stays the same with such caches, only slower to come by, so that nothing else would notice."""
    monkeypatch.setattr(Options, "window", property(lambda self: window))
    with pytest.raises(AssertionError):
        check_parity("cascade", Options(4, NEW_TOKENS), True)


def advance_with(monkeypatch, change):
    original = speculative.advance

    def changed(state, *arguments):
        new = original(state, *arguments)
        return new.replace(heads=change(state.heads, new.heads))

    monkeypatch.setattr(speculative, "advance", changed)


def test_parity_notices_a_window_that_stands_still(monkeypatch):
    advance_with(monkeypatch, lambda old, new: new.replace(window=old.window))
    with pytest.raises(AssertionError):
        check_parity("cascade", Options(4, NEW_TOKENS), False)


def test_parity_notices_heads_that_fall_behind_for_ever(monkeypatch):
    advance_with(monkeypatch, lambda old, new: new.replace(behind=new.behind * 0))
    with pytest.raises(AssertionError):
        check_parity("cascade", Options(4, LONG, min_confidence=0.5), True)
