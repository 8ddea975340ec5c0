"""A continuation on a terminal: every token in the colour of who proposed it, and its figures below."""

from collections.abc import Iterable, Iterator, Sequence

import rich.console
import rich.table
import rich.text

from mtpd_jax.data.tokenizer import INCOMPLETE, Decode
from mtpd_jax.decoding.drafters.drafter import COPIED
from mtpd_jax.decoding.options import MASKS
from mtpd_jax.decoding.strategies.strategy import STRATEGIES
from mtpd_jax.evaluation.generation import Generation
from mtpd_jax.evaluation.report import new_table, percent

# The main head's, and what was copied; the heads take theirs in turn.
_MAIN_COLOUR, _COPIED_COLOUR = "default", "reverse"
_COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red")


def pieces(
    tokens: Sequence[int], proposers: Sequence[int], decode: Decode, begin: int = 0, final: bool = True
) -> Iterator[tuple[str, int, int]]:
    """The text of a continuation from a token on, cut where another proposes: text, proposer, and the token after it.

    A piece is what the text becomes longer by, so that characters that are split over several tokens come out whole,
    and spaces between words stay. A character belongs to who proposed its last token.

    Args:
      tokens, proposers: of the whole continuation.
      decode: see ``Tokenizer.text_after``.
      begin: the first token that was not shown yet.
      final: whether no more tokens come; else a character at the end that is not whole yet is kept back.
    """
    before = decode(tokens[:begin])
    for end in range(begin + 1, len(tokens) + 1):
        last = end == len(tokens)
        if not last and proposers[end] == proposers[end - 1]:
            continue
        text = decode(tokens[:end])
        if text.endswith(INCOMPLETE) and not (last and final):
            continue
        yield text[len(before) :], proposers[end - 1], end
        before = text


def show(console: rich.console.Console, prompt: str, generation: Generation, decode: Decode) -> None:
    """Prints prompt and continuation, coloured by proposer, and the table of figures below them."""
    text = rich.text.Text().append(prompt, style="dim")
    for piece, proposer, _ in pieces(generation.tokens, generation.proposers, decode):
        text.append(piece, style=_colour(proposer))
    # Without the stop string, which is among the tokens.
    console.print(text[: len(prompt) + len(generation.text)], soft_wrap=True)
    show_figures(console, generation)


def show_stream(
    console: rich.console.Console, prompt: str, generations: Iterable[Generation], decode: Decode
) -> Generation:
    """Prints a prompt, and its continuation as it is written; returns the whole, whose figures are not printed.

    Args:
      console, prompt, decode: see ``show``.
      generations: what there is, again and again; see ``generation.stream``.
    """
    parts = iter(generations)
    newest = next(parts)  # before anything is printed: what is said of compiling stands above
    console.print(rich.text.Text(prompt, style="dim"), end="", soft_wrap=True)
    printed = _Printed(console, decode)
    printed.show(newest, final=False)
    for newest in parts:
        printed.show(newest, final=False)
    printed.show(newest, final=True)
    console.print()
    return newest


class _Printed:
    """What was printed of a continuation, and what waits, for it may be of a stop string."""

    def __init__(self, console: rich.console.Console, decode: Decode):
        self._console, self._decode = console, decode
        self._cut, self._characters, self._waiting = 0, 0, rich.text.Text()

    def show(self, newest: Generation, final: bool) -> None:
        """Prints what is new of its text; ``final`` as in ``pieces``."""
        for piece, proposer, end in pieces(newest.tokens, newest.proposers, self._decode, self._cut, final):
            self._waiting.append(piece, style=_colour(proposer))
            self._cut = end
        ready = self._waiting[: max(0, len(newest.text) - self._characters)]
        self._console.print(ready, end="", soft_wrap=True)
        self._waiting = self._waiting[len(ready) :]
        self._characters += len(ready)


def show_figures(console: rich.console.Console, generation: Generation) -> None:
    """Prints who is which colour, and what the continuation took."""
    show_legend(console, generation)
    console.print(_table(generation))


def show_legend(console: rich.console.Console, generation: Generation) -> None:
    """Prints who is which colour, where somebody but the main head proposed."""
    if not generation.acceptance.conditional:
        return
    legend = rich.text.Text("proposed by: ").append("main head", style=_MAIN_COLOUR)
    for k in range(1, 1 + max(0, *generation.proposers)):
        legend.append("  ").append(proposer_name(generation.strategy, k), style=_colour(k))
    if COPIED in generation.proposers:
        legend.append("  ").append(proposer_name(generation.strategy, COPIED), style=_COPIED_COLOUR)
    console.print(legend)


def figures_line(generation: Generation) -> str:
    """The figures in one line."""
    passes = "" if generation.tokens_per_pass is None else f", {generation.tokens_per_pass:.2f} per pass"
    accepted = " ".join(percent(rate).removesuffix(" %") for rate in generation.acceptance.conditional)
    return (
        f"{len(generation.tokens)} tokens in {generation.passes} passes{passes}"
        + (f", accepted {accepted} %" if accepted else "")
        + f", {generation.tokens_per_second:,.0f} tokens/s"
        + ("" if generation.lossless else f", LOSSY: {_lossy(generation)}")
    )


def proposer_name(strategy: str, proposer: int) -> str:
    """Who proposed a token of what a strategy wrote."""
    if proposer <= 0:
        return "main head" if proposer != COPIED else "copied"
    masks = STRATEGIES[strategy].drafter_name == MASKS
    return f"slot {proposer + 1}" if masks else f"head {proposer}"


def _colour(proposer: int) -> str:
    if proposer <= 0:
        return _COPIED_COLOUR if proposer == COPIED else _MAIN_COLOUR
    return _COLOURS[(proposer - 1) % len(_COLOURS)]


def _table(generation: Generation) -> rich.table.Table:
    table = new_table("", ("figure", "value"), left=("figure", "value"), show_header=False)
    table.add_row("tokens / passes", f"{len(generation.tokens)} / {generation.passes}")
    if generation.tokens_per_pass is not None:
        table.add_row("tokens per pass", f"{generation.tokens_per_pass:.2f}")
    # Draft by draft.
    for k, rates in enumerate(zip(generation.acceptance.conditional, generation.acceptance.cumulative, strict=True), 1):
        table.add_row(f"draft {k}: accepted, cumulative", f"{percent(rates[0])}, {percent(rates[1])}")
    table.add_row("tokens/s", f"{generation.tokens_per_second:,.0f}")
    if generation.plain is not None:
        table.add_row("tokens/s, plain", f"{generation.plain.tokens_per_second:,.0f}")
        table.add_row("speed-up over plain", f"{generation.speedup:.2f}x")
    if generation.padded_plain is not None:
        table.add_row("tokens/s, plain, padded passes", f"{generation.padded_plain.tokens_per_second:,.0f}")
        table.add_row("speed-up over plain, padded", f"{generation.speedup_over_padded_plain:.2f}x")
    if not generation.lossless:
        table.add_row("LOSSY", _lossy(generation))
    if generation.identical is not None:
        table.add_row("identical to plain", "yes" if generation.identical else _explain(generation))
    return table


def _lossy(generation: Generation) -> str:
    return f"{generation.strategy} believes its guesses, and may write another text than plain"


def _explain(generation: Generation) -> str:
    divergence = generation.divergence
    if divergence is None:
        return "no"
    if not generation.lossless:
        return f"no: another text from token {divergence.index} on"
    kind = "a tie" if divergence.tie else "NOT A TIE: please report this"
    distance = "" if divergence.shortfall is None else f", {divergence.shortfall:.1e} under the largest logit"
    return f"no: token {divergence.index}{distance}, rounding {divergence.rounding:.1e} ({kind})"
