"""The decoder's heads compute what the trainer's heads compute: draft logits against the training path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpd_jax.decoding.decoder import Decoder
from mtpd_jax.decoding.drafters.both import Both
from mtpd_jax.decoding.drafters.chain import ChainHeads
from mtpd_jax.decoding.drafters.drafter import COPIED
from mtpd_jax.decoding.drafters.heads import Heads
from mtpd_jax.decoding.network import Network
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.strategies.speculative import Speculative
from mtpd_jax.evaluation.parity import draft_parity, rounds
from tests.builders import platform
from tests.decoding.models import PROMPTS, all_logits, forward, small_vocabulary

NEW_TOKENS, LONG = 24, 80


def played(model, parameters, options, scanned, strategy_of=Speculative):
    """Decodes greedily, round by round."""
    network = Network(model, platform(), scanned, True if options.adaptive else None)
    return rounds(strategy_of(network, options), network.parameters(parameters), PROMPTS)


def packed_logits(model, parameters, texts):
    """The training path on one packed row that holds all texts: logits [K+1, T, V], and where each text begins."""
    tokens = np.concatenate(texts)[None]
    segments = np.concatenate([np.full(len(text), number) for number, text in enumerate(texts, 1)])[None]
    positions = np.concatenate([np.arange(len(text)) for text in texts])[None]
    hidden = jax.jit(model.apply)({"params": parameters}, *map(jnp.asarray, (tokens, segments, positions)))
    return np.asarray(all_logits(parameters, hidden))[:, 0], np.cumsum([0, *map(len, texts)])


def check_parity(kind, options, scanned, strategy_of=Speculative, trained=True):
    """Every depth's draft logits, in every round, equal the training path's on the same tokens, also when packed."""
    model, parameters = small_vocabulary(kind, trained)
    logits, seen, found, compared = forward(model, parameters), set(), [], 0
    all_rounds = list(played(model, parameters, options, scanned, strategy_of))
    for before, drafts, accepted, _ in all_rounds:
        for row in np.nonzero(~before.finished)[0]:
            n, count = int(before.length[row]), int(drafts.count[row])
            if drafts.proposers[row, 0] == COPIED:  # what the heads drafted is not what is verified
                seen.add(("copied", int(accepted[row])))
                continue
            text = np.concatenate([before.tokens[row, :n], drafts.tokens[row]])
            # Heads run deeper than a row is sure of where they are due, or another row is.
            ran = count + int(np.any(drafts.logits[row, count:], axis=-1).sum())
            expected = logits(text)[1:, n - 2][:ran]
            error = np.abs(drafts.logits[row, :ran] - expected).max()
            assert error <= 1e-5 * np.abs(expected).max(), (row, n, error)
            seen.add((count, int(accepted[row])))
            found.append((row, n, drafts.logits[row], min(count, int(accepted[row]) + 1)))
    end = all_rounds[-1][3]
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
@pytest.mark.parametrize("kind", ["cascade", pytest.param("recurrent", marks=pytest.mark.slow), "shared"])
@pytest.mark.parametrize("scanned", [pytest.param(False, marks=pytest.mark.slow), True])
def test_draft_logits_equal_training_logits(kind, scanned):
    """After acceptances and rejections of every length, for several prompts."""
    seen = {accepted for _, accepted in check_parity(kind, Options(4, NEW_TOKENS), scanned)}
    assert {0, 4} < seen  # rejected at once, all accepted, and something between


@pytest.mark.optimised
@pytest.mark.parametrize(
    ("kind", "min_confidence"),
    [("cascade", 0.5), ("shared", 0.5), pytest.param("cascade", 0.3, marks=pytest.mark.slow)],
)
def test_parity_after_rounds_that_stopped_early(kind, min_confidence):
    """Heads that several short rounds did not reach draft as if they had been run all along."""
    seen = check_parity(kind, Options(4, LONG, min_confidence=min_confidence), True)
    assert len({count for count, _ in seen}) == 3


@pytest.mark.optimised
@pytest.mark.parametrize("kind", ["cascade", pytest.param("recurrent", marks=pytest.mark.slow)])
def test_parity_of_heads_that_fell_as_far_behind_as_they_may(kind):
    """Two heads that are never sure: every round makes one draft, so that the second head runs only when it is due. It
    is due at the last moment: one token later, an entry that a rejected draft made would stay in its cache."""
    check_parity(kind, Options(2, LONG, min_confidence=0.999), True)


class Alternating(Both, name="alternating"):
    """Heads and lookup by turns, whoever is better."""

    def draft(self, parameters, rows, state, keys):
        copies = (rows.length % 3 == 0).astype(jnp.float32)
        return super().draft(parameters, rows, state.replace(record=jnp.stack([1 - copies, copies], axis=1)), keys)


@pytest.mark.optimised
@pytest.mark.parametrize("kind", [pytest.param("cascade", marks=pytest.mark.slow), "shared"])
def test_parity_beside_prompt_lookup(kind):
    """Heads draft as if they had been run all along, also where drafts were confirmed that they did not make.

    Of a model whose heads are no good, and whose text repeats itself.
    """
    seen = check_parity(kind, Options(4, LONG, drafter="alternating"), True, trained=False)
    assert ("copied", 4) in seen and (4, 0) in seen


class NarrowHeads(Heads, name="narrow"):
    """Heads that are run over one position, or over so many."""

    def __init__(self, network, options, alone=True, window=1):
        super().__init__(network, options, alone)
        self.window = window


class NarrowAlternating(Alternating, name="narrow alternating"):
    """Heads that take all drafts that are confirmed for their own."""

    def __init__(self, network, options):
        super().__init__(network, options)
        self._heads = Heads(network, options, alone=True)


class StandingHeads(Heads, name="standing"):
    """Heads whose window stands still."""

    def confirm(self, state, before, after, hidden):
        return super().confirm(state, before, after, hidden).replace(window=state.window)


class ForgetfulHeads(Heads, name="forgetful"):
    """Heads that do not count how far they fall behind."""

    def confirm(self, state, before, after, hidden):
        new = super().confirm(state, before, after, hidden)
        return new.replace(behind=new.behind * 0)


@pytest.mark.parametrize(
    "options",
    [
        Options(4, NEW_TOKENS, drafter="narrow"),
        Options(4, NEW_TOKENS, drafter="standing"),
        Options(4, LONG, min_confidence=0.5, drafter="forgetful"),
        Options(4, LONG, drafter="narrow alternating"),
    ],
    ids=lambda options: options.drafter,
)
def test_parity_notices_caches_that_keep_rejected_drafts(options):
    """The text stays the same with such caches, only slower to come by, so that nothing else would notice."""
    with pytest.raises(AssertionError):
        check_parity("cascade", options, True, trained="alternating" not in options.drafter)


def test_parity_notices_a_window_that_is_too_small_by_two():
    class Strategy(Speculative, name="three positions"):
        def __init__(self, network, options):
            super().__init__(network, options)
            self.drafter = NarrowHeads(network, options, window=3)

    with pytest.raises(AssertionError):
        check_parity("cascade", Options(4, NEW_TOKENS), True, Strategy)


class NarrowChain(ChainHeads):
    """A chain whose window is smaller by one than a round may confirm."""

    def __init__(self, network, options):
        super().__init__(network, options)
        self.window -= 1


class StaleChain(ChainHeads):
    """A chain that leaves what it drafted in the cache: depth 1 is made for its newest position only."""

    def __init__(self, network, options):
        super().__init__(network, options)
        self.window = 1


class LateChain(ChainHeads):
    """A chain that stands one position too late: its own entries lie behind a slot that is not its own."""

    def draft(self, parameters, rows, state, keys):
        late = dataclasses.replace(rows, length=rows.length + 1)
        return super().draft(parameters, late, state, keys)


@pytest.mark.parametrize("drafter", [NarrowChain, StaleChain, LateChain])
def test_parity_notices_chains_that_are_not_what_was_trained(drafter):
    class Strategy(Speculative, name="another chain"):
        def __init__(self, network, options):
            super().__init__(network, options)
            self.drafter = drafter(network, options)

    with pytest.raises(AssertionError):
        check_parity("shared", Options(4, NEW_TOKENS), True, Strategy)


@pytest.mark.parametrize(
    "kind", ["cascade", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("recurrent", "shared"))]
)
def test_parity_is_measured(kind):
    """By the library as by this file: nothing beyond rounding, at any depth, and as many drafts as rounds take."""
    model, parameters = small_vocabulary(kind)
    found = draft_parity(model, parameters, PROMPTS, Options(3, NEW_TOKENS), platform())
    assert [depth.same_choice for depth in found] == [1.0] * 3
    assert all(0 < depth.difference < 1e-5 for depth in found)
    written = Decoder(model, parameters, []).run(PROMPTS, Options(3, NEW_TOKENS))
    assert {depth.compared for depth in found} == {sum(one.passes for one in written)}


def test_parity_that_is_not_there_is_measured_too():
    model, parameters = small_vocabulary()
    found = draft_parity(model, parameters, PROMPTS, Options(4, NEW_TOKENS, drafter="standing"), platform())
    assert min(depth.difference for depth in found) > 1e-2 and min(depth.same_choice for depth in found) < 1
