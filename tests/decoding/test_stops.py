"""What ends a text: several end tokens, and stop strings wherever they begin and end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.decoding.decoder import Continuation, Decoder
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.stops import Stops, transitions_of
from mtpd_jax.evaluation.generation import cut_before
from mtpd_jax.evaluation.samples import Sample
from tests.decoding.models import PROMPTS, small_vocabulary

PIECES = [b"", b"a", b"b", b"ab", b"ba", b"aab", b"c", "ß".encode()[:1], "ß".encode()[1:], b"abcabc"]


def first_match(tokens, strings):
    """The number of tokens after which the text first holds one of the strings; None if it never does."""
    for count in range(1, len(tokens) + 1):
        text = b"".join(PIECES[token] for token in tokens[:count])
        if any(string.encode() in text for string in strings):
            return count
    return None


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=14),
    st.lists(st.text("abcß", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_strings_are_found_where_they_end(tokens, strings):
    """Against searching the whole text after every token, over tokens of several bytes and of half a character."""
    stops = Stops((), jnp.asarray(transitions_of(PIECES, strings)))
    ends, _ = stops.find(jnp.asarray(tokens)[None], jnp.zeros(1, jnp.int32))
    expected = first_match(tokens, strings)
    assert bool(ends.any()) == (expected is not None)
    if expected is not None:
        assert int(jnp.argmax(ends[0])) == expected - 1
        # In two pieces: the state is all that has to be kept.
        half = expected // 2
        if half:
            _, states = stops.find(jnp.asarray(tokens[:half])[None], jnp.zeros(1, jnp.int32))
            ends, _ = stops.find(jnp.asarray(tokens[half:])[None], states[:, -1])
            assert int(jnp.argmax(ends[0])) == expected - half - 1


@pytest.mark.parametrize("stop", ["", "x" * 2000])
def test_bad_strings_are_refused(stop):
    with pytest.raises(ValueError, match="stop"):
        transitions_of(PIECES, [stop])


@pytest.mark.parametrize("drafter", [pytest.param("heads", marks=pytest.mark.slow), "lookup"])
def test_any_of_the_end_tokens_ends_a_text(drafter):
    model, parameters = small_vocabulary()
    plain = Decoder(model, parameters, [-1]).run(PROMPTS, Options(0, 30))
    for end_ids in ([0, 3], [5, 3, 1]):
        found = Decoder(model, parameters, end_ids).run(PROMPTS, Options(4, 30, drafter=drafter))
        for one, whole in zip(found, plain, strict=True):
            ends = [place for place, token in enumerate(whole.tokens) if token in end_ids]
            assert one.tokens == whole.tokens[: ends[0] + 1 if ends else None]


@pytest.mark.parametrize("options", [Options(0, 40), Options(4, 40), Options(3, 40, drafter="both")], ids=str)
def test_decoding_ends_with_the_token_that_completes_a_string(options):
    """Inside of a block of drafts as well; and what came before it is what would have been written anyway."""
    model, parameters = small_vocabulary()
    pieces = [b"", b"x", b"y", b"xy", b"z", b"yz", b"zx"]
    decoder, ends = Decoder(model, parameters, [-1]), []
    plain = decoder.run(PROMPTS, Options(0, 40))
    for strings in (["zxy"], ["yzy", "xx"], ["zzzzzzzzzzz"]):
        found = decoder.run(PROMPTS, options, transitions=transitions_of(pieces, strings))
        for one, whole in zip(found, plain, strict=True):
            written = [b"".join(pieces[token] for token in whole.tokens[:n]).decode() for n in range(41)]
            count = next((n for n, text in enumerate(written) if any(string in text for string in strings)), 40)
            assert one.tokens == whole.tokens[:count]
            ends.append(count)
            if options.num_drafts:
                assert all(0 <= a <= t for a, t in zip(one.accepted, one.tried, strict=True))
    assert len(set(ends)) > 4 and 40 in ends


def test_text_is_cut_before_the_first_string():
    assert cut_before("one two three", ["three", " two"]) == "one"
    assert cut_before("one two three", ["four"]) == "one two three"
    assert cut_before("one", []) == "one"


def test_bytes_of_tokens_are_what_they_write():
    """Of a byte-level tokenizer: every text's bytes, half characters included; special tokens write nothing."""
    tokenizer = Tokenizer.train(["the cat saß on the mat; naïve 🐈"] * 9, 320, "<|endoftext|>", 10_000)
    pieces = tokenizer.token_bytes()
    for text in ("a saß 🐈🐈 mat\n\t", "\x00\x7f", " the  cat"):
        assert b"".join(pieces[token] for token in tokenizer.encode(text)) == text.encode()
    assert pieces[tokenizer.end_id] == b"" and any(len(piece) > 2 for piece in pieces)


def test_bytes_of_a_sentencepiece_tokenizer():
    """A mark stands for a space, <0x0A> for a byte."""
    names = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a"]
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE({name: id for id, name in enumerate(names)}, [("\u2581", "a")], byte_fallback=True)
    )
    decoders = tokenizers.decoders
    library.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(library, "<s>")
    pieces = tokenizer.token_bytes()
    assert pieces[names.index("\u2581a")] == b" a" and pieces[names.index("<0x0A>")] == b"\n" and pieces[1] == b""
    text = "aß"
    assert b"".join(pieces[token] for token in tokenizer.encode(text)) == text.encode()
    library.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="the run's has the decoders WordPiece"):
        Tokenizer(library, "<s>").token_bytes()


def sentencepiece(names, merges):
    """As Llama 2's: a mark stands for a space, and one at the beginning of a text is dropped."""
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE({name: id for id, name in enumerate(names)}, merges, byte_fallback=True)
    )
    decoders = tokenizers.decoders
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<s>"])
    return Tokenizer(library, "<s>")


def test_a_space_between_prompt_and_continuation_stays():
    """Where the prompt ends with a text; a text of its own begins without one. And a stop string may begin with it."""
    names = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a"]
    tokenizer = sentencepiece(names, [("\u2581", "a")])
    a, word = names.index("a"), names.index("\u2581a")
    half = [1 + byte for byte in "\u00df".encode()][:1]
    for prompt, expected in (([0, word], " aa"), ([0], "aa"), ([0, word, 0], " aa"), ([0, *half], "aa")):
        assert tokenizer.text_after(np.array(prompt))([word, a]) == expected
    written, decode = (
        Continuation((word, a, word), (0, 1, 0), 2, (), (), 1.0),
        tokenizer.text_after(np.array([word])),
    )
    for stop, text in (((), " aa a"), (("a ",), " a"), ((" a",), "")):
        shown = Sample.of("a", "1", "speculative", written, decode, stop).pieces
        assert "".join(piece for piece, _ in shown) == text


def test_a_string_may_span_what_a_round_writes():
    """The state goes from round to round, row by row."""
    model, parameters = small_vocabulary()
    pieces = [bytes([97 + token]) for token in range(7)]
    decoder = Decoder(model, parameters, [-1])
    whole = decoder.run(PROMPTS, Options(0, 40))[1].tokens
    wanted = b"".join(pieces[token] for token in whole[11:17]).decode()
    first = b"".join(pieces[token] for token in whole).decode().index(wanted) + len(wanted)
    table = transitions_of(pieces, [wanted])
    for drafts in (0, 1, 4):
        assert decoder.run(PROMPTS, Options(drafts, 40), transitions=table)[1].tokens == whole[:first]
    assert jax.tree.leaves(Stops((0,))) == [] and np.asarray(table).dtype == np.int32
