"""Writes a model's own answers as data: ``python -m mtpd_jax.corpus --workdir=DIR --prompts=FILE --output=DIR``.

Prompts (a file with one JSON object per line, with the field "prompt", or "messages" of a conversation, and perhaps an
"id") are answered by the run's model, drafts included, which change nothing in what is written. Token ids and a loss
mask are stored, and ``data.source = generations`` trains on them as they are. Running the same command again goes on
where it stopped, and ends with the same bytes.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
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
from mtpd_jax.validation import check_count


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
    stop: Sequence[str] = (),
    batch_size: int = 16,
    past_trained_length: bool = False,
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
      heads, max_new_tokens, sampling, seed, min_confidence, drafter, past_trained_length, stop: see ``Run.generate``.

    Raises:
      ValueError: bad workdir, prompts or option; or the folder holds something else.
      OSError: something cannot be written.
    """
    if "://" in output:
        raise ValueError(f"--output={output}: expected a local folder")
    decoding = {
        "heads": heads, "max_new_tokens": max_new_tokens, "sampling": sampling, "min_confidence": min_confidence,
        "drafter": drafter, "past_trained_length": past_trained_length,
    }  # fmt: skip
    corpus = _opened(workdir, prompts, limit, decoding, seed, stop, batch_size, opening)
    with Progress("answering prompts", len(corpus.rows)) as progress:
        if note := corpus.note():
            progress.say(note)
        corpus.announce(progress.show)
        return corpus.write(pathlib.Path(output).expanduser(), progress.advance)


def _opened(
    workdir: str,
    prompts: str,
    limit: int | None,
    decoding: dict[str, Any],
    seed: int,
    stop: Sequence[str],
    batch_size: int,
    opening: dict[str, Any],
) -> Corpus:
    """What writes the answers; ``decoding`` and ``opening`` are what ``Run.options`` and ``open_run`` take."""
    check_stop(stop)
    if limit is not None:
        check_count("limit", limit)
    rows, opened = read_prompts(prompts, limit), open_run(workdir, **opening)
    return Corpus(opened, rows, opened.options(**decoding), seed, stop, batch_size)


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
    parser.add_argument("--json", help="write the counts to this file; with --preview, the answers")
    flags = parser.parse_args()
    frontdoor.check_output_path(flags.json)
    console = rich.console.Console(highlight=False)
    if flags.validate:
        return _report(console, flags.validate, validate(pathlib.Path(flags.validate).expanduser()), flags.json)
    wanted = ["workdir", "prompts", *([] if flags.preview else ["output"])]
    missing = next((name for name in wanted if not getattr(flags, name)), None)
    if missing:
        raise ValueError(f"--{missing} is missing")
    if flags.bit_exact:
        raise ValueError("--bit_exact: expected none: answers are written by the model as it is")
    names = "heads", "max_new_tokens", "min_confidence", "drafter", "past_trained_length"
    decoding = {name: getattr(flags, name) for name in names} | {"sampling": frontdoor.sampling_of(flags)}
    common: dict[str, Any] = {"seed": flags.seed, "stop": flags.stop, "batch_size": flags.batch_size}
    opening = frontdoor.opening_of(flags)
    if flags.preview:
        check_count("preview", flags.preview)
        corpus = _opened(flags.workdir, flags.prompts, flags.limit, decoding, **common, opening=opening)
        return _show(console, corpus, flags.preview, flags.json)
    counts = run(flags.workdir, flags.prompts, flags.output, **decoding, **common, limit=flags.limit, **opening)
    return _report(console, flags.output, counts, flags.json)


def _show(console: rich.console.Console, corpus: Corpus, number: int, json_path: str | None) -> int:
    """Prints the first answers, and what has none; both go into a file, too, if one is named."""
    rows, without = corpus.preview(number)
    for row in rows:
        console.print(_marked(row, corpus.tokenizer), soft_wrap=True)
    for id, reason in without.items():
        console.print(f"{id[:16]}: no answer: {reason}", soft_wrap=True)
    if json_path:
        write_json(json_path, {"rows": rows, "without": without})
    return 0


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
