"""Continues a prompt: ``python -m mtpd_jax.generate --workdir=DIR --prompt=TEXT [--compare] …``.

On a terminal every token is coloured by who proposed it: the main head, head 1…K, whose draft was accepted, or the text
itself, with prompt lookup. Greedy text that differs from plain decoding's by more than a tie exits with status 1.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import rich.console

from mtpd_jax import frontdoor
from mtpd_jax.data.chat import Prompt, messages_of
from mtpd_jax.data.files import read_text
from mtpd_jax.decoding.drafters import DRAFTERS
from mtpd_jax.decoding.strategies import STRATEGIES
from mtpd_jax.evaluation.generation import Generation, check_prompts, show
from mtpd_jax.evaluation.report import write_json
from mtpd_jax.run import open_run
from mtpd_jax.runs.choice import Choice


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


def main() -> int:
    """Parses the flags, generates, reports."""
    parser = frontdoor.Parser(prog="python -m mtpd_jax.generate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="of a trained run")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to continue")
    prompt.add_argument("--prompt_file", help="a file with the text to continue")
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
    frontdoor.add_opening_flags(parser)
    frontdoor.add_decoding_flags(parser)
    parser.add_argument("--compare", action="store_true", help="decode plainly, too, and compare")
    parser.add_argument("--json", help="write the figures to this file")
    # Whatever can be wrong is looked at before the model is read.
    flags = parser.parse_args()
    frontdoor.check_json_path(flags.json)
    text = flags.prompt if flags.prompt is not None else read_text(flags.prompt_file, "--prompt_file")
    if flags.system is not None and not flags.chat:
        raise ValueError("--system: expected --chat beside it, for only a conversation has a system message")
    asked: Prompt = messages_of(text, flags.system) if flags.chat else text
    check_prompts([asked])
    sampling = frontdoor.sampling_of(flags)
    # The text, in colours, and its figures.
    opened = open_run(flags.workdir, **frontdoor.opening_of(flags))
    generation = opened.generate(
        [asked], heads=flags.heads, max_new_tokens=flags.max_new_tokens, sampling=sampling, seed=flags.seed,
        min_confidence=flags.min_confidence, bit_exact=flags.bit_exact, drafter=flags.drafter,
        strategy=flags.strategy, stop=flags.stop, compare=flags.compare,
        past_trained_length=flags.past_trained_length, slots=flags.slots,
    )[0]  # fmt: skip
    shown = text if not flags.chat else f"{text}\n\n"
    show(rich.console.Console(highlight=False), shown, generation, opened.tokenizer.decode)
    if flags.json:
        write_json(flags.json, dataclasses.asdict(generation))
    return int(generation.failed)


if __name__ == "__main__":
    frontdoor.guarded(main)
