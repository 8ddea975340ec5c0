"""Speculative decoding against plain decoding, and both against a reference without caches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpd_jax.decoding.batch import make_decode
from mtpd_jax.decoding.decoder import Decoder
from mtpd_jax.decoding.drafters.heads import Heads
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.decoding.stops import Stops
from mtpd_jax.model.backbone import LanguageModel
from mtpd_jax.sharding import data_mesh, replicated
from tests.builders import model_and_parameters, tiny_config
from tests.decoding.models import CONTEXT, END, PROMPTS, reference_speculation, small_vocabulary


def decoder_of(model, parameters, end_id=END, **options):
    return Decoder(model, parameters, [end_id], **options)


def texts(continuations):
    return [continuation.tokens for continuation in continuations]


@pytest.mark.optimised
@pytest.mark.parametrize("kind", ["cascade", pytest.param("recurrent", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("num_heads", "scanned"),
    [*(pytest.param(*one, marks=pytest.mark.slow) for one in [(1, True), (4, False)]), (4, True)],
)
def test_everything_against_a_reference_without_caches(num_heads, kind, scanned):
    """Tokens, who proposed them, passes, and how often each head was tried and accepted; a batch of four lengths."""
    model, parameters = small_vocabulary(kind)
    found = decoder_of(model, parameters, scanned=scanned).run(PROMPTS, Options(num_heads, 25))
    total = np.zeros(num_heads, int)
    for prompt, continuation in zip(PROMPTS, found, strict=True):
        tokens, passes, tried, accepted, proposers = reference_speculation(
            model, parameters, list(prompt), num_heads, 25
        )
        assert list(continuation.tokens) == tokens
        assert continuation.passes == passes
        assert list(continuation.tried) == tried
        assert list(continuation.accepted) == accepted
        assert list(continuation.proposers) == proposers
        total += accepted
    assert np.all(total > 0)  # else nothing was shown


def many_prompts(count):
    rng = np.random.default_rng(1)
    return [rng.integers(1, 7, rng.choice([1, 2, 5, 20])).astype(np.int32) for _ in range(count)]


SOME_HEADS = [(1, 0.0), (16, 0.0), (4, 0.5)]
MORE_HEADS = [*SOME_HEADS, (3, 0.0), (4, 0.0), (8, 0.9)]


@pytest.mark.optimised
@pytest.mark.parametrize(
    ("batch_size", "trained", "count", "cases"),
    [
        (7, True, 91, SOME_HEADS),
        *(
            pytest.param(size, trained, 203, MORE_HEADS, marks=pytest.mark.slow)
            for size in (1, 7)
            for trained in (True, False)
        ),
    ],
)
def test_greedy_text_is_plain_decodings(batch_size, trained, count, cases):
    """Many prompts, 1 to 16 heads (looped past 4), fixed and adaptive; ends and lengths reached anywhere in a block."""
    model, parameters = small_vocabulary(trained=trained)
    decoder, prompts = decoder_of(model, parameters, scanned=True), many_prompts(count)

    def run(options):
        return decoder.run(prompts, options, rows=batch_size)

    plain = run(Options(0, 20))
    for continuation in plain:
        assert len(continuation.tokens) == 20 or continuation.tokens[-1] == END
        assert END not in continuation.tokens[:-1]
        assert continuation.passes == len(continuation.tokens) - 1
    endings = set()
    for num_heads, confidence in cases:
        found = run(Options(num_heads, 20, min_confidence=confidence))
        assert texts(found) == texts(plain), (num_heads, confidence)
        for continuation in found:
            last = continuation.proposers[-1]
            kind = "end" if continuation.tokens[-1] == END else "length"
            before = continuation.proposers[-2] if len(continuation.proposers) > 1 else 0
            full = last == 0 and before == num_heads
            endings.add((kind, "bonus" if full else "draft inside" if 0 < last < num_heads else "other"))
    if trained:
        assert {("end", "draft inside"), ("end", "bonus"), ("length", "draft inside"), ("length", "bonus")} <= endings


@pytest.mark.parametrize("kind", ["cascade", pytest.param("recurrent", marks=pytest.mark.slow)])
def test_heads_past_the_last_are_looped(kind):
    """Two modules drafting five tokens are five modules, the first two repeated; a recurrent one is always the same."""
    model, parameters = small_vocabulary(kind, num_heads=2)
    config = dataclasses.replace(model.heads_config, num_heads=5)
    repeated = parameters
    if kind == "cascade":
        heads = jax.tree.map(lambda leaf: leaf[jnp.array([0, 1, 0, 1, 0])], parameters["heads"])
        repeated = {**parameters, "heads": heads}
    looped = decoder_of(model, parameters).run(PROMPTS, Options(5, 30))
    distinct = decoder_of(LanguageModel(model.config, config), repeated).run(PROMPTS, Options(5, 30))
    for a, b in zip(looped, distinct, strict=True):
        assert dataclasses.replace(a, seconds=0.0) == dataclasses.replace(b, seconds=0.0)
    assert sum(sum(continuation.accepted[2:]) for continuation in looped) > 0


@pytest.mark.slow
def test_prompts_are_read_in_chunks():
    """In one piece or in chunks of 8 tokens: the same, also where a head looks ahead into the next chunk."""
    model, parameters = small_vocabulary()
    rng = np.random.default_rng(3)
    prompts = [rng.integers(1, 7, length).astype(np.int32) for length in (1, 7, 9, 31, 33, 64, *[8, 16, 24] * 4)]
    whole = decoder_of(model, parameters).run(prompts, Options(4, 20))
    for scanned in (False, True):
        chunked = decoder_of(model, parameters, chunk=8, scanned=scanned).run(prompts, Options(4, 20))
        assert [(c.tokens, c.accepted) for c in chunked] == [(c.tokens, c.accepted) for c in whole]


def test_fewer_drafts_while_the_heads_are_not_sure():
    model, parameters = small_vocabulary()
    decoder, prompts = decoder_of(model, parameters), many_prompts(40)
    fixed = decoder.run(prompts, Options(4, 20))
    adaptive = decoder.run(prompts, Options(4, 20, min_confidence=0.35))
    assert texts(adaptive) == texts(fixed)
    tried, accepted = (
        [np.sum([getattr(c, name) for c in found], axis=0) for found in (fixed, adaptive)]
        for name in ("tried", "accepted")
    )
    assert tried[1][0] >= tried[0][0] and 0 < tried[1][3] < tried[0][3]
    rates = [a.sum() / t.sum() for a, t in zip(accepted, tried, strict=True)]
    third = [a[2] / t[2] for a, t in zip(accepted, tried, strict=True)]
    # What is still drafted is what the heads are sure of.
    assert tried[1][2] < tried[0][2] and third[1] > third[0] and rates[1] > rates[0]


@pytest.mark.optimised
def test_batch_neighbours_change_nothing():
    """Adaptive rounds run as deep as any row wants; the others' drafts, and so their counts, are as alone."""
    model, parameters = small_vocabulary()
    decoder = decoder_of(model, parameters)
    options = Options(4, 20, min_confidence=0.7)
    for prompt, together in zip(PROMPTS, decoder.run(PROMPTS, options), strict=True):
        alone = decoder.run([prompt], options)[0]
        assert dataclasses.replace(alone, seconds=0.0) == dataclasses.replace(together, seconds=0.0)


@pytest.mark.slow
def test_many_rows_are_each_decoded_as_alone():
    """More rows than are written to the caches one by one, of several lengths."""
    model, parameters = small_vocabulary()
    decoder, prompts = decoder_of(model, parameters), many_prompts(12)
    alone = [decoder.run([prompt], Options(2, 20))[0] for prompt in prompts]
    assert len({len(prompt) for prompt in prompts}) > 2
    assert [(c.tokens, c.accepted) for c in decoder.run(prompts, Options(2, 20))] == [
        (c.tokens, c.accepted) for c in alone
    ]


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize(
    "options", [Options(2, 20, Sampling(1.0)), Options(3, 20, min_confidence=0.5)], ids=["sampled", "adaptive"]
)
def test_devices_share_the_rows(options):
    """Three devices that hold the parameters decode eight prompts: the texts of one device, for a third of its work."""
    model, parameters = small_vocabulary()
    mesh = data_mesh(jax.devices()[2:5])
    copies = jax.device_put(parameters, replicated(mesh))
    prompts = [*many_prompts(4), *PROMPTS]
    one, three = decoder_of(model, parameters), decoder_of(model, copies, mesh=mesh)

    def decoded(decoder, prompts):
        found = decoder.run(prompts, options, seed=3, first_row=2)
        return [dataclasses.replace(continuation, seconds=0.0) for continuation in found]

    for count in (8, 1):  # three rows a device, and one row: then two devices have none
        assert decoded(three, prompts[:count]) == decoded(one, prompts[:count])
    work = [[program.cost_analysis()["flops"] for program in decoder._compiled.values()] for decoder in (one, three)]
    assert work[1][0] < 0.45 * work[0][0] and work[1][-1] == pytest.approx(work[0][-1])
    used = [set(program.input_shardings[0][1].device_set) for program in three._compiled.values()]
    assert [len(devices) for devices in used] == [3, 1] and set().union(*used) == set(mesh.devices.flat)


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_float32_decoding_multiplies_in_float32(dtype, precision):
    """On accelerators float32 products are rounded to fewer bits unless every one of them asks for more."""
    model, parameters = model_and_parameters(tiny_config(heads__num_heads=2, model__dtype=dtype))
    decoder = decoder_of(model, parameters)
    network, laid_out = decoder.network(Options(2, 4))
    keys = jax.random.split(jax.random.key(0), 1)
    loop = make_decode(network, Options(2, 4), 32, 1)
    one = jnp.ones(1, int)
    text = loop.lower(laid_out, jnp.ones((1, 32), int), one, keys, one, Stops((END,))).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 20
    for line in products:
        assert ("HIGHEST" in line) == (precision == "HIGHEST"), line
    asked = []
    with pytest.MonkeyPatch.context() as patch:  # and so are the logits that ties are judged by, whatever the dtype
        real = jax.default_matmul_precision
        patch.setattr(jax, "default_matmul_precision", lambda name: (asked.append(name), real(name))[1])
        decoder.logits_at([1, 2, 3], "float32")
    assert asked[-1] == "highest"


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_passes_of_one_width_are_equal_bit_for_bit(dtype):
    """The logits of a place do not depend on which row of a pass it is, nor on what else is in the pass."""
    config = tiny_config(heads__num_heads=4, model__dtype=dtype, model__context=CONTEXT)
    model, parameters = model_and_parameters(config)
    decoder = decoder_of(model, parameters)
    options = Options(4, 60).sharing_width(4)
    network, laid_out = decoder.network(options)
    extend = network.jit(network.extend)
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 300, (2, 64)))

    def read_in_steps(step):
        cache, states, place = network.empty_cache(2, 80), [], 0
        while place < 40:
            hidden, cache = extend(laid_out, tokens[:, place : place + options.width], jnp.full(2, place), cache)
            states.append(hidden[:, :step])
            place += step
        return np.asarray(network.logits(laid_out, jnp.concatenate(states, axis=1)[:, :40]))

    one_by_one = read_in_steps(1)
    for step in (2, 5, 8):
        np.testing.assert_array_equal(read_in_steps(step), one_by_one)
    plain = decoder.run(PROMPTS, dataclasses.replace(options, num_drafts=0))
    for num_heads in (1, 4):
        assert texts(decoder.run(PROMPTS, dataclasses.replace(options, num_drafts=num_heads))) == texts(plain)


class Six(Heads, name="six"):
    """Drafts the last token of the vocabulary, whatever the heads say."""

    def draft(self, parameters, rows, state, keys):
        drafts, state = super().draft(parameters, rows, state, keys)
        return drafts.replace(tokens=jnp.full_like(drafts.tokens, 6)), state


def test_always_rejected_drafts_lose_nothing():
    """Drafts of a token that the main head never writes: every round confirms one token, and the text is the same."""
    model, parameters = small_vocabulary()
    parameters = {**parameters, "embedding": parameters["embedding"].at[6].set(0)}
    plain = decoder_of(model, parameters).run(PROMPTS[:3], Options(0, 20))
    assert not any(6 in continuation.tokens for continuation in plain)
    found = decoder_of(model, parameters).run(PROMPTS[:3], Options(4, 20, drafter="six"))
    assert texts(found) == texts(plain)
    for continuation in found:
        assert continuation.accepted == (0, 0, 0, 0)
        assert continuation.tried == (continuation.passes, 0, 0, 0)
        assert continuation.passes == len(continuation.tokens) - 1


def test_perfect_drafts_are_all_accepted():
    """A model that always writes the same token is drafted perfectly, also past end-of-length by up to K."""
    model, parameters = small_vocabulary()
    parameters = jax.tree.map(jnp.zeros_like, parameters)  # all logits equal: the first index, always
    found = decoder_of(model, parameters, end_id=6).run([PROMPTS[2]], Options(4, 22))[0]
    assert found.tokens == (0,) * 22
    assert found.passes == 5  # 1 from prefill, 4 rounds of 5, 1 token
    assert found.tried == (5, 4, 4, 4) and found.accepted == found.tried
    assert found.proposers == (0, *(1, 2, 3, 4, 0) * 4, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [Options(2, 12, Sampling(1.0)), Options(3, 12, Sampling(1.0), 0.4)], ids=["fixed", "adaptive"]
)
def test_a_seed_reproduces_whatever_the_batch(options):
    model, parameters = small_vocabulary()
    decoder = decoder_of(model, parameters)
    together = decoder.run(PROMPTS, options, seed=5)
    for row, prompt in enumerate(PROMPTS):
        alone = decoder.run([prompt], options, seed=5, first_row=row)[0]
        assert alone.tokens == together[row].tokens
    other = decoder.run(PROMPTS, options, seed=6)
    assert texts(other) != texts(together)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([np.array([], np.int32)], Options(2, 3), "prompt 1 is empty"),
        ([], Options(2, 3), "no prompt"),
        (PROMPTS, Options(-1, 3), "heads = -1"),
        (PROMPTS, Options(2, 0), "max_new_tokens = 0"),
        (PROMPTS, Options(2, 3, Sampling(-1.0)), "temperature = -1"),
        (PROMPTS, Options(2, 3, Sampling(1.0, top_p=0.0)), "top_p = 0"),
        (PROMPTS, Options(2, 3, Sampling(1.0, top_k=0)), "top_k = 0"),
        (PROMPTS, Options(2, 3, Sampling(0.0, top_k=3)), "need a temperature"),
        (PROMPTS, Options(2, 3, min_confidence=1.0), "min_confidence = 1"),
        (PROMPTS, Options(2, 3, pass_width=2), "pass_width = 2: expected at least 3, for heads = 2"),
        (PROMPTS, Options(2, CONTEXT - 32), "prompt 4 has 33 tokens.*context of 4096"),
    ],
)
def test_bad_options_are_refused(prompts, options, message):
    model, parameters = small_vocabulary()
    with pytest.raises(ValueError, match=message):
        decoder_of(model, parameters).run(prompts, options)


def test_a_model_without_heads_does_not_draft():
    model, parameters = model_and_parameters(tiny_config(heads__num_heads=0))
    with pytest.raises(ValueError, match="trained without heads"):
        decoder_of(model, parameters).run(PROMPTS, Options(1, 3))
