"""Standalone MTP: what a step computes, against plain passes, one slot at a time; and what a run keeps and needs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtpd_jax.config import MeshConfig
from mtpd_jax.data.pipeline import Batch
from mtpd_jax.decoding.network import Network
from mtpd_jax.losses.dense import dense_divergence
from mtpd_jax.losses.terms import Distillation
from mtpd_jax.methods import spans
from mtpd_jax.methods.method import StepContext
from mtpd_jax.model.backbone import unembedding_of
from mtpd_jax.sharding import make_mesh
from mtpd_jax.training.optimizer import decay_mask
from tests.builders import (
    assert_trees_close,
    gradients,
    method_on,
    packed_batch,
    platform,
    random_parameters,
    tiny_config,
    with_micro_batches,
)

END = 3
SETTINGS = [("student", "teacher"), ("student", "distribution"), ("data", "teacher"), ("data", "data")]


def student_config(**overrides):
    """Rows of 32 slots in 4 regions, spans of up to 4 tokens."""
    return tiny_config(**{
        "heads__num_heads": 0, "objective__mode": "standalone", "objective__source": "-", "objective__k_max": 4,
        "objective__regions": 4, "objective__end_ids": (END,), "model__mask_embedding": True,
        "objective__top_n": 300, **overrides,
    })  # fmt: skip


def student_and_teacher(method):
    """Two models that differ, in which nothing is zero."""
    student = random_parameters(method.model, seed=1)
    teacher = method.frozen_of(random_parameters(method.teacher_model, seed=2))
    return student, teacher


def rows_of(config, seed=0, **documents):
    return jax.tree.map(lambda array: array[0], packed_batch(config, seed, **documents))


@functools.partial(jax.jit, static_argnums=0)
def _states(model, parameters, row):
    return model.apply({"params": parameters}, row, jnp.ones_like(row), jnp.arange(row.shape[1])[None]).main[0]


def plain_states(model, parameters, tokens):
    """States of one text, by a plain pass. Filled up, which causality makes harmless, for one length to compile."""
    return _states(model, parameters, jnp.asarray(np.pad(tokens, (0, 40 - len(tokens))))[None])[: len(tokens)]


def choice(parameters, state):
    return int(jnp.argmax(state @ unembedding_of(parameters).T))


def slots_of(laid_out, method, row):
    """(j, region, slot, text before the span) of a row's slots that there are."""
    k_max, regions = method.objective.k_max, method.regions
    places, there = (np.asarray(x[row]).reshape(k_max, regions) for x in (laid_out.slots, laid_out.there))
    for j in range(1, k_max + 1):
        for region in range(regions):
            if there[j - 1, region]:
                yield j, region, places[j - 1, region], int(laid_out.source[row, places[0, region]])


def document_up_to(rows, row, anchor):
    begin = int(anchor - rows.positions[row, anchor])
    return np.asarray(rows.tokens[row, begin : anchor + 1])


def test_text_is_read_as_without_masks():
    """States of text are those of the plain row; noise in the masks changes no bit of them."""
    method = method_on(student_config())
    student, _ = student_and_teacher(method)
    rows = rows_of(method.config)
    offsets = jnp.arange(8) % 5
    laid_out = method.lay_out(rows, 3, offsets)

    @jax.jit
    def states(parameters):
        return method.student(parameters, rows, laid_out)

    found = states(student)
    noisy = states({**student, "mask_embedding": 100 * jnp.cos(jnp.arange(32.0))})
    is_text = ~np.asarray(laid_out.is_mask)
    np.testing.assert_array_equal(np.asarray(found)[is_text], np.asarray(noisy)[is_text])
    assert np.abs(np.asarray(found - noisy))[~is_text].min(axis=0).max() > 1e-3
    # Nor does it see what is written in them.
    _, teacher = student_and_teacher(method)
    asked = jax.jit(lambda tokens: method._run(method.teacher_model, teacher, tokens, laid_out))
    tokens = laid_out.tokens(rows.tokens, 0)

    def drawn(seed):
        return jax.random.randint(jax.random.key(seed), laid_out.slots.shape, 4, 300)

    first, second = (
        np.asarray(
            asked(laid_out.written(tokens, jax.random.randint(jax.random.key(seed), laid_out.slots.shape, 4, 300), 4))
        )
        for seed in range(2)
    )
    np.testing.assert_array_equal(first[is_text], second[is_text])
    assert not np.array_equal(first, second)
    plain = jax.jit(method.model.apply)({"params": student}, rows.tokens, rows.segment_ids, rows.positions).main
    expected = jnp.take_along_axis(plain, laid_out.source[:, :, None], axis=1)
    np.testing.assert_allclose(np.asarray(found)[is_text], np.asarray(expected)[is_text], atol=1e-5)
    # And so no gradient comes from text to the masks; from masks, one does.
    for slots, moved in ((is_text, False), (~is_text, True)):

        def total(parameters, slots=slots):
            return jnp.sum(jnp.where(slots[..., None], states(parameters), 0) ** 2)

        assert bool(np.any(np.asarray(jax.grad(total)(student)["mask_embedding"]))) is moved


@pytest.mark.parametrize("written", ["student", "data"])
def test_the_teacher_reads_the_text_and_what_was_written(written):
    """Slot by slot: student's states are those of text and masks, teacher's those of text and what stands there."""
    method = method_on(student_config(objective__written=written))
    student, teacher = student_and_teacher(method)
    rows = rows_of(method.config, rows=((32,), (1, 2, 1), (20, 11), (30, 2)) * 2)
    laid_out = method.lay_out(rows, 4, jnp.arange(8) % 5)
    done = jax.jit(method.exercise)(student, teacher, rows, laid_out)
    k_max, regions, checked = 4, 4, 0
    choices, taught, labels = (
        np.asarray(x).reshape(8, k_max, regions) for x in (done.choices, done.taught, done.labels)
    )
    for row in (0, 1, 2, 3):
        for j, region, slot, anchor in slots_of(laid_out, method, row):
            text = document_up_to(rows, row, anchor)
            masks = [300] * (j - 1)
            state = plain_states(method.model, student, [*text, *masks])[-1]
            np.testing.assert_allclose(done.states[row, slot], state, atol=2e-5)
            assert choices[row, j - 1, region] == choice(student, state)
            ahead = rows.tokens[row, anchor + 1 : anchor + j]
            inside = (np.asarray(rows.segment_ids[row, anchor + 1 : anchor + j]) == rows.segment_ids[row, anchor]).all()
            before = choices[row, : j - 1, region] if written == "student" else np.asarray(ahead)
            there = END not in before and (written == "student" or (inside and len(ahead) == j - 1))
            assert taught[row, j - 1, region] == there
            if there:
                told = plain_states(method.teacher_model, teacher, [*text, *before])[-1]
                place = (j - 1) * regions + region
                np.testing.assert_allclose(done.teacher[row, place], told, atol=2e-5)
                assert labels[row, j - 1, region] == choice(teacher, told)
                checked += j > 1
    assert checked > 20


@pytest.mark.parametrize(
    ("written", "labels", "prefix"),
    [
        ("student", "distribution", 0.0),
        *(pytest.param(*one, prefix, marks=pytest.mark.slow) for one in SETTINGS for prefix in (0.0, 0.5)),
    ],
)  # fmt: skip
def test_a_step_is_the_mean_over_its_slots(written, labels, prefix):
    """Loss and reported sums against logits that are all there; gradients against autodiff of those."""
    config = student_config(
        objective__written=written, objective__labels=labels, objective__prefix_weight=prefix, objective__top_n=20,
        objective__temperature=1.5,
    )  # fmt: skip
    method = method_on(config)
    student, teacher = student_and_teacher(method)
    rows = rows_of(config)
    teacher = None if labels == "data" else teacher
    context = StepContext(jnp.int32(4), jax.random.key(7), jax.random.split(jax.random.key(8), 8))
    laid_out = method.spans_of(rows, context)
    done = method.exercise(student, teacher, rows, laid_out)
    distillation = Distillation(20, 1.5, "forward", True)
    weights = method.count(rows, context)
    text = np.asarray(rows.tokens)

    def dense(parameters):
        states, matrix = method.student(parameters, rows, laid_out), unembedding_of(parameters)
        logits = jnp.take_along_axis(states, laid_out.slots[:, :, None], axis=1) @ matrix.T
        if labels == "distribution":
            told = done.teacher @ unembedding_of(teacher).T
            flat = told.reshape(1, -1, 300), logits.reshape(1, -1, 300)
            values = dense_divergence(*flat, distillation).reshape(done.taught.shape)
        else:
            values = -jnp.take_along_axis(jax.nn.log_softmax(logits), done.labels[:, :, None], axis=-1)[..., 0]
        taught = jnp.sum(jnp.where(done.taught, values, 0))
        # The text: before anchors, or after them.
        after = np.minimum(np.asarray(laid_out.source) + 1, 31)
        follows = np.take_along_axis(np.asarray(rows.segment_ids), after, 1) == np.asarray(laid_out.segment_ids)
        follows &= (np.asarray(laid_out.source) < 31) & (np.asarray(laid_out.segment_ids) != 0)
        there = np.zeros_like(follows)
        ends = np.take_along_axis(text, np.asarray(laid_out.source), 1) == END
        there |= np.asarray(laid_out.is_anchor) & ~ends
        held = follows & (~np.asarray(laid_out.is_anchor | laid_out.is_mask) if prefix else there)
        ce = -jnp.take_along_axis(
            jax.nn.log_softmax(states @ matrix.T), np.take_along_axis(text, after, 1)[:, :, None], 2
        )
        main = jnp.sum(jnp.where(held, ce[..., 0], 0))
        return taught / weights[0] + prefix * main / weights[1], (taught, main, held.sum())

    (expected, (taught, main, held)), wanted = jax.value_and_grad(dense, has_aux=True)(student)
    (loss, sums), found = jax.value_and_grad(method.loss, has_aux=True)(student, teacher, rows, weights, context)
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    assert_trees_close(found, wanted, 2e-4)
    assert float(sums.taught) == pytest.approx(float(taught), rel=1e-4)
    assert float(sums.main) == pytest.approx(float(main), rel=1e-4) and weights[1] == held > 0
    agreed = (np.asarray(done.taught) & (np.asarray(done.choices) == np.asarray(done.labels))).reshape(8, 4, 4)
    np.testing.assert_array_equal(sums.agreement, agreed.sum((0, 2)))
    np.testing.assert_array_equal(sums.learned, np.asarray(done.taught).reshape(8, 4, 4).sum((0, 2)))
    terms = method.terms(sums, weights)
    assert terms["slot_2/agreement"].weight == sums.learned[1] and terms["main/ce"].weight == weights[1]
    assert ("spans/kl" in terms) is (labels == "distribution") is ("spans/ce" not in terms)


def test_a_student_that_is_its_teacher_diverges_at_masks_only():
    method = method_on(student_config(objective__labels="distribution"))
    student = random_parameters(method.model, seed=1)
    teacher = method.frozen_of(student)
    rows = rows_of(method.config)
    for k, alike in ((1, True), (2, False)):
        laid_out = method.lay_out(rows, k, jnp.zeros(8, int))
        done = method.exercise(student, teacher, rows, laid_out)
        own = jnp.take_along_axis(done.states, laid_out.slots[:, :, None], axis=1)
        difference = np.abs(np.asarray(own - done.teacher))[np.asarray(done.taught)]
        assert bool(difference.max() < 1e-5) is alike


@pytest.mark.parametrize("k", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_before_its_first_step_a_student_has_to_learn_from_masks_only(k, monkeypatch):
    """By the teacher's distribution: with spans of one token, which are plain text, the loss is nothing."""
    config = student_config(objective__labels="distribution")
    method = method_on(config)
    monkeypatch.setattr(type(method), "spans_of", lambda self, rows, _: self.lay_out(rows, k, jnp.arange(8) % 5))
    student, rows = random_parameters(method.model, seed=1), rows_of(config)
    context = StepContext(jnp.int32(4), jax.random.key(7), jax.random.split(jax.random.key(8), 8))
    loss, sums = method.loss(student, method.frozen_of(student), rows, method.count(rows, context), context)
    assert [bool(learned) for learned in sums.learned] == [j <= k for j in range(1, 5)]
    assert abs(float(loss)) < 1e-6 if k == 1 else float(loss) > 1e-2


def test_slots_are_what_decoding_computes_with_a_cache():
    """A text is read, all but its last token; then a pass reads that and masks, as the decoder has them."""
    method = method_on(student_config())
    student, rows, k = random_parameters(method.model, seed=1), rows_of(method.config), 4
    laid_out = method.lay_out(rows, k, jnp.arange(8) % 5)
    states = method.student(student, rows, laid_out)
    network = Network(method.model, platform())
    parameters = network.parameters(student)

    @network.jit
    def spans_after(parameters, text, length):
        _, cache = network.extend(parameters, text, jnp.zeros(1, int), network.empty_cache(1, 48))
        last = jax.lax.dynamic_slice(text, (0, length - 1), (1, 1))
        masks = jnp.full((1, k - 1), method.model.config.vocabulary_size)
        return network.extend(parameters, jnp.concatenate([last, masks], axis=1), length[None] - 1, cache)[0][0]

    places = [(row, *one) for row in range(3) for one in slots_of(laid_out, method, row)]
    for row, j, _, slot, anchor in places:
        text = document_up_to(rows, row, anchor)
        padded = jnp.asarray(np.pad(text, (0, 40 - len(text))))[None]
        found = spans_after(parameters, padded, jnp.int32(len(text)))
        np.testing.assert_allclose(states[row, slot], found[j - 1], atol=2e-5)
    assert sum(j > 1 for _, j, *_ in places) > 10


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["distribution", "teacher"])
def test_neither_micro_batches_nor_meshes_change_a_step(labels):
    """The same lengths and offsets are drawn for the same rows, however the batch is cut and whoever computes it."""
    config = student_config(objective__labels=labels, objective__k_min=2)
    method = method_on(config)
    student, teacher = student_and_teacher(method)
    batch = packed_batch(config)
    expected = gradients(method, student, batch, teacher)
    for parts in (2, 8):
        found = gradients(method, student, with_micro_batches(batch, parts), teacher)
        assert_trees_close((found[0], found[3]), (expected[0], expected[3]), 1e-4)
        assert_trees_close(found[1:3], expected[1:3], 1e-6)
    mesh = make_mesh(MeshConfig(2, 2, 2, 1))
    spread = jax.jit(lambda *trees: gradients(method_on(config, mesh), trees[0], trees[1], trees[2]))
    found = spread(student, batch, teacher)
    assert_trees_close((found[0], found[3]), (expected[0], expected[3]), 1e-4)


@pytest.mark.parametrize("prefix", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("written", "labels"), SETTINGS)
def test_costs_are_those_of_the_compiled_step(written, labels, prefix):
    """FLOPs of the compiled gradients, of one layer and spans of one length, in one chunk, against the formula."""
    config = student_config(
        model__layers=1, model__width=64, model__mlp_width=256, model__vocabulary_size=512, objective__top_n=512,
        objective__chunk_rows=8 * 32, objective__written=written, objective__labels=labels, objective__k_min=4,
        objective__prefix_weight=prefix,
    )  # fmt: skip
    method = method_on(config)
    student, teacher = student_and_teacher(method)
    batch = packed_batch(config)
    compute = jax.jit(lambda trained, frozen: gradients(method, trained, batch, frozen)[3])
    flops = compute.lower(student, teacher).compile().cost_analysis()["flops"] / batch.tokens.size
    assert 0.9 < flops / method.costs().flops_per_token < 1.2


def test_the_mask_embedding_is_a_vector_and_not_decayed():
    mask = decay_mask(random_parameters(method_on(student_config()).model))
    assert mask["mask_embedding"] is False and mask["embedding"] is True


def test_lengths_grow_as_they_are_told():
    for k_max, expected in ((7, [2] * 10 + [4] * 10 + [7] * 20), (4, [2] * 20 + [4] * 20), (2, [2] * 40)):
        method = method_on(student_config(objective__k_max=k_max, objective__k_ramp=0.5, training__steps=40))
        assert [int(method._longest(jnp.int32(step))) for step in range(40)] == expected
    assert method_on(student_config(objective__k_max=7))._longest(jnp.int32(0)) == 7


@pytest.mark.parametrize(("written", "labels"), [("student", "data"), ("data", "teacher")])
def test_what_the_text_decides_is_counted_as_it_is_learned(written, labels):
    """Slots of texts that end, or that have a gap which is not learned, fall away after that, and out of the mean."""
    method = method_on(student_config(objective__written=written, objective__labels=labels))
    student, teacher = student_and_teacher(method)
    rows = rows_of(method.config, rows=((32,),) * 8)
    tokens = rows.tokens.at[:].set(50 + rows.tokens % 50).at[0, 12].set(END)
    rows = Batch(tokens, rows.segment_ids, rows.positions, jnp.ones_like(tokens, bool).at[1, 13:15].set(False))
    laid_out = method.lay_out(rows, 4, jnp.zeros(8, int))  # anchors 4, 9, 14 and 19
    done = method.exercise(student, None if labels == "data" else teacher, rows, laid_out)
    of_row = np.asarray(done.taught).reshape(8, 4, 4)
    of_text = labels == "data"
    assert of_row[0, :, 1].tolist() == [True, True, True, False]  # the third is the end: after it, nothing
    assert of_row[1, :, 1].tolist() == [True, True, True, not of_text]  # tokens 10, 11 and 12; the teacher goes on
    assert of_row[1, :, 2].all() and of_row[2].all()
    moved = method.lay_out(rows, 4, jnp.full(8, 3))  # anchors 1, 6, 11 and 16
    of_row = np.asarray(method.exercise(student, teacher, rows, moved).taught).reshape(8, 4, 4)
    assert of_row[1, :, 2].tolist() == [True, not of_text, False, False]  # token 12; 13 and 14 are nobody's to learn

    def spans_of(rows, context):
        return laid_out

    method.spans_of = spans_of
    assert float(method.count(rows, None)[0]) == float(done.taught.sum())


@pytest.mark.slow
def test_bfloat16_is_computed_in_and_learned_in_float32():
    method = method_on(student_config(model__dtype="bfloat16"))
    student, teacher = student_and_teacher(method)
    assert teacher["embedding"].dtype == jnp.bfloat16 and student["embedding"].dtype == jnp.float32
    wide = method_on(student_config())
    batch = packed_batch(method.config)
    loss, _, _, found = gradients(method, student, batch, teacher)
    expected, *_ = gradients(wide, student, batch, random_parameters(wide.teacher_model, seed=2))
    assert float(loss) == pytest.approx(float(expected), rel=0.03)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))


def trained(method, parameters, frozen, batch, steps=120):
    """The parameters after some steps on one batch."""
    optimizer = optax.adam(1e-2)

    @jax.jit
    def run(parameters):
        def step(carry, _):
            parameters, state = carry
            updates, state = optimizer.update(gradients(method, parameters, batch, frozen)[3], state)
            return (optax.apply_updates(parameters, updates), state), None

        return jax.lax.scan(step, (parameters, optimizer.init(parameters)), length=steps)[0][0]

    return run(parameters)


def test_data_alone_teach_a_mixed_pair(monkeypatch):
    """Texts that go on with "a b" (40 %), "c d" or "e d" (30 % each). By itself, the likeliest first token is a, and
    the likeliest second one d: "a d", which no text has. A teacher that reads the a says b."""
    a, b, c, d, e, begin = 11, 12, 13, 14, 15, [20, 21, 22, 23, 24, 25]
    sizes = {"training__sequence_length": 8, "training__batch_size": 10, "model__layers": 1}
    pairs = np.asarray([(a, b)] * 4 + [(c, d)] * 3 + [(e, d)] * 3)
    tokens = jnp.asarray(np.concatenate([np.tile(begin, (10, 1)), pairs], axis=1))
    rows = Batch(tokens, jnp.ones_like(tokens), jnp.tile(jnp.arange(8), (10, 1)))
    batch = with_micro_batches(rows, 1)
    reader = method_on(tiny_config(heads__num_heads=0, **sizes))
    teacher = trained(reader, random_parameters(reader.model, scale=0.3), None, batch)
    # Spans of two, each after the last "begin".
    monkeypatch.setattr(spans, "draw", lambda *_, **__: (jnp.int32(2), jnp.ones(10, int)))
    written = {}
    for labels in ("teacher", "data"):
        taught = {"objective__labels": labels, "objective__regions": 1, "objective__k_max": 2}
        method = method_on(student_config(**sizes, **taught))
        fresh = {**teacher, "mask_embedding": jnp.mean(teacher["embedding"], axis=0)}
        student = trained(method, fresh, method.frozen_of(teacher), batch)
        states = plain_states(method.model, student, [*begin, 300])
        written[labels] = choice(student, states[-2]), choice(student, states[-1])
    assert written == {"teacher": (a, b), "data": (a, d)}
