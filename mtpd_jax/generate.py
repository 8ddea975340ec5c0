"""Continues a prompt: ``python -m mtpd_jax.generate --workdir=DIR --prompt=TEXT [--compare] …``.

On a terminal every token is coloured by who proposed it: the main head, or head 1…K, whose draft was accepted. Greedy
text that differs from plain decoding's by more than a tie exits with status 1.
"""

import dataclasses
from collections.abc import Sequence

import rich.console

from mtpd_jax import frontdoor
from mtpd_jax.data.files import read_text
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.evaluation.generation import Generation, check_prompts, generate, options_for, show
from mtpd_jax.evaluation.report import write_json
from mtpd_jax.training.restore import open_run
from mtpd_jax.validation import check_flag


def run(
    workdir: str,
    prompts: Sequence[str],
    *,
    heads: int | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int = 0,
    min_confidence: float = 0.0,
    bit_exact: bool = False,
    compare: bool = False,
    checkpoint: int | None = None,
) -> list[Generation]:
    """Continues prompts, one after the other, with a checkpoint of a workdir.

    Args:
      workdir: of a trained run.
      prompts: texts, none of them empty.
      heads: drafts per round; 0 for plain decoding, None for all heads; more than the model has loops them.
      max_new_tokens: per prompt.
      sampling: None is greedy.
      seed: of sampling.
      min_confidence: see ``Options``.
      bit_exact: run plain and speculative passes at one width, see ``Options.pass_width``.
      compare: decode plainly, too.
      checkpoint: its step; None: the newest that is whole.

    Raises:
      ValueError: bad workdir, prompt or option.
    """
    check_prompts(prompts)
    for name, flag in (("bit_exact", bit_exact), ("compare", compare)):
        check_flag(name, flag)
    trained = open_run(workdir, checkpoint)
    options = options_for(trained, heads, max_new_tokens, sampling, min_confidence, bit_exact)
    return generate(trained, prompts, options, seed=seed, compare=compare)


def main() -> int:
    """Parses the flags, generates, reports."""
    parser = frontdoor.Parser(prog="python -m mtpd_jax.generate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="of a trained run")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to continue")
    prompt.add_argument("--prompt_file", help="a file with the text to continue")
    parser.add_argument(
        "--heads", type=int, help="drafts per pass; 0 decodes plainly, more than there are loops them (default: all)"
    )
    frontdoor.add_decoding_flags(parser)
    parser.add_argument("--compare", action="store_true", help="decode plainly, too, and compare")
    parser.add_argument("--json", help="write the figures to this file")
    flags = parser.parse_args()
    frontdoor.check_json_path(flags.json)
    text = flags.prompt if flags.prompt is not None else read_text(flags.prompt_file, "--prompt_file")
    check_prompts([text])
    sampling = frontdoor.sampling_of(flags)
    trained = open_run(flags.workdir, frontdoor.checkpoint_step(flags.checkpoint))
    options = options_for(trained, flags.heads, flags.max_new_tokens, sampling, flags.min_confidence, flags.bit_exact)
    generation = generate(trained, [text], options, seed=flags.seed, compare=flags.compare)[0]
    show(rich.console.Console(highlight=False), text, generation, trained.tokenizer.decode)
    if flags.json:
        write_json(flags.json, dataclasses.asdict(generation))
    return int(generation.divergence is not None and not generation.divergence.tie)


if __name__ == "__main__":
    frontdoor.guarded(main)
