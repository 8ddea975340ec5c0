"""Other people's models in, models with heads out.

``from_hf FOLDER --workdir=DIR`` reads a folder of a pretrained model (config.json, safetensors, tokenizer.json) and
writes a run, which generate, evaluate and training methods open. ``to_hf --workdir=DIR FOLDER`` writes a run's model as
a folder that transformers opens, and what else reads its formats. --dry_run writes nothing, and says the same.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import rich.console

from mtpd_jax import frontdoor
from mtpd_jax.interop.card import Measurements
from mtpd_jax.interop.formats import FORMATS
from mtpd_jax.interop.reading import look
from mtpd_jax.interop.tensors import read_json
from mtpd_jax.interop.writing import plan
from mtpd_jax.model.backbone import count_parameters
from mtpd_jax.runs.checkpoint import NEWEST
from mtpd_jax.runs.exported import export_model, last_evaluation
from mtpd_jax.runs.imported import import_model
from mtpd_jax.runs.opening import load_run
from mtpd_jax.runs.whole import check_free
from mtpd_jax.runs.workdir import open_workdir

# Room that is asked for beside the weights: for all the small files.
_MARGIN = 1 << 24


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was converted, or would be.

    Attributes:
      lines: that say so, for people.
      parameters: numbers in the model, its heads included.
      tensors, bytes: that were read or written.
    """

    lines: tuple[str, ...]
    parameters: int
    tensors: int
    bytes: int


def from_hf(folder: str, workdir: str, *, tie: bool = False, dry_run: bool = False) -> Conversion:
    """Makes a run of a pretrained model.

    Args:
      folder: with config.json, safetensors and tokenizer.json.
      workdir: a new or an empty folder.
      tie: where the unembedding is missing without the config saying that it is the embedding: take that for it.
      dry_run: look at everything but the weights, and write nothing.

    Raises:
      ValueError: something is missing, damaged, or not known here; naming it.
      OSError: something cannot be read or written.
    """
    target = _local(workdir, "workdir")
    found = look(pathlib.Path(folder).expanduser().resolve(), tie)
    check_free(target, found.bytes + _MARGIN)
    if not dry_run:
        import_model(found, target)
    model, heads = found.config.model, found.config.heads
    size = f"{found.parameters:,} parameters in {found.tensors} tensors of {model.weights}"
    lines = [
        f"read: {found.path}: {found.title}, {size}" + (f", {heads.num_heads} heads" if heads.num_heads else ""),
        *found.notes,
        f"{'would be written' if dry_run else 'written'}: {target}",
    ]
    return Conversion(tuple(lines), found.parameters, found.tensors, found.bytes)


def to_hf(
    workdir: str,
    folder: str,
    *,
    format: str = "hf",
    checkpoint: int | str = NEWEST,
    reports: Sequence[str] = (),
    dry_run: bool = False,
) -> Conversion:
    """Writes the model of a run as a folder for other programs.

    Args:
      workdir: of the run.
      folder: new or empty.
      format: of ``interop.formats.FORMATS``.
      checkpoint: see ``open_run``.
      reports: files of ``mtpd_jax.evaluate --json``, whose figures the model card shows.
      dry_run: look at everything, and write nothing.

    Raises:
      ValueError: bad workdir or report, or a model that the format cannot hold; saying why.
      OSError: something cannot be read or written.
    """
    source, target = open_workdir(workdir), _local(folder, "folder")
    planned = plan(source.read_config(), format)
    check_free(target, planned.bytes + _MARGIN)
    decoding = {pathlib.Path(report).name: _read_report(report) for report in reports}
    run = load_run(workdir, checkpoint)
    if not dry_run:
        export_model(planned, run, source, target, Measurements(last_evaluation(source), decoding))
    heads, title = planned.config.heads.num_heads, FORMATS[format].title
    size = f"{planned.bytes:,} bytes in {planned.tensors} tensors, {len(planned.shards)} files, {heads} heads"
    lines = [
        f"read: {source.path}, step {run.step}",
        f"{'would be written' if dry_run else 'written'}: {target}: {title}; {size}",
        *planned.notes,
    ]
    return Conversion(tuple(lines), count_parameters(run.parameters), planned.tensors, planned.bytes)


def _local(path: str, name: str) -> pathlib.Path:
    if "://" in path or not path or "\0" in path:
        raise ValueError(f"--{name}={path}: expected a local folder; copy it to the bucket afterwards")
    return pathlib.Path(path).expanduser().resolve()


def _read_report(path: str) -> dict[str, Any]:
    report = read_json(pathlib.Path(path))
    if not isinstance(report.get("decoding"), dict):
        raise ValueError(f"--report={path}: expected what mtpd_jax.evaluate --prompts=FILE --json=FILE writes")
    return report


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
    writing.add_argument("--checkpoint", default=NEWEST, help="the step of a checkpoint (default: newest)")
    writing.add_argument(
        "--report", action="append", default=[],
        help="a file of mtpd_jax.evaluate --json, whose figures the model card shows; may be given again",
    )  # fmt: skip
    for direction in (reading, writing):
        direction.add_argument("--dry_run", action="store_true", help="say what would be done, and write nothing")
    flags = parser.parse_args()
    # What is converted passes through the host's memory; an accelerator is not needed, and may be somebody's.
    jax.config.update("jax_platforms", "cpu")
    if flags.direction == "from_hf":
        done = from_hf(flags.folder, flags.workdir, tie=flags.tie, dry_run=flags.dry_run)
    else:
        done = to_hf(
            flags.workdir, flags.folder, format=flags.format, checkpoint=flags.checkpoint, reports=flags.report,
            dry_run=flags.dry_run,
        )  # fmt: skip
    rich.console.Console(highlight=False).print("\n".join(done.lines), markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    frontdoor.guarded(main)
