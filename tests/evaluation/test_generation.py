"""How continuations are shown."""

import dataclasses
import io

import rich.console

from mtpd_jax.decoding.decoder import Continuation
from mtpd_jax.decoding.options import Options
from mtpd_jax.evaluation import generation as generation_module
from mtpd_jax.evaluation.acceptance import Acceptance
from mtpd_jax.evaluation.comparison import Divergence
from mtpd_jax.evaluation.transcript import pieces, show, show_stream


def test_on_a_terminal_tokens_are_coloured_by_proposer():
    shown = printed(lossless=True, strategy="speculative")
    assert "\x1b[32mb\x1b[0m" in shown and "\x1b[32ma" not in shown  # green: head 1
    assert "head 1" in shown and "lossless" not in shown


def test_a_lossy_strategy_says_so_and_names_slots():
    parted = Divergence(index=1, margin=1.0, shortfall=2.0, rounding=0.0, tie=False)
    shown = printed(lossless=False, strategy="confident", identical=False, divergence=parted)
    assert "slot 2" in shown and "head 1" not in shown and "confident believes its guesses" in shown
    assert "another text from token 1 on" in shown and "report" not in shown
    assert not generation_of(lossless=False, strategy="confident", divergence=parted).failed
    safe = {"lossless": True, "strategy": "verified", "identical": False, "divergence": parted}
    assert generation_of(**safe).failed and "NOT A TIE" in printed(**safe)


def generation_of(text="abc", **fields):
    return generation_module.Generation(
        text, (1, 2, 3), (0, 1, 0), 1, 2.0, 1.0, 3.0, Acceptance((1.0,), (1.0,)), **fields
    )  # fmt: skip


def printed(**fields):
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    generation = generation_of(**fields)
    show(console, "prompt", generation, lambda ids: "".join("?abc"[token] for token in ids))
    return console.file.getvalue()


def test_pieces_are_whole_characters_and_keep_spaces():
    """A tokenizer whose texts are not those of its tokens one by one: half characters, a space."""
    parts = [b" a", "é".encode()[:1], "é".encode()[1:], b" b", b" "]

    def decode(ids):
        return b"".join(parts[one] for one in ids).decode(errors="replace").removeprefix(" ")

    tokens, proposers = (0, 1, 2, 3, 4), (0, 1, 0, 0, 2)
    assert list(pieces(tokens, proposers, decode)) == [("a", 0, 1), ("é b", 0, 4), (" ", 2, 5)]
    assert "".join(text for text, *_ in pieces(tokens, proposers, decode)) == decode(tokens)
    # What is shown already is not shown again; half a character waits, unless nothing comes any more.
    assert list(pieces(tokens[:2], proposers[:2], decode, begin=1, final=False)) == []
    assert list(pieces(tokens[:2], proposers[:2], decode, begin=1)) == [("\ufffd", 1, 2)]
    assert list(pieces(tokens, proposers, decode, begin=4)) == [(" ", 2, 5)]


def test_a_stream_shows_every_token_once():
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    whole = generation_of(lossless=True, strategy="speculative")
    parts = [
        dataclasses.replace(whole, text="xyz"[:n], tokens=(1, 2, 3)[:n], proposers=(0, 1, 0)[:n]) for n in (1, 1, 3)
    ]

    def decoded():
        console.print("compiling")
        yield from parts

    found = show_stream(console, "prompt", decoded(), lambda ids: "".join("?xyz"[token] for token in ids))
    assert found == parts[-1]
    compiling, shown = console.file.getvalue().split("\n", 1)
    assert compiling == "compiling" and "prompt" in shown  # and not into the line that is being written
    assert [shown.count(letter) for letter in "xyz"] == [1, 1, 1] and "\x1b[32my\x1b[0m" in shown


def test_a_stop_string_is_shown_nowhere():
    """Nor its beginning, while it may still come; what turns out to be none is."""
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    whole = generation_of(lossless=True, strategy="speculative")
    texts = [("a", 2), ("ab", 2), ("ab", 3)]  # before "c", of two tokens, then of three
    parts = [dataclasses.replace(whole, text=text, tokens=(1, 2, 3)[:n], proposers=(0, 1, 0)[:n]) for text, n in texts]
    seen = []

    def decoded():
        for part in parts:
            yield part
            seen.append(console.file.getvalue())

    show_stream(console, "prompt ", decoded(), lambda ids: "".join("?abc"[token] for token in ids))
    assert "b" not in seen[0] and seen[1].count("b") == 1 and "c" not in console.file.getvalue()
    shown = printed(lossless=True, strategy="speculative", text="ab").partition("\n")[0]
    assert "b" in shown and "c" not in shown


def test_what_may_become_a_stop_string_waits(monkeypatch):
    decoded = ["say", "say <", "say <en", "say <en>", "say <end>"]

    class Words:
        text_after = staticmethod(lambda prompt: lambda tokens: decoded[len(tokens) - 1])
        token_bytes = staticmethod(list)

    class Streamed:
        def stream(self, prompt, options, **_):
            for n in range(1, 6):
                yield Continuation(tuple(range(n)), (0,) * n, 1, (), (), 1.0)

    monkeypatch.setattr(generation_module, "transitions_of", lambda *_: None)
    found = [one.text for one in generation_module.stream(Streamed(), Words(), None, Options(0, 8), stop=["<end>"])]
    assert found == ["say", "say ", "say ", "say <en>", "say ", "say "]
    decoded[-1] = "say <en> <"
    *_, last = generation_module.stream(Streamed(), Words(), None, Options(0, 8), stop=["<end>"])
    assert last.text == "say <en> <"
