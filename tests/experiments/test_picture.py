"""The README's picture: all letters, in their places, and well-formed."""

import dataclasses
import pathlib
import xml.etree.ElementTree as tree

from experiments import picture
from experiments.picture import Piece, drawn, svg, wrapped
from mtpd_jax.evaluation.acceptance import Acceptance
from mtpd_jax.evaluation.generation import Generation, PlainRun

SPACE = "{http://www.w3.org/2000/svg}"


def test_lines_are_broken_at_spaces_and_hold_every_letter():
    words = " ".join(f"word{number}" for number in range(60))
    pieces = [Piece(words[:100]), Piece(words[100:101] + "\n"), Piece(words[101:], behind="#ffffff")]
    lines = wrapped(pieces)
    assert max(sum(len(piece.text) for piece in line) for line in lines) <= picture._COLUMNS
    assert "".join(piece.text for line in lines for piece in line) == words
    assert all(line[-1].text.endswith(" ") for line in lines[2:-1])
    assert wrapped([Piece("x" * 100)])[0][0].text == "x" * picture._COLUMNS  # where there is no space


class Opened:
    @staticmethod
    def text_after(prompt):
        return lambda ids: "".join("?a<b c"[one] for one in ids)


def test_what_is_drawn_is_what_was_written():
    """Drafts are marked; of plain decoding, what it had written in the same time is dark, and the rest is not."""
    plain = PlainRun((1, 2, 3, 4), seconds=4.0, tokens_per_second=1.0)
    found = Generation(
        "a<b ", (1, 2, 3, 4), (0, 1, 2, 0), 2, 1.5, 2.0, 2.0, Acceptance((1.0, 1.0), (1.0, 1.0)), True, "speculative",
        plain=plain, speedup=2.0, identical=True,
    )  # fmt: skip
    root = tree.fromstring(drawn(Opened, "c:", found))
    texts = [(one.text, one.get("fill")) for one in root.iter(f"{SPACE}text")]
    assert texts[0][0].startswith("with drafts: 4 tokens in 2 passes, 2 tokens/s")
    assert [text for text, _ in texts[1:5]] == ["c:", "a", "<", "b"]
    assert "2 of 4 tokens" in texts[5][0]
    assert texts[6:9] == [("c:", "#777777"), ("a<", "#1a1a1a"), ("b ", "#b5b5b5")]
    marked = [one.get("fill") for one in root.iter(f"{SPACE}rect")][1:]
    assert len(marked) == 4 and len(set(marked)) == 2 and marked[:2] == marked[2:]  # and in the legend
    half = dataclasses.replace(found, speedup=4.0)
    assert "1 of 4 tokens" in drawn(Opened, "c:", half)


def test_marks_stand_behind_their_letters():
    root = tree.fromstring(svg([("title", [Piece("ab"), Piece("cd", behind="#123456")])], []))
    (mark,) = [one for one in root.iter(f"{SPACE}rect") if one.get("fill") == "#123456"]
    (text,) = [one for one in root.iter(f"{SPACE}text") if one.text == "cd"]
    assert mark.get("x") == text.get("x") and mark.get("width") == text.get("textLength")


def test_the_picture_that_is_here_is_one():
    root = tree.parse(pathlib.Path(__file__).parents[2] / "docs" / "drafted.svg").getroot()
    assert "tokens/s" in "".join(one.text or "" for one in root.iter(f"{SPACE}text"))
