"""Measures a trained run: ``python -m mtpd_jax.evaluate --workdir=DIR [--text=FILE …] [--split=…] [--prompts=FILE]``.

Text is scored teacher-forced: cross entropy, bits per byte, each head's agreement with the main head. Prompts (a file
with one JSON object per line, with the field "prompt", or "messages" of a conversation) are decoded with several
numbers of heads: acceptance, tokens per pass, wall clock against plain decoding on the same prompts. Greedy text that
differs from plain decoding's by more than a tie exits with status 1.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import rich.console

from mtpd_jax import frontdoor
from mtpd_jax.data.chat import Prompt
from mtpd_jax.data.documents import Document
from mtpd_jax.data.files import read_text
from mtpd_jax.data.prompts import prompts_of
from mtpd_jax.data.sources import expand
from mtpd_jax.decoding.drafters import DRAFTERS
from mtpd_jax.decoding.options import MASKS, Options, check_seed
from mtpd_jax.decoding.sampling import GREEDY, Sampling
from mtpd_jax.decoding.stops import transitions_of
from mtpd_jax.decoding.strategies import STRATEGIES
from mtpd_jax.evaluation.decoding import Ways, compare_ways, decode_prompts, score_ways
from mtpd_jax.evaluation.page import page
from mtpd_jax.evaluation.quality import Reader, score_spans
from mtpd_jax.evaluation.report import acceptance_table, decoding_table, place_table, text_table, write_file, write_json
from mtpd_jax.evaluation.results import PromptReport, Report, Settings
from mtpd_jax.evaluation.samples import samples_of
from mtpd_jax.evaluation.scoring import TextScore, windows
from mtpd_jax.evaluation.slots import SlotReport, TextRow, score_slots
from mtpd_jax.evaluation.span_report import length_table, reliability_table, slot_table, span_table
from mtpd_jax.evaluation.ways import Asked
from mtpd_jax.run import Run, check_stop, open_run
from mtpd_jax.runs.origin import held_out_note
from mtpd_jax.runs.progress import Progress
from mtpd_jax.validation import check_flag, check_integer


def run(
    workdir: str,
    *,
    text: Sequence[str] = (),
    split_name: str | None = None,
    prompts: str | None = None,
    heads: Sequence[int] | None = None,
    limit: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 1,
    sampling: Sampling | None = None,
    seed: int = 0,
    turns: int = 1,
    min_confidence: float = 0.0,
    bit_exact: bool = False,
    drafters: Sequence[str] = ("heads",),
    strategy: str = "speculative",
    past_trained_length: bool = False,
    spans: Sequence[str] | None = None,
    slots: Sequence[int] | None = None,
    confidences: Sequence[float] | None = None,
    stop: Sequence[str] = (),
    **opening: Any,
) -> Report:
    """Measures a checkpoint of a workdir.

    Args:
      workdir, text: of a trained run; files, or globs, each file one document.
      split_name: "validation" scores the run's own held-out documents.
      prompts: a JSON-lines file with a field "prompt" or "messages".
      heads: numbers of drafts, one by each head, to decode with; 0 (plain) and 1 always run; more than the model has
        loops them. None: 0, 1, 2, 4, … and all.
      limit: at most this many documents of the split and prompts.
      batch_size, turns: rows decoded or scored together; times that all is decoded, of which the median counts.
      bit_exact: run all passes at one width, see ``Options.pass_width``.
      drafters: who drafts, in turn; see ``decoding.drafters``.
      max_new_tokens, sampling, seed, min_confidence, strategy, past_trained_length, stop: see ``Run.generate``.
      spans, slots, confidences: strategies that fill in masks, k, tau, combined; None: all; 2 and k_max; 0.9.
      opening: what ``open_run`` takes beside the workdir.

    Raises:
      ValueError: bad workdir, file or option, or nothing to measure; before anything is measured.
    """
    _check_scope(text, split_name, prompts, limit, batch_size, turns)
    asked = Asked(heads, drafters, spans, slots, confidences, bit_exact)
    _check_decoding(seed, bit_exact, stop)
    options = Options(0, max_new_tokens, GREEDY if sampling is None else sampling, min_confidence, strategy=strategy)
    options.validate()
    documents: dict[str, list[Document]] = {str(one): [read_text(one, "--text")] for one in expand(text, "--text")}
    written = [] if prompts is None else prompts_of(prompts, limit)
    opened = open_run(workdir, **opening)
    _ = opened.scorer(batch_size), opened.teacher  # a batch that is too large, and another teacher, are refused
    options = dataclasses.replace(options, draft_until=opened.draft_until(past_trained_length))
    drafts, of_spans = asked.ways(opened.config, str(opened.trained.folder.path), options)
    decoding = _Decoding.of(opened, written, drafts, of_spans, batch_size, seed, turns, stop) if prompts else None
    documents |= {split_name: list(opened.trained.held_out_documents())[:limit]} if split_name else {}
    scored = _score(opened, documents, batch_size, held_out_note(opened.trained.sources) if split_name else "")
    decoded = {prompts: decoding.run(opened)} if prompts and decoding else {}
    times = {"seed": seed, "batch_size": batch_size, "turns": turns, "bit_exact": bit_exact}
    return Report(_settings(opened, options, stop, **times), decoding=decoded, **scored)


def _settings(opened: Run, options: Options, stop: Sequence[str], **others: Any) -> Settings:
    return Settings(
        workdir=opened.trained.folder.shown, step=opened.step, sampling=options.sampling, strategy=options.strategy,
        min_confidence=options.min_confidence, stop=tuple(stop), max_new_tokens=options.max_new_tokens,
        devices=f"{opened.mesh.size} x {opened.mesh.devices.flat[0].device_kind}", **others,
    )  # fmt: skip


def _score(opened: Run, documents: dict[str, list[Document]], batch_size: int, note: str) -> dict[str, Any]:
    """What a model, and the one that taught it, make of texts: parts of a report."""
    if not documents:
        return {"text": {}}
    length, teacher = opened.config.training.sequence_length, opened.teacher
    scores = _score_text(opened, documents, batch_size, length, note)
    if teacher is None:
        return {"text": scores}
    of_teacher = _score_text(teacher, documents, batch_size, length, "")  # with as much text before it
    slots = _score_slots(opened, teacher, documents, batch_size)
    return {"text": scores, "teacher": of_teacher, "slots": slots}


def _check_decoding(seed: int, bit_exact: bool, stop: Sequence[str]) -> None:
    """Checks what no ``Options`` hold; for arguments and errors see ``run``."""
    check_seed(seed)
    check_flag("bit_exact", bit_exact)
    check_stop(stop)


def _check_scope(
    text: Sequence[str],
    split_name: str | None,
    prompts: str | None,
    limit: int | None,
    batch_size: int,
    turns: int,
) -> None:
    """Checks what to measure, as far as that goes without the run; for arguments and errors see ``run``."""
    if not (text or split_name or prompts):
        raise ValueError("nothing to evaluate: give --text, --split or --prompts")
    if not isinstance(text, list | tuple) or not all(isinstance(file, str) for file in text):
        raise ValueError(f"text = {text!r}: expected a list of files")
    if split_name not in (None, "validation"):
        raise ValueError(f"--split={split_name}: expected validation")
    for name, value in (("limit", 1 if limit is None else limit), ("batch_size", batch_size), ("turns", turns)):
        check_integer(name, value)
        if value < 1:
            raise ValueError(f"--{name}={value}: expected at least one")


def _score_text(
    opened: Run, documents: dict[str, list[Document]], batch_size: int, length: int, note: str
) -> dict[str, TextScore]:
    scorer, scores = opened.scorer(batch_size, length), {}
    with Progress("scoring", sum(map(len, documents.values()))) as progress:
        if note:
            progress.say(note)
        progress.show("compiling the scoring of text …")

        def counted(texts: list[Document]) -> Iterator[Document]:
            for text in texts:
                yield text
                progress.advance()

        for name, texts in documents.items():
            sums = scorer.sum_documents(opened.parameters, counted(texts))
            assert sums is not None  # only a callback that says so ends the scoring early
            scores[name] = TextScore.of(sums)
    if not any(score.tokens for score in scores.values()):
        raise ValueError(f"{', '.join(documents)}: no text to score")
    return scores


def _score_slots(
    opened: Run, teacher: Run, documents: dict[str, list[Document]], batch_size: int
) -> dict[str, SlotReport]:
    """What the masks come to in the same text."""
    length = opened.config.training.sequence_length

    def rows(texts: list[Document]) -> Iterator[TextRow]:
        for text in texts:
            if isinstance(text, str):
                yield from ((row, None) for row in windows(opened.tokenizer.encode_document(text), length))
            else:  # of what a model wrote that counts, and not its prompt
                yield from zip(windows(text.ids, length), windows(text.supervised, length), strict=True)

    both = opened.parameters, teacher.parameters
    return {
        name: score_slots(opened.config, opened.mesh, *both, rows(texts), batch_size)
        for name, texts in documents.items()
    }


@dataclasses.dataclass(frozen=True)
class _Decoding:
    """What is to be decoded, and how; see ``run``.

    Attributes:
      prompts: token ids.
      ways: see ``ways_of``; ``spans`` are those of them that fill in masks.
      batch_size, seed, turns: as given.
      stop, transitions: strings that end a text, and what is looked for of them while decoding.
    """

    prompts: list[np.ndarray]
    ways: Ways
    spans: Ways
    batch_size: int
    seed: int
    turns: int
    stop: Sequence[str]
    transitions: np.ndarray | None

    @classmethod
    def of(
        cls,
        opened: Run,
        prompts: Sequence[Prompt],
        drafts: Ways,
        spans: Ways,
        batch_size: int,
        seed: int,
        turns: int,
        stop: Sequence[str],
    ) -> "_Decoding":
        """Checks that all of it can be done."""
        ids, ways = [opened.encode(prompt) for prompt in prompts], {**drafts, **spans}
        for options in ways.values():
            opened.decoder.check(ids, options, batch_size)
        transitions = transitions_of(opened.tokenizer.token_bytes(), stop) if stop else None
        return cls(ids, ways, spans, batch_size, seed, turns, stop, transitions)

    def run(self, opened: Run) -> PromptReport:
        """Decodes and scores."""
        with Progress("decoding", len(self.prompts) * len(self.ways) * self.turns) as progress:
            for note in {opened.note_of(self.prompts, options) for options in self.ways.values()} - {""}:
                progress.say(note)
            opened.decoder.on_compile = lambda options: progress.show(f"compiling {options.words} …")
            decoded = decode_prompts(
                opened.decoder, self.prompts, self.ways, batch_size=self.batch_size, seed=self.seed, turns=self.turns,
                transitions=self.transitions, on_call=progress.advance,
            )  # fmt: skip
        compared = compare_ways(opened.decoder, self.prompts, self.ways, decoded)
        scores = score_ways(compared, self.batch_size, self.turns)
        found = score_spans(self.spans, scores, compared, self._reader(opened)) if self.spans else {}
        samples = samples_of(opened.tokenizer, self.prompts, self.ways, decoded, self.stop)
        return dataclasses.replace(PromptReport.of(scores, self.ways, found), samples=samples)

    def _reader(self, opened: Run) -> Reader | None:
        """The teacher, and what it writes after the same prompts; None where the run keeps none."""
        if opened.teacher is None:
            return None
        plain = dataclasses.replace(self.ways[0], sampling=GREEDY)
        texts = opened.teacher.decoder.run(
            self.prompts, plain, rows=self.batch_size, transitions=self.transitions, seed=self.seed
        )
        scorer = opened.teacher.scorer(self.batch_size, max(map(len, self.prompts)) + plain.max_new_tokens)
        return Reader.of(scorer, opened.teacher.parameters, self.prompts, texts)


def show(console: rich.console.Console, report: Report) -> None:
    """Prints the report as tables."""
    console.print(report.words, style="dim", markup=False)
    if report.text:
        console.print(text_table(report.text))
    for name, slots in report.slots.items():
        console.print(slot_table(name, slots, report.text[name], report.teacher[name]))
        console.print(reliability_table(name, slots))
    for name, mode_report in report.decoding.items():
        if mode_report.spans:
            console.print(span_table(name, mode_report.spans))
            console.print(length_table(name, mode_report.spans))
            if not mode_report.others and len(mode_report.heads) == 1:
                continue
        console.print(decoding_table(name, mode_report.heads, mode_report.padded_plain, mode_report.others))
        if len(mode_report.heads) > 1:
            console.print(acceptance_table(name, mode_report.heads))
        if places := place_table(name, mode_report.heads):
            console.print(places)


def main() -> int:
    """Parses the flags, measures, reports."""
    parser = frontdoor.Parser(prog="python -m mtpd_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="of a trained run")
    parser.add_argument("--text", action="append", default=[], help="a file or glob to score; may be given again")
    parser.add_argument("--split", help="validation: score the run's own held-out documents")
    parser.add_argument("--prompts", help='a file of JSON lines with a field "prompt" or "messages"')
    parser.add_argument("--heads", type=frontdoor.integers, help="numbers of heads to decode with, such as 0,1,2,4")
    parser.add_argument("--limit", type=int, help="at most this many documents and prompts")
    parser.add_argument("--batch_size", type=int, default=1, help="prompts decoded together (default: 1)")
    parser.add_argument("--turns", type=int, default=1, help="decode so often, and take the median times (default: 1)")
    parser.add_argument(
        "--drafters", type=frontdoor.names, default=["heads"],
        help=f"who drafts, in turn: some of {','.join(name for name in DRAFTERS if name != MASKS)} (default: heads)",
    )  # fmt: skip
    parser.add_argument(
        "--strategy", default="speculative", choices=tuple(STRATEGIES), help="of drafts (masks: --spans)"
    )
    parser.add_argument("--spans", type=frontdoor.names, help="strategies that fill in masks (default: all)")
    parser.add_argument("--slots", type=frontdoor.integers, help="tokens of a span, such as 2,4,8")
    parser.add_argument(
        "--confidences", type=frontdoor.numbers, help="that stop a span, such as 0.6,0.9 (default: 0.9)"
    )
    frontdoor.add_opening_flags(parser)
    frontdoor.add_decoding_flags(parser)
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--html", help="write the report to this file as a page, with coloured text and charts")
    flags = parser.parse_args()
    frontdoor.check_output_path(flags.json)
    frontdoor.check_output_path(flags.html, "--html")
    report = run(
        flags.workdir, text=flags.text, split_name=flags.split, prompts=flags.prompts, heads=flags.heads,
        limit=flags.limit, max_new_tokens=flags.max_new_tokens, batch_size=flags.batch_size,
        sampling=frontdoor.sampling_of(flags), seed=flags.seed, turns=flags.turns, min_confidence=flags.min_confidence,
        bit_exact=flags.bit_exact, drafters=flags.drafters, strategy=flags.strategy, stop=flags.stop,
        past_trained_length=flags.past_trained_length, spans=flags.spans, slots=flags.slots,
        confidences=flags.confidences,
        **frontdoor.opening_of(flags),
    )  # fmt: skip
    show(rich.console.Console(), report)
    if flags.json:
        write_json(flags.json, report.to_json())
    if flags.html:
        write_file(flags.html, page(report), "--html")
    return int(any(mode_report.failed for mode_report in report.decoding.values()))


if __name__ == "__main__":
    frontdoor.guarded(main)
