"""One trained model here and in transformers: plain decoding and with heads, the same prompts, in turn.

``python -m experiments.bench.interop --workdir=DIR --prompts=FILE`` exports the run, loads it once in
transformers (PyTorch on the CPU, float32, all cores), and decodes every prompt by itself, greedily, in both programs,
plainly and with each number of heads. Seconds include reading the prompt. It needs transformers and PyTorch, which
``make test`` installs into .cache/transformers: run it with PYTHONPATH=.cache/transformers.
"""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import rich.console
import rich.progress
import rich.table

from experiments.bench.decode import on_one_device
from experiments.bench.peer import Peer, accepted
from experiments.environment import environment
from mtpd_jax import frontdoor
from mtpd_jax.conversion import to_hf
from mtpd_jax.data.prompts import prompts_of
from mtpd_jax.decoding.options import Options
from mtpd_jax.evaluation.acceptance import acceptance_of
from mtpd_jax.evaluation.report import new_table, number, percent, write_json
from mtpd_jax.run import Run
from mtpd_jax.validation import check_count

OURS, THEIRS = "mtpd_jax", "transformers"
# A way to decode: program, and number of drafts.
Way = tuple[str, int]


def measure(opened: Run, peer: Peer, prompts: Sequence[Any], flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Every prompt in every way, in turn: what was written, and how long it took."""
    ways: list[Way] = [(program, heads) for heads in (0, *flags.heads) for program in (OURS, THEIRS)]
    written: dict[Way, list[Any]] = {way: [None] * len(prompts) for way in ways}
    # A first turn over the first prompts compiles, and warms up what does not.
    turns = [(-1, place) for place in range(min(2, len(prompts)))]
    turns += [(turn, place) for turn in range(flags.repeats) for place in range(len(prompts))]
    console = rich.console.Console(stderr=True)
    seconds: dict[Way, list[list[float]]] = {way: [[] for _ in prompts] for way in ways}
    for turn, place in rich.progress.track(turns, "decoding", console=console):
        for way in ways:
            begin = time.perf_counter()
            written[way][place] = _decode(opened, peer, prompts[place], way, flags.max_new_tokens)
            if turn >= 0:
                seconds[way][place].append(time.perf_counter() - begin)
    return [_row(way, written, seconds[way]) for way in ways]


def _decode(opened: Run, peer: Peer, prompt: Any, way: Way, new_tokens: int) -> tuple[list[int], Any]:
    """Token ids, and what acceptance is counted from."""
    program, drafts = way
    if program == OURS:
        (found,) = opened.decoder.run([prompt], Options(drafts, new_tokens))
        return list(found.tokens), found
    peer.drafts.clear()
    tokens = peer.generate(prompt, new_tokens, drafts, ends=True)
    return tokens, accepted(peer.drafts, tokens)


def _row(way: Way, written: dict[Way, list[Any]], seconds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The figures of one way; of every prompt, the median over turns counts."""
    program, drafts = way
    texts = [tokens for tokens, _ in written[way]]
    tokens, medians = sum(map(len, texts)), [statistics.median(of_prompt) for of_prompt in seconds]
    totals = [sum(turn) for turn in zip(*seconds, strict=True)]
    if not drafts:
        shares: list[float | None] = []
    elif program == OURS:
        shares = list(acceptance_of([found for _, found in written[way]]).conditional)
    else:
        shares = _conditional([round for _, found in written[way] for round in found], drafts)
    return {
        "program": program,
        "heads": drafts,
        "prompts": len(texts),
        "tokens": tokens,
        "seconds": sum(medians),
        "seconds_min": min(totals),
        "seconds_max": max(totals),
        "tokens_per_second": tokens / sum(medians),
        "conditional_acceptance": shares,
        "same_text": sum(text == plain for text, (plain, _) in zip(texts, written[OURS, 0], strict=True)),
    }


def _conditional(rounds: Sequence[tuple[int, int]], drafts: int) -> list[float | None]:
    """Of the rounds in which a draft was tried, the share in which it stood."""
    shares: list[float | None] = []
    for k in range(drafts):
        tried = sum(count > k for count, _ in rounds)
        shares.append(sum(stood > k for _, stood in rounds) / tried if tried else None)
    return shares


def table(rows: Sequence[dict[str, Any]]) -> rich.table.Table:
    """The ways beside each other."""
    first = rows[0]
    title = f"{first['prompts']} prompts, one at a time, greedy, {os.cpu_count()} cores"
    columns = ("program", "heads", "tokens/s", "x own plain", "x other", "accepted, by head", "same text")
    made = new_table(title, columns)
    rate: Callable[[str, int], float] = lambda program, heads: next(  # noqa: E731
        row["tokens_per_second"] for row in rows if row["program"] == program and row["heads"] == heads
    )
    for row in rows:
        made.add_row(
            row["program"], str(row["heads"]), number(row["tokens_per_second"], 0),
            number(row["tokens_per_second"] / rate(row["program"], 0)),
            number(row["tokens_per_second"] / rate(THEIRS, row["heads"])),
            ", ".join(map(percent, row["conditional_acceptance"])), f"{row['same_text']}/{row['prompts']}",
        )  # fmt: skip
    return made


def main(arguments: list[str]) -> int:
    """Parses flags, exports, measures, prints the table, and writes JSON."""
    parser = frontdoor.Parser(prog="python -m experiments.bench.interop", description=__doc__)
    parser.add_argument("--workdir", required=True, help="a trained run with heads")
    parser.add_argument("--prompts", required=True, help='JSON lines with a field "prompt"')
    parser.add_argument("--heads", type=frontdoor.integers, help="that draft, such as 1,2,4 (default: all)")
    parser.add_argument("--number", type=int, default=32, help="of prompts (default: 32)")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="per prompt (default: 128)")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: 3)")
    parser.add_argument("--json", help="write the rows here")
    flags = parser.parse_args(arguments)
    for name in ("number", "repeats", "max_new_tokens"):
        check_count(name, getattr(flags, name))
    frontdoor.check_output_path(flags.json)
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"{error}: run it with PYTHONPATH=.cache/transformers, where make test installs it") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    opened = on_one_device(flags.workdir)
    most = opened.config.heads.num_heads
    if not most or not all(0 < heads <= most for heads in flags.heads or ()):
        raise ValueError(f"--heads={flags.heads}: expected numbers from 1 to the run's {most}")
    flags.heads = flags.heads or [most]
    # transformers cannot draft after prompts that are shorter than a round.
    prompts = [opened.encode(prompt) for prompt in prompts_of(flags.prompts)]
    prompts = [prompt for prompt in prompts if len(prompt) >= most][: flags.number]
    with tempfile.TemporaryDirectory() as folder:
        to_hf(flags.workdir, str(pathlib.Path(folder) / "exported"))
        peer = Peer(pathlib.Path(folder) / "exported")
        rows = measure(opened, peer, prompts, flags)
    rich.console.Console().print(table(rows))
    if flags.json:
        about = {**environment(), "transformers": transformers.__version__, "torch": torch.__version__}
        write_json(flags.json, {"environment": about, "rows": rows})
    return int(any(row["same_text"] < row["prompts"] for row in rows))


if __name__ == "__main__":
    frontdoor.guarded(lambda: main(sys.argv[1:]))
