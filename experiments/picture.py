"""The README's picture: a text as it was written with drafts, and how far plain decoding came in the same time.

``python -m experiments.picture --workdir=DIR --prompt=TEXT --output=FILE.svg`` decodes both ways in turn, a few times,
and draws the turn whose speed-up is the median.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from xml.sax.saxutils import escape

from mtpd_jax import frontdoor
from mtpd_jax.evaluation.generation import Generation
from mtpd_jax.evaluation.page import colour_of
from mtpd_jax.evaluation.report import write_file
from mtpd_jax.evaluation.transcript import pieces, proposer_name
from mtpd_jax.run import Run, open_run

TURNS = 5
_COLUMNS, _CHARACTER, _LINE, _MARGIN = 84, 8.4, 22, 24
_GREY, _DARK = "#b5b5b5", "#1a1a1a"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a line: its text, its colour, and what stands behind it (empty: nothing)."""

    text: str
    colour: str = _DARK
    behind: str = ""


def wrapped(text: Sequence[Piece]) -> list[list[Piece]]:
    """Lines of at most so many columns, broken at spaces and where the text breaks them itself."""
    characters = [(letter, piece) for piece in text for letter in piece.text]
    lines, begin = [], 0
    while begin < len(characters):
        end, rest = begin + _COLUMNS, characters[begin : begin + _COLUMNS]
        breaks = [place for place, (letter, _) in enumerate(rest) if letter == "\n"]
        if breaks:
            end = begin + breaks[0] + 1
        elif begin + _COLUMNS < len(characters):
            spaces = [place for place, (letter, _) in enumerate(rest) if letter == " "]
            end = begin + (spaces[-1] + 1 if spaces else _COLUMNS)
        lines.append(_joined(characters[begin:end]))
        begin = end
    return lines


def _joined(characters: Sequence[tuple[str, Piece]]) -> list[Piece]:
    """A line's letters, those of one piece together."""
    found: list[tuple[str, Piece]] = []
    for letter, piece in characters:
        if letter == "\n":
            continue
        if found and found[-1][1] is piece:
            found[-1] = found[-1][0] + letter, piece
        else:
            found.append((letter, piece))
    return [dataclasses.replace(piece, text=text) for text, piece in found]


def svg(blocks: Sequence[tuple[str, Sequence[Piece]]], legend: Sequence[Piece]) -> str:
    """Blocks of text, each under its heading, and a legend, as an SVG whose letters keep their places in any font."""
    width, y, parts = _COLUMNS * _CHARACTER + 2 * _MARGIN, float(_MARGIN), []
    for heading, text in blocks:
        y += 10
        parts.append(f'<text x="{_MARGIN}" y="{y}" font-size="15" font-weight="bold" fill="{_DARK}">{heading}</text>')
        y += 10
        for line in wrapped(text):
            y += _LINE
            parts += _line(line, y)
        y += 30
    parts += _line(legend, y)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {y + _MARGIN:g}" role="img" '
        f'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14">\n'
        f'<rect width="100%" height="100%" rx="8" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _line(line: Sequence[Piece], y: float) -> list[str]:
    parts, column = [], 0
    for piece in line:
        x, width = _MARGIN + column * _CHARACTER, len(piece.text) * _CHARACTER
        if piece.behind:
            parts.append(
                f'<rect x="{x:.1f}" y="{y - 15:.1f}" width="{width:.1f}" height="20" rx="3" fill="{piece.behind}"/>'
            )
        if piece.text.strip():
            parts.append(
                f'<text x="{x:.1f}" y="{y:.1f}" textLength="{width:.1f}" xml:space="preserve" fill="{piece.colour}">'
                f"{escape(piece.text)}</text>"
            )
        column += len(piece.text)
    return parts


def drawn(opened: Run, prompt: str, found: Generation) -> str:
    """The picture of a continuation that was compared with plain decoding's."""
    assert found.plain is not None and found.speedup is not None  # it was compared
    decode = opened.text_after(prompt)
    text = [Piece(prompt, "#777777")]
    for piece, proposer, _ in pieces(found.tokens, found.proposers, decode):
        text.append(Piece(piece, behind=colour_of(proposer)))
    # What plain decoding had written when that was finished, and what was still to come.
    done = round(len(found.plain.tokens) / found.speedup)
    before, whole = decode(found.plain.tokens[:done]), decode(found.plain.tokens)
    plain = [Piece(prompt, "#777777"), Piece(before), Piece(whole[len(before) :], _GREY)]
    headings = (
        f"with drafts: {len(found.tokens)} tokens in {found.passes} passes, {found.tokens_per_second:,.0f} tokens/s",
        f"plain decoding after the same time: {done} of {len(found.plain.tokens)} tokens, one per pass, "
        f"{found.plain.tokens_per_second:,.0f} tokens/s",
    )
    legend = [Piece("proposed by: main head  ")]
    for proposer in range(1, 1 + max(found.proposers)):
        legend += [Piece(proposer_name(found.strategy, proposer), behind=colour_of(proposer)), Piece("  ")]
    return svg(list(zip(headings, (text, plain), strict=True)), legend)


def main() -> int:
    """Parses the flags, decodes, draws."""
    parser = frontdoor.Parser(prog="python -m experiments.picture", description=__doc__)
    parser.add_argument("--workdir", required=True, help="of a trained run")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--heads", type=int, help="drafts per pass (default: all)")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="(default: 128)")
    parser.add_argument("--output", required=True, help="the picture's file")
    flags = parser.parse_args()
    frontdoor.check_output_path(flags.output, "--output")
    opened = open_run(flags.workdir)
    options = {"heads": flags.heads, "max_new_tokens": flags.max_new_tokens, "compare": True}
    turns = [opened.generate([flags.prompt], **options)[0] for _ in range(TURNS)]
    median = statistics.median_low(turn.speedup or 0.0 for turn in turns)
    found = next(turn for turn in turns if turn.speedup == median)
    write_file(flags.output, drawn(opened, flags.prompt, found), "--output")
    print(f"{flags.output}: {found.speedup:.2f} times plain decoding, identical: {found.identical}")
    return int(found.failed)


if __name__ == "__main__":
    frontdoor.guarded(main)
