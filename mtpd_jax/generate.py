"""Continues prompts: ``python -m mtpd_jax.generate --workdir=DIR --prompt=TEXT [--prompt=TEXT …] [--compare] …``.

On a terminal every token is coloured by who proposed it: the main head, head 1…K, whose draft was accepted, or the text
itself, with prompt lookup; one prompt is shown as it is continued. --prompts reads a file of JSON lines, --interactive
asks for prompts. Greedy text that differs from plain decoding's by more than a tie exits with status 1.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import rich.console

from mtpd_jax import frontdoor
from mtpd_jax.data.chat import Prompt, messages_of
from mtpd_jax.data.files import read_text
from mtpd_jax.data.prompts import prompts_of
from mtpd_jax.decoding.drafters import DRAFTERS
from mtpd_jax.decoding.strategies import STRATEGIES
from mtpd_jax.evaluation.generation import Generation, check_prompts
from mtpd_jax.evaluation.report import write_json, write_json_lines
from mtpd_jax.evaluation.transcript import show, show_figures, show_stream
from mtpd_jax.run import Run, open_run
from mtpd_jax.runs.choice import Choice
from mtpd_jax.runs.progress import say
from mtpd_jax.session import converse


def run(
    workdir: str,
    prompts: Sequence[Prompt],
    *,
    checkpoint: Choice = None,
    devices_per_model: int | None = None,
    backbone: str | None = None,
    other_backbone: bool = False,
    **options: Any,
) -> list[Generation]:
    """Continues prompts with a checkpoint of a workdir.

    Args:
      workdir: of a trained run.
      prompts: texts or conversations; see ``Run.generate``.
      checkpoint, devices_per_model, backbone, other_backbone: see ``open_run``.
      options: what ``Run.generate`` takes.

    Raises:
      ValueError: bad workdir, prompt or option.
    """
    check_prompts(prompts)
    return open_run(workdir, checkpoint, devices_per_model, backbone, other_backbone).generate(prompts, **options)


def _parser() -> frontdoor.Parser:
    parser = frontdoor.Parser(prog="python -m mtpd_jax.generate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="of a trained run")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", action="append", help="a text to continue; may be given again")
    prompt.add_argument("--prompt_file", help="a file with the text to continue")
    prompt.add_argument("--prompts", help='a file of JSON lines with a field "prompt" or "messages"')
    prompt.add_argument("--interactive", action="store_true", help="ask for prompts, until there is none")
    parser.add_argument("--chat", action="store_true", help="the text is a message, which the model answers")
    parser.add_argument("--system", help="with --chat: what the model is told before")
    parser.add_argument(
        "--heads", type=int, help="drafts per pass; 0 decodes plainly, more than there are loop them (default: all)"
    )
    parser.add_argument("--drafter", default="heads", choices=tuple(DRAFTERS), help="who drafts")
    parser.add_argument(
        "--strategy", choices=tuple(STRATEGIES),
        help="how a round goes (default: speculative, or verified for a model that fills in masks)",
    )  # fmt: skip
    parser.add_argument(
        "--slots", type=int, help="tokens of a span, for such a model (default: as many as in training)"
    )
    parser.add_argument("--batch_size", type=int, default=1, help="prompts decoded together (default: 1)")
    frontdoor.add_opening_flags(parser)
    frontdoor.add_decoding_flags(parser)
    parser.add_argument("--compare", action="store_true", help="decode plainly, too, and compare")
    parser.add_argument("--json", help="write the figures to this file; of several prompts, one JSON object per line")
    return parser


def _prompts(flags: argparse.Namespace) -> tuple[Sequence[Prompt], Sequence[str]]:
    """The prompts, and how each is shown before its continuation; none where they are asked for."""
    if flags.interactive:
        for name, given in (("compare", flags.compare), ("json", flags.json), ("batch_size", flags.batch_size != 1)):
            if given:
                raise ValueError(f"--{name}: expected prompts, and not --interactive, beside it")
        return [], []
    if flags.prompts is not None:
        if flags.chat:
            raise ValueError('--chat: --prompts has conversations of its own, as "messages"')
        prompts = prompts_of(flags.prompts)
        return prompts, [one if isinstance(one, str) else f"{one[-1]['content']}\n\n" for one in prompts]
    texts = flags.prompt or [read_text(flags.prompt_file, "--prompt_file")]
    if flags.chat:
        return [messages_of(text, flags.system) for text in texts], [f"{text}\n\n" for text in texts]
    return texts, texts


def main() -> int:
    """Parses the flags, generates, reports."""
    # Whatever can be wrong is looked at before the model is read.
    flags = _parser().parse_args()
    frontdoor.check_output_path(flags.json)
    if flags.system is not None and not flags.chat:
        raise ValueError("--system: expected --chat beside it, for only a conversation has a system message")
    prompts, shown = _prompts(flags)
    check_prompts(prompts)
    options = {"sampling": frontdoor.sampling_of(flags)} | {
        name: getattr(flags, name)
        for name in (
            "heads", "max_new_tokens", "seed", "min_confidence", "bit_exact", "drafter", "strategy", "stop",
            "past_trained_length", "slots",
        )
    }  # fmt: skip
    opened, console = open_run(flags.workdir, **frontdoor.opening_of(flags)), rich.console.Console(highlight=False)
    opened.decoder.on_compile = lambda options: say(f"compiling {options.words} …")
    if flags.interactive:
        converse(opened, console, options, chat=flags.chat, system=flags.system)
        return 0
    found = _continue(opened, console, flags, prompts, shown, options)
    if flags.json and flags.prompts is None and len(found) == 1:
        write_json(flags.json, dataclasses.asdict(found[0]))
    elif flags.json:
        lines = [{"prompt": prompt, **dataclasses.asdict(one)} for prompt, one in zip(prompts, found, strict=True)]
        write_json_lines(flags.json, lines)
    return int(any(one.failed for one in found))


def _continue(
    opened: Run,
    console: rich.console.Console,
    flags: argparse.Namespace,
    prompts: Sequence[Prompt],
    shown: Sequence[str],
    options: dict[str, Any],
) -> list[Generation]:
    """Continues prompts, and shows them: a single one as it is written, where somebody watches."""
    if len(prompts) == 1 and not flags.compare and sys.stdout.isatty():
        decode = opened.text_after(prompts[0])
        found = [show_stream(console, shown[0], opened.stream(prompts[0], **options), decode)]
        show_figures(console, found[0])
        return found
    found = opened.generate(prompts, batch_size=flags.batch_size, compare=flags.compare, **options)
    for prompt, text, one in zip(prompts, shown, found, strict=True):
        show(console, text, one, opened.text_after(prompt))
    return found


if __name__ == "__main__":
    frontdoor.guarded(main)
