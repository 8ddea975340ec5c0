"""Where masks stand and what they see, against the layout as one would build it: region by region, token by token."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpd_jax.data.pipeline import Batch
from mtpd_jax.methods import spans
from tests.builders import packed_batch, tiny_config

END, MASK = 5, -7


def batch(rows=4, length=32, supervised=None, **documents):
    config = tiny_config(training__batch_size=rows, training__sequence_length=length)
    packed = jax.tree.map(lambda array: array[0], packed_batch(config, **documents))
    return Batch(packed.tokens % 40, packed.segment_ids, packed.positions, supervised)


def emulated(rows, row, k, offset, regions):
    """The slots of one row, written down from left to right: (token, segment, position, region, j or 0, anchor)."""
    length = rows.tokens.shape[1]
    size, slots, text = length // regions, [], 0
    for region in range(regions + 1):
        for place in range(size):
            if place < size - k + 1:
                if (region or place >= offset) and len(slots) < length:
                    one = int(rows.tokens[row, text]), int(rows.segment_ids[row, text]), int(rows.positions[row, text])
                    slots.append((*one, region, int(place == size - k), text))
                    text += 1
            else:
                j = place - (size - k) + 1
                _, segment, position, _, _, anchor = slots[-(j - 1)]
                slots.append((MASK, segment, position + j - 1, region, j, anchor))
    return slots[:length]


def sees(slots, query, key):
    same_document = slots[query][1] == slots[key][1]
    text_or_own = slots[key][0] != MASK or slots[key][3] == slots[query][3]
    return key <= query and same_document and text_or_own


@pytest.mark.parametrize(("regions", "k_max"), [(2, 8), (4, 4), (4, 7), (1, 16)])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 8])
def test_the_formula_writes_what_hands_would(regions, k_max, k):
    if k > k_max:
        pytest.skip("longer than the longest")
    rows = batch()
    lay_out = jax.jit(lambda k, offsets: spans.lay_out(rows, k, offsets, regions=regions, k_max=k_max, end_ids=(END,)))
    last = 32 // regions - k
    found = lay_out(jnp.int32(k), jnp.asarray([0, last, last // 2, min(1, last)]))
    tokens = np.asarray(found.tokens(rows.tokens, MASK))
    for row, offset in enumerate([0, last, last // 2, min(1, last)]):
        slots = emulated(rows, row, k, offset, regions)
        assert [slot[0] for slot in slots] == tokens[row].tolist()
        assert [slot[1] for slot in slots] == found.segment_ids[row].tolist()
        assert [slot[2] for slot in slots] == found.positions[row].tolist()
        mask = [[sees(slots, query, key) for key in range(32)] for query in range(32)]
        np.testing.assert_array_equal(found.sees[row], mask)
        # Slot j of every region, j-major; and each of them is one that there is.
        where = {(slot[4], slot[3]): place for place, slot in enumerate(slots) if slot[4]}
        places = np.asarray(found.slots[row]).reshape(k_max, regions)
        assert len(where) == k * regions
        assert all(places[j - 1, region] == place for (j, region), place in where.items())
        there = np.asarray(found.there[row]).reshape(k_max, regions)
        assert not there[k:].any()
        for region in range(regions):
            anchor = slots[where[1, region]]
            assert there[:k, region].tolist() == [anchor[1] != 0 and anchor[0] != END] * k
            assert bool(found.is_anchor[row, where[1, region]])
    assert np.asarray(found.is_anchor).sum() == 4 * regions


def test_a_worked_example():
    """S = 12, M = 2, k = 3: the picture of the module."""
    tokens = jnp.arange(12)[None]
    rows = Batch(tokens, jnp.ones_like(tokens), tokens)
    found = spans.lay_out(rows, jnp.int32(3), jnp.zeros(1, int), regions=2, k_max=3, end_ids=())
    assert found.tokens(tokens, 99)[0].tolist() == [0, 1, 2, 3, 99, 99, 4, 5, 6, 7, 99, 99]
    assert found.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9]
    assert found.slots[0].tolist() == [3, 9, 4, 10, 5, 11]
    drawn = ["".join("x" if seen else "." for seen in row) for row in found.sees[0]]
    assert drawn[5] == "xxxxxx......" and drawn[6] == "xxxx..x....." and drawn[11] == "xxxx..xxxxxx"
    moved = spans.lay_out(rows, jnp.int32(3), jnp.full(1, 2), regions=2, k_max=3, end_ids=())
    assert moved.tokens(tokens, 99)[0].tolist() == [0, 1, 99, 99, 2, 3, 4, 5, 99, 99, 6, 7]
    assert moved.positions[0].tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 6, 7]


def test_what_slots_chose_is_read_in_the_slot_after():
    rows = batch(rows=2)
    rows = Batch(rows.tokens.at[0, 11].set(99), rows.segment_ids, rows.positions)  # an anchor that ends a document
    found = spans.lay_out(rows, jnp.int32(3), jnp.asarray([0, 2]), regions=4, k_max=5, end_ids=(99,))
    choices = jnp.arange(2 * 20).reshape(2, 20) + 100
    written = np.asarray(found.written(found.tokens(rows.tokens, MASK), choices, 5))
    before = np.asarray(found.tokens(rows.tokens, MASK))
    by_slot, places = np.asarray(choices).reshape(2, 5, 4), np.asarray(found.slots).reshape(2, 5, 4)
    there = np.asarray(found.there).reshape(2, 5, 4)
    assert (written[before != MASK] == before[before != MASK]).all()
    assert there[:, 1].sum() == 7
    for row, j, region in itertools.product(range(2), (1, 2), range(4)):
        expected = by_slot[row, j - 1, region] if there[row, j, region] else MASK
        assert written[row, places[row, j, region]] == expected


def test_what_the_text_has_there():
    """Of every slot the token j places after its anchor, as long as the document goes on, without a gap that is not
    learned; and of the text before."""
    supervised = jnp.asarray(np.random.default_rng(0).random((4, 32)) < 0.7)
    rows = batch(supervised=supervised)
    k, k_max, regions, offsets = 3, 4, 4, [0, 2, 5, 1]
    found = spans.lay_out(rows, jnp.int32(k), jnp.asarray(offsets), regions=regions, k_max=k_max, end_ids=())
    tokens, inside = spans.following(rows, found, regions, k_max)
    next_tokens, told = spans.prefix(rows, found)
    for row, offset in enumerate(offsets):
        slots = emulated(rows, row, k, offset, regions)

        def follows(anchor, ahead, row=row):
            place = anchor + ahead
            same = place < 32 and rows.segment_ids[row, place] == rows.segment_ids[row, anchor] != 0
            return (int(rows.tokens[row, place]) if same else None), bool(same and supervised[row, place])

        anchors = [slot[5] for slot in slots if slot[4] == 1]
        by_slot = np.asarray(tokens[row]).reshape(k_max, regions), np.asarray(inside[row]).reshape(k_max, regions)
        for j, region in itertools.product(range(1, k_max + 1), range(regions)):
            token, _ = follows(anchors[region], j)
            learned = all(follows(anchors[region], ahead)[1] for ahead in range(1, j + 1))
            padding = rows.segment_ids[row, anchors[region]] == 0
            assert padding or by_slot[1][j - 1, region] == learned
            assert not learned or by_slot[0][j - 1, region] == token
        for place, slot in enumerate(slots):
            token, learned = follows(slot[5], 1)
            assert bool(told[row, place]) == (learned and slot[4] == 0)
            assert not told[row, place] or next_tokens[row, place] == token


def test_what_may_not_be_learned_is_no_span():
    """The span after a prompt's last token is; that within the prompt is not; a text cut here goes on as it was."""
    supervised = jnp.zeros((1, 32), bool).at[0, 15:].set(True)
    tokens = jnp.arange(1, 33)[None]
    rows = Batch(tokens, jnp.ones_like(tokens), jnp.arange(32)[None], supervised)
    found = spans.lay_out(rows, jnp.int32(2), jnp.zeros(1, int), regions=4, k_max=2, end_ids=())
    assert found.source[0][found.slots[0][:4]].tolist() == [6, 13, 20, 27]
    assert found.there[0].reshape(2, 4).tolist() == [[False, False, True, True]] * 2
    nearer = spans.lay_out(rows, jnp.int32(2), jnp.full(1, 6), regions=4, k_max=2, end_ids=())
    assert nearer.source[0][nearer.slots[0][:4]].tolist() == [0, 7, 14, 21]
    assert nearer.there[0].reshape(2, 4).tolist() == [[False, False, True, True]] * 2
    last = spans.lay_out(rows, jnp.int32(1), jnp.zeros(1, int), regions=1, k_max=2, end_ids=())
    assert last.source[0][last.slots[0][:1]].tolist() == [31] and last.there[0].tolist() == [True, False]


def test_nothing_is_learned_after_an_end():
    choices = jnp.asarray([[1, END, 3, 4, 2, 9, END, 1, 8]])  # three slots of three spans
    found = spans.before_the_end(choices, 3, (END, 9)).reshape(3, 3)
    assert found.tolist() == [[True] * 3, [True, False, True], [True, False, False]]


def test_lengths_and_offsets_are_uniform_and_independent():
    keys = jax.vmap(jax.random.key)(jnp.arange(3000))

    def drawn(key):
        return spans.draw(key, jax.random.split(key, 2), size=16, k_min=2, k_max=5)

    k, offsets = jax.vmap(drawn)(keys)
    k, offsets = np.asarray(k), np.asarray(offsets)
    assert sorted(set(k.tolist())) == [2, 3, 4, 5] and np.bincount(k)[2:].min() > 650
    for length in range(2, 6):
        own = offsets[k == length]
        assert own.min() == 0 and own.max() == 16 - length
        assert abs(own.mean() - (16 - length) / 2) < 0.35
    assert abs(np.corrcoef(offsets[k == 3].T)[0, 1]) < 0.1
