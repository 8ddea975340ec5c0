"""Continuing a prompt and showing who proposed which token."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import rich.console
import rich.table
import rich.text

from mtpd_jax.data.files import check_text
from mtpd_jax.decoding.decoder import Continuation, Decoder
from mtpd_jax.decoding.options import Options, check_seed
from mtpd_jax.decoding.sampling import GREEDY, Sampling
from mtpd_jax.evaluation.acceptance import Acceptance, acceptance_of, tokens_per_pass
from mtpd_jax.evaluation.comparison import Divergence, first_divergence
from mtpd_jax.evaluation.report import percent
from mtpd_jax.training.restore import TrainedRun

# Main head first; then the heads, in turn.
_COLOURS = ("default", "green", "cyan", "magenta", "yellow", "blue", "red")


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
      text: the continuation only.
      tokens: its ids, the end token included if one was written.
      proposers: for each token, 0 for the main head, k for an accepted draft of head k.
      passes: verification passes, without prefill.
      tokens_per_pass: (tokens - the one from prefill) / passes; None without a pass.
      seconds, tokens_per_second: wall time with prefill, without compilation.
      acceptance: per head.
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
    plain: PlainRun | None = None
    speedup: float | None = None
    padded_plain: PlainRun | None = None
    speedup_over_padded_plain: float | None = None
    identical: bool | None = None
    divergence: Divergence | None = None


def generate(
    trained: TrainedRun,
    prompts: Sequence[str],
    options: Options,
    *,
    seed: int,
    compare: bool,
) -> list[Generation]:
    """Continues prompts, one after the other, with a run that is already open.

    Args:
      trained: the run.
      prompts: texts, none of them empty.
      options: how to decode.
      seed: of sampling.
      compare: decode plainly, too.

    Raises:
      ValueError: bad prompt or option.
    """
    check_seed(seed)
    check_prompts(prompts)
    decoder = decoder_of(trained)
    encoded = [trained.tokenizer.encode(prompt) for prompt in prompts]
    decoder.check(encoded, options, batch_size=1)
    return [_generate(trained, decoder, ids, options, seed, compare, row) for row, ids in enumerate(encoded)]


def check_prompts(prompts: Sequence[str]) -> None:
    """Checks that prompts are texts.

    Raises:
      ValueError: naming the prompt, and what in it is no text.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts = {prompts!r:.80}: expected a list of texts")
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {number} = {prompt!r:.80}: expected a text")
        check_text(prompt, f"prompt {number}")


def options_for(
    trained: TrainedRun,
    heads: int | None,
    max_new_tokens: int,
    sampling: Sampling | None,
    min_confidence: float,
    bit_exact: bool,
) -> Options:
    """The options for one number of heads: None for all that the run has; one pass width for all if ``bit_exact``.

    Raises:
      ValueError: an option is out of range.
    """
    heads = trained.config.heads.num_heads if heads is None else heads
    options = Options(heads, max_new_tokens, GREEDY if sampling is None else sampling, min_confidence)
    options.validate(trained.config.heads.num_heads)
    return options.sharing_width(heads) if bit_exact else options


def decoder_of(trained: TrainedRun) -> Decoder:
    """A decoder for an open run; its context is the length of the run's training sequences."""
    context = trained.config.training.sequence_length
    return Decoder(trained.model, trained.parameters, trained.tokenizer.end_id, context)


def _generate(
    trained: TrainedRun,
    decoder: Decoder,
    ids: np.ndarray,
    options: Options,
    seed: int,
    compare: bool,
    row: int,
) -> Generation:
    continuation = decoder.run([ids], options, seed=seed, first_row=row)[0]
    generation = Generation(
        text=trained.tokenizer.decode(continuation.tokens),
        tokens=continuation.tokens,
        proposers=continuation.proposers,
        passes=continuation.passes,
        tokens_per_pass=tokens_per_pass([continuation]).mean,
        seconds=continuation.seconds,
        tokens_per_second=len(continuation.tokens) / continuation.seconds,
        acceptance=acceptance_of([continuation]),
    )
    if not compare:
        return generation
    same = plain = decoder.run([ids], options.fastest_plain, seed=seed, first_row=row)[0]
    padded = None
    if options.pass_width is not None:
        same = decoder.run([ids], options.with_heads(0), seed=seed, first_row=row)[0]
        padded = PlainRun.of(same)
    greedy, beside, rate = options.sampling.greedy, PlainRun.of(plain), generation.tokens_per_second
    return dataclasses.replace(
        generation,
        plain=beside,
        speedup=rate / beside.tokens_per_second,
        padded_plain=padded,
        speedup_over_padded_plain=rate / padded.tokens_per_second if padded else None,
        identical=same.tokens == continuation.tokens if greedy else None,
        divergence=first_divergence(decoder, ids.tolist(), same, continuation) if greedy else None,
    )


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
            text.append(piece, style=_COLOURS[proposers[begin] % len(_COLOURS)])
            begin = end
    console.print(text, soft_wrap=True)
    if generation.acceptance.conditional:
        legend = rich.text.Text("main head", style=_COLOURS[0])
        for k in range(1, len(generation.acceptance.conditional) + 1):
            legend.append(f"  head {k}", style=_COLOURS[k % len(_COLOURS)])
        console.print(rich.text.Text("proposed by: ").append(legend))
    console.print(_table(generation))


def _table(generation: Generation) -> rich.table.Table:
    table = rich.table.Table("", "", show_header=False)
    table.add_row("tokens / passes", f"{len(generation.tokens)} / {generation.passes}")
    if generation.tokens_per_pass is not None:
        table.add_row("tokens per pass", f"{generation.tokens_per_pass:.2f}")
    for k, rates in enumerate(zip(generation.acceptance.conditional, generation.acceptance.cumulative, strict=True), 1):
        table.add_row(f"head {k}: accepted, cumulative", f"{percent(rates[0])}, {percent(rates[1])}")
    table.add_row("tokens/s", f"{generation.tokens_per_second:,.0f}")
    if generation.plain is not None:
        table.add_row("tokens/s, plain", f"{generation.plain.tokens_per_second:,.0f}")
        table.add_row("speed-up over plain", f"{generation.speedup:.2f}x")
    if generation.padded_plain is not None:
        table.add_row("tokens/s, plain, padded passes", f"{generation.padded_plain.tokens_per_second:,.0f}")
        table.add_row("speed-up over plain, padded", f"{generation.speedup_over_padded_plain:.2f}x")
    if generation.identical is not None:
        table.add_row("identical to plain", "yes" if generation.identical else _explain(generation.divergence))
    return table


def _explain(divergence: Divergence | None) -> str:
    if divergence is None:
        return "no"
    kind = "a tie" if divergence.tie else "NOT A TIE: please report this"
    distance = "" if divergence.shortfall is None else f", {divergence.shortfall:.1e} under the largest logit"
    return f"no: token {divergence.index}{distance}, rounding {divergence.rounding:.1e} ({kind})"
