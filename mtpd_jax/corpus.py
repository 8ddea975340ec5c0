"""Writes a model's own answers as data: ``python -m mtpd_jax.corpus --workdir=DIR --prompts=FILE --output=DIR``.

Prompts (a file with one JSON object per line, with the field "prompt", or "messages" of a conversation, and perhaps an
"id") are answered by the run's model, drafts included, which change nothing in what is written. Token ids and a loss
mask are stored, and ``data.source = generations`` trains on them as they are. Running the same command again goes on
where it stopped, and ends with the same bytes.
"""

import dataclasses
import pathlib
from typing import Any

import rich.console
import rich.text

from mtpd_jax import frontdoor
from mtpd_jax.corpora import Corpus
from mtpd_jax.data.prompts import read_prompts
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.data.written import Counts, validate
from mtpd_jax.decoding.drafters import DRAFTERS
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.evaluation.report import write_json
from mtpd_jax.run import check_stop, open_run
from mtpd_jax.runs.progress import Progress


def run(
    workdir: str,
    prompts: str,
    output: str,
    *,
    heads: int | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int = 0,
    min_confidence: float = 0.0,
    drafter: str = "heads",
    stop: tuple[str, ...] = (),
    batch_size: int = 16,
    limit: int | None = None,
    **opening: object,
) -> Counts:
    """Writes the answers of a run to a file of prompts into a folder, or those that it still lacks.

    Args:
      workdir: of the run.
      prompts: a file of JSON lines with a field "prompt" or "messages".
      output: a new folder, or one that the same call began.
      limit: at most this many prompts.
      batch_size: prompts that are decoded together.
      opening: see ``open_run``.
      heads, max_new_tokens, sampling, seed, min_confidence, drafter, stop: see ``Run.generate``.

    Raises:
      ValueError: bad workdir, prompts or option; or the folder holds something else.
      OSError: something cannot be written.
    """
    opened = open_run(workdir, **opening)  # pyright: ignore[reportArgumentType]
    check_stop(stop)
    rows = read_prompts(prompts, limit)
    options = opened.options(heads, max_new_tokens, sampling, min_confidence, drafter=drafter)
    corpus = Corpus(opened, rows, options, seed, stop, batch_size)
    with Progress("answering prompts", len(rows)) as progress:
        return corpus.write(pathlib.Path(output), progress.advance)


def main() -> int:
    """Parses the flags, writes, reports."""
    parser = frontdoor.Parser(prog="python -m mtpd_jax.corpus", description=__doc__)
    parser.add_argument("--output", help="a new folder, or one that this command began")
    parser.add_argument("--validate", metavar="DIR", help="read a folder of answers again, and check all of it")
    parser.add_argument("--workdir", help="of the run whose model answers")
    parser.add_argument("--prompts", help='a file of JSON lines with a field "prompt" or "messages"')
    parser.add_argument("--heads", type=int, help="drafts per pass (default: all heads)")
    parser.add_argument("--drafter", default="heads", choices=tuple(DRAFTERS), help="who drafts")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts decoded together (default: 16)")
    parser.add_argument("--limit", type=int, help="at most this many prompts")
    parser.add_argument("--preview", type=int, default=0, help="show so many answers, and write nothing")
    frontdoor.add_opening_flags(parser)
    frontdoor.add_decoding_flags(parser)
    parser.add_argument("--json", help="write the counts to this file")
    flags = parser.parse_args()
    frontdoor.check_json_path(flags.json)
    console = rich.console.Console(highlight=False)
    if flags.validate:
        return _report(console, flags.validate, validate(pathlib.Path(flags.validate)), flags.json)
    wanted = ["workdir", "prompts", *([] if flags.preview else ["output"])]
    missing = next((name for name in wanted if not getattr(flags, name)), None)
    if missing:
        raise ValueError(f"--{missing} is missing")
    if flags.bit_exact or flags.strategy != "speculative":
        raise ValueError("--bit_exact, --strategy: expected neither: answers are written by the model as it is")
    options = {
        "heads": flags.heads, "max_new_tokens": flags.max_new_tokens, "sampling": frontdoor.sampling_of(flags),
        "min_confidence": flags.min_confidence, "drafter": flags.drafter,
    }  # fmt: skip
    if flags.preview:
        opened = open_run(flags.workdir, **frontdoor.opening_of(flags))
        rows = read_prompts(flags.prompts, flags.limit)
        corpus = Corpus(opened, rows, opened.options(**options), flags.seed, flags.stop, flags.batch_size)
        for row in corpus.preview(flags.preview):
            console.print(_marked(row, opened.tokenizer), soft_wrap=True)
        return 0
    counts = run(
        flags.workdir, flags.prompts, flags.output, **options, seed=flags.seed, stop=tuple(flags.stop),
        batch_size=flags.batch_size, limit=flags.limit, **frontdoor.opening_of(flags),
    )  # fmt: skip
    return _report(console, flags.output, counts, flags.json)


def _report(console: rich.console.Console, folder: str, counts: Counts, json_path: str | None) -> int:
    console.print(
        f"{folder}: {counts.ok:,} prompts answered, {counts.failed:,} failed, {counts.skipped:,} skipped, together "
        f"{counts.prompts:,}; {counts.tokens:,} tokens written",
        soft_wrap=True,
    )
    if json_path:
        write_json(json_path, dataclasses.asdict(counts))
    return 0


def _marked(row: dict[str, Any], tokenizer: Tokenizer) -> rich.text.Text:
    """A row as text, with what is supervised marked, and its ids counted."""
    given = row["loss_mask"].index(1)
    written = f"{given} tokens given, {len(row['ids']) - given} supervised, finish: {row['finish']}"
    text = rich.text.Text(f"{row['id'][:16]} turn {row['turn']}: {written}\n", style="bold")
    text.append(tokenizer.decode(row["ids"][:given], special=True), style="dim")
    return text.append(tokenizer.decode(row["ids"][given:], special=True), style="green").append("\n")


if __name__ == "__main__":
    frontdoor.guarded(main)
