"""Other people's models in, models with heads out.

``from_hf FOLDER --workdir=DIR`` reads a folder of a pretrained model (config.json, safetensors, tokenizer.json) and
writes a run, which generate, evaluate and training methods open. ``to_hf --workdir=DIR FOLDER`` writes a run's model as
a folder that transformers opens, and what else reads its formats. --dry_run writes nothing, and says the same.
"""

import dataclasses

import jax
import rich.console

from mtpd_jax import frontdoor
from mtpd_jax.conversion import from_hf, to_hf
from mtpd_jax.evaluation.report import write_json
from mtpd_jax.interop.formats import FORMATS


def main() -> int:
    """Parses the flags, converts, says what was done."""
    parser = frontdoor.Parser(prog="python -m mtpd_jax.convert", description=__doc__)
    directions = parser.add_subparsers(dest="direction", required=True, parser_class=frontdoor.Parser)
    reading = directions.add_parser("from_hf", help="make a run of a pretrained model")
    reading.add_argument("folder", help="with config.json, safetensors and tokenizer.json")
    reading.add_argument("--workdir", required=True, help="a new folder, for the run")
    reading.add_argument("--tie", action="store_true", help="a missing unembedding is the embedding")
    writing = directions.add_parser("to_hf", help="write a run's model for other programs")
    writing.add_argument("folder", help="a new folder")
    writing.add_argument("--workdir", required=True, help="of the run")
    writing.add_argument("--format", default="hf", choices=tuple(FORMATS), help="(default: hf)")
    frontdoor.add_opening_flags(writing)
    writing.add_argument(
        "--report", action="append", default=[],
        help="a file of mtpd_jax.evaluate --json, whose figures the model card shows; may be given again",
    )  # fmt: skip
    for direction in (reading, writing):
        direction.add_argument("--dry_run", action="store_true", help="say what would be done, and write nothing")
        direction.add_argument("--json", help="write what was done to this file")
    flags = parser.parse_args()
    frontdoor.check_output_path(flags.json)
    # What is converted passes through the host's memory; an accelerator is not needed, and may be somebody's.
    jax.config.update("jax_platforms", "cpu")
    if flags.direction == "from_hf":
        done = from_hf(flags.folder, flags.workdir, tie=flags.tie, dry_run=flags.dry_run)
    else:
        done = to_hf(
            flags.workdir, flags.folder, format=flags.format, reports=flags.report, dry_run=flags.dry_run,
            **frontdoor.opening_of(flags),
        )  # fmt: skip
    rich.console.Console(highlight=False).print("\n".join(done.lines), markup=False, soft_wrap=True)
    if flags.json:
        write_json(flags.json, dataclasses.asdict(done))
    return 0


if __name__ == "__main__":
    frontdoor.guarded(main)
