"""Continuing a prompt and showing who proposed which token."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import rich.console
import rich.table
import rich.text

from mtpd_jax.data.chat import Prompt, check_prompt
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.decoding.decoder import Continuation, Decoder
from mtpd_jax.decoding.drafters.drafter import COPIED
from mtpd_jax.decoding.options import MASKS, Options, check_seed
from mtpd_jax.decoding.stops import transitions_of
from mtpd_jax.decoding.strategies.strategy import STRATEGIES
from mtpd_jax.evaluation.acceptance import Acceptance, acceptance_of, tokens_per_pass
from mtpd_jax.evaluation.comparison import Divergence, first_divergence
from mtpd_jax.evaluation.decoding import PADDED_PLAIN, decode_prompts, ways_of
from mtpd_jax.evaluation.report import percent

# Main head first; then the heads, in turn; and what was copied.
_COLOURS = ("default", "green", "cyan", "magenta", "yellow", "blue", "red")
_COPIED_COLOUR = "reverse"
# The way of decoding that was asked for, beside its baselines.
_OWN = "own"


@dataclasses.dataclass(frozen=True)
class PlainRun:
    """The same prompt decoded plainly; ``seconds`` include prefill, as everywhere here."""

    tokens: tuple[int, ...]
    seconds: float
    tokens_per_second: float

    @classmethod
    def of(cls, continuation: Continuation) -> "PlainRun":
        """What is kept of a continuation."""
        return cls(continuation.tokens, continuation.seconds, len(continuation.tokens) / continuation.seconds)


@dataclasses.dataclass(frozen=True)
class Generation:
    """One continuation.

    Attributes:
      text: the continuation only, up to a stop string.
      tokens: its ids, those of the end token or stop string included if one was written.
      proposers: for each token, 0 for the main head, k for an accepted draft of head k, -1 for one out of the text.
      passes: verification passes, without prefill.
      tokens_per_pass: (tokens - the one from prefill) / passes; None without a pass.
      seconds, tokens_per_second: wall time with prefill, without compilation.
      acceptance: per draft of a round; with heads, draft k is that of head k.
      lossless: whether the text is plain decoding's, or distributed as it.
      strategy: that wrote it.
      plain: the same, decoded plainly, one token per pass; None unless it was asked for.
      speedup: tokens per second over plain's.
      padded_plain, speedup_over_padded_plain: the same at the width of the passes; None without ``bit_exact``.
      identical: whether plain decoding, at the width of the passes if that is shared, wrote the same tokens; None under
        sampling.
      divergence: where greedy decoding and that plain one part, if they do.
    """

    text: str
    tokens: tuple[int, ...]
    proposers: tuple[int, ...]
    passes: int
    tokens_per_pass: float | None
    seconds: float
    tokens_per_second: float
    acceptance: Acceptance[float | None]
    lossless: bool
    strategy: str
    plain: PlainRun | None = None
    speedup: float | None = None
    padded_plain: PlainRun | None = None
    speedup_over_padded_plain: float | None = None
    identical: bool | None = None
    divergence: Divergence | None = None

    @property
    def failed(self) -> bool:
        """Whether greedy text that should be plain decoding's differs from it by more than rounding explains."""
        return self.lossless and self.divergence is not None and not self.divergence.tie


def generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    options: Options,
    *,
    stop: Sequence[str] = (),
    batch_size: int = 1,
    seed: int = 0,
    compare: bool = False,
) -> list[Generation]:
    """Continues prompts.

    Args:
      decoder, tokenizer: of the run.
      prompts: token ids.
      options: how to decode.
      stop: strings that end a text, which is cut before them.
      batch_size: prompts that are decoded together.
      seed: of sampling; prompt number n draws from the key (seed, n), whatever the batch.
      compare: decode plainly, too.

    Raises:
      ValueError: bad prompt or option.
    """
    check_seed(seed)
    # What is looked for while writing.
    transitions = transitions_of(tokenizer.token_bytes(), stop) if stop else None
    # The text, and the baselines that were asked for.
    ways: dict[int | str, Options] = {_OWN: options}
    if compare:
        ways |= ways_of(options, [0])
    decoded = decode_prompts(decoder, prompts, ways, batch_size=batch_size, seed=seed, transitions=transitions)
    absent = [None] * len(prompts)
    by_prompt = zip(prompts, decoded[_OWN], *(decoded.get(name, absent) for name in (0, PADDED_PLAIN)), strict=True)
    return [_generation(decoder, tokenizer, options, stop, *of_prompt) for of_prompt in by_prompt]


def _generation(
    decoder: Decoder,
    tokenizer: Tokenizer,
    options: Options,
    stop: Sequence[str],
    prompt: np.ndarray,
    written: Continuation,
    plain: Continuation | None,
    padded: Continuation | None,
) -> Generation:
    """One continuation, beside plain decoding's if there is one."""
    generation = Generation(
        text=cut_before(tokenizer.decode(written.tokens), stop),
        tokens=written.tokens,
        proposers=written.proposers,
        passes=written.passes,
        tokens_per_pass=tokens_per_pass([written]).mean,
        seconds=written.seconds,
        tokens_per_second=len(written.tokens) / written.seconds,
        acceptance=acceptance_of([written]),
        lossless=STRATEGIES[options.strategy].lossless,
        strategy=options.strategy,
    )
    if plain is None:
        return generation
    # Greedy text has to be that of plain decoding at the same width of a pass.
    greedy, beside, rate = options.sampling.greedy, PlainRun.of(plain), generation.tokens_per_second
    beside_padded, same = None if padded is None else PlainRun.of(padded), padded or plain
    return dataclasses.replace(
        generation,
        plain=beside,
        speedup=rate / beside.tokens_per_second,
        padded_plain=beside_padded,
        speedup_over_padded_plain=rate / beside_padded.tokens_per_second if beside_padded else None,
        identical=same.tokens == written.tokens if greedy else None,
        divergence=first_divergence(decoder, prompt.tolist(), same, written) if greedy else None,
    )


def cut_before(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop strings in it."""
    return text[: min([place for string in stop if (place := text.find(string)) >= 0], default=len(text))]


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Checks that prompts are texts or conversations.

    Raises:
      ValueError: naming the prompt, and what in it is neither.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts = {prompts!r:.80}: expected a list of texts")
    for number, prompt in enumerate(prompts, 1):
        check_prompt(prompt, f"prompt {number}")


def check_texts(texts: Sequence[str]) -> None:
    """Checks that texts are some.

    Raises:
      ValueError: naming what is none.
    """
    check_prompts(texts)
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise ValueError(f"text {number} = {text!r:.80}: expected a text")


def show(
    console: rich.console.Console, prompt: str, generation: Generation, decode: Callable[[Sequence[int]], str]
) -> None:
    """Prints prompt and continuation, coloured by proposer, and the table of figures below them."""
    text = rich.text.Text().append(prompt, style="dim")
    # Tokens that share a colour are decoded together, so that characters split over several tokens come out whole.
    begin = 0
    proposers, tokens = generation.proposers, generation.tokens
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or proposers[end] != proposers[begin]:
            piece = decode(tokens[begin:end])
            text.append(piece, style=_colour(proposers[begin]))
            begin = end
    console.print(text, soft_wrap=True)
    # Who is which colour.
    if generation.acceptance.conditional:
        legend = rich.text.Text("main head", style=_COLOURS[0])
        masks = STRATEGIES[generation.strategy].drafter_name == MASKS
        for k in range(1, 1 + max(0, *proposers)):
            legend.append(f"  slot {k + 1}" if masks else f"  head {k}", style=_colour(k))
        if COPIED in proposers:
            legend.append("  ").append("copied", style=_COPIED_COLOUR)
        console.print(rich.text.Text("proposed by: ").append(legend))
    console.print(_table(generation))


def _colour(proposer: int) -> str:
    return _COPIED_COLOUR if proposer == COPIED else _COLOURS[proposer % len(_COLOURS)]


def _table(generation: Generation) -> rich.table.Table:
    table = rich.table.Table("", "", show_header=False)
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
        table.add_row(
            "lossless", f"no: {generation.strategy} believes its guesses, and may write another text than plain"
        )
    if generation.identical is not None:
        table.add_row("identical to plain", "yes" if generation.identical else _explain(generation))
    return table


def _explain(generation: Generation) -> str:
    divergence = generation.divergence
    if divergence is None:
        return "no"
    if not generation.lossless:
        return f"no: another text from token {divergence.index} on"
    kind = "a tie" if divergence.tie else "NOT A TIE: please report this"
    distance = "" if divergence.shortfall is None else f", {divergence.shortfall:.1e} under the largest logit"
    return f"no: token {divergence.index}{distance}, rounding {divergence.rounding:.1e} ({kind})"
