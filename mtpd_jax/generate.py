"""Continues a prompt: ``python -m mtpd_jax.generate --workdir=DIR --prompt=TEXT [--compare] …``.

On a terminal every token is coloured by who proposed it: the main head, or head 1…K, whose draft was accepted. Greedy
text that differs from plain decoding's by more than a tie exits with status 1.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import rich.console
import rich.table
import rich.text

from mtpd_jax import frontdoor
from mtpd_jax.decoding.decoder import Continuation, Decoder
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.evaluation.acceptance import Acceptance, acceptance_of, tokens_per_pass
from mtpd_jax.evaluation.comparison import Divergence, first_divergence
from mtpd_jax.evaluation.report import percent, write_json
from mtpd_jax.training.restore import TrainedRun, open_run

# Main head first; then the heads, in turn.
_COLOURS = ("default", "green", "cyan", "magenta", "yellow", "blue", "red")


@dataclasses.dataclass(frozen=True)
class PlainRun:
    """The same prompt decoded plainly; ``seconds`` include prefill, as everywhere here."""

    tokens: tuple[int, ...]
    seconds: float
    tokens_per_second: float


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
      plain: the same, decoded plainly; None unless it was asked for.
      speedup: tokens per second over plain's.
      identical: whether both wrote the same tokens; None under sampling.
      divergence: where greedy decoding and plain part, if they do.
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
    identical: bool | None = None
    divergence: Divergence | None = None


def run(
    workdir: str,
    prompts: Sequence[str],
    *,
    heads: int | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int = 0,
    compare: bool = False,
) -> list[Generation]:
    """Continues prompts, one after the other, with the newest checkpoint of a workdir.

    Args:
      workdir: of a trained run.
      prompts: texts, none of them empty.
      heads: drafts per round; 0 for plain decoding, None for all heads.
      max_new_tokens: per prompt.
      sampling: None is greedy.
      seed: of sampling.
      compare: decode plainly, too.

    Raises:
      ValueError: bad workdir, prompt or option.
    """
    return generate(
        open_run(workdir), prompts, heads=heads, max_new_tokens=max_new_tokens, sampling=sampling or Sampling(),
        seed=seed, compare=compare,
    )  # fmt: skip


def generate(
    trained: TrainedRun,
    prompts: Sequence[str],
    *,
    heads: int | None,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    compare: bool,
) -> list[Generation]:
    """As ``run``, with a run that is already open."""
    decoder = Decoder(trained.model, trained.parameters, trained.tokenizer.end_id)
    heads = trained.config.heads.num_heads if heads is None else heads
    return [
        _generate(trained, decoder, prompt, heads, max_new_tokens, sampling, seed, compare, row)
        for row, prompt in enumerate(prompts)
    ]


def _generate(
    trained: TrainedRun,
    decoder: Decoder,
    prompt: str,
    heads: int,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    compare: bool,
    row: int,
) -> Generation:
    ids = trained.tokenizer.encode(prompt)

    def decode(num_heads: int) -> Continuation:
        return decoder.run(
            [ids], num_heads=num_heads, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, first_row=row
        )[0]

    found = decode(heads)
    generation = Generation(
        text=trained.tokenizer.decode(found.tokens),
        tokens=found.tokens,
        proposers=found.proposers,
        passes=found.passes,
        tokens_per_pass=tokens_per_pass([found]).mean,
        seconds=found.seconds,
        tokens_per_second=len(found.tokens) / found.seconds,
        acceptance=acceptance_of([found]),
    )
    if not compare:
        return generation
    plain = decode(0)
    rate = len(plain.tokens) / plain.seconds
    return dataclasses.replace(
        generation,
        plain=PlainRun(plain.tokens, plain.seconds, rate),
        speedup=generation.tokens_per_second / rate,
        identical=plain.tokens == found.tokens if sampling.greedy else None,
        divergence=first_divergence(decoder, ids.tolist(), plain, found) if sampling.greedy else None,
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
    if generation.identical is not None:
        table.add_row("identical to plain", "yes" if generation.identical else _explain(generation.divergence))
    return table


def _explain(divergence: Divergence | None) -> str:
    if divergence is None:
        return "no"
    kind = "a tie" if divergence.tie else "NOT A TIE: please report this"
    return f"no: token {divergence.index}, logit margin {divergence.margin:.1e} ({kind})"


def main() -> int:
    """Parses the flags, generates, reports."""
    parser = frontdoor.Parser(prog="python -m mtpd_jax.generate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="of a trained run")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to continue")
    prompt.add_argument("--prompt_file", help="a file with the text to continue")
    parser.add_argument("--heads", type=int, help="drafts per pass; 0 decodes plainly (default: all heads)")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="default: 128")
    frontdoor.add_sampling_flags(parser)
    parser.add_argument("--compare", action="store_true", help="decode plainly, too, and compare")
    parser.add_argument("--json", help="write the figures to this file")
    flags = parser.parse_args()
    frontdoor.check_json_path(flags.json)
    sampling = frontdoor.sampling_of(flags)
    text = flags.prompt if flags.prompt is not None else _read(flags.prompt_file)
    trained = open_run(flags.workdir)
    generation = generate(
        trained, [text], heads=flags.heads, max_new_tokens=flags.max_new_tokens, sampling=sampling,
        seed=flags.seed, compare=flags.compare,
    )[0]  # fmt: skip
    show(rich.console.Console(highlight=False), text, generation, trained.tokenizer.decode)
    if flags.json:
        write_json(flags.json, dataclasses.asdict(generation))
    return int(generation.divergence is not None and not generation.divergence.tie)


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt_file={path}: not readable as UTF-8 text ({error})") from error


if __name__ == "__main__":
    frontdoor.guarded(main)
