"""Other people's models in, models with heads out: what ``convert`` does, from Python."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from mtpd_jax.data.files import read_json
from mtpd_jax.interop.card import Measurements, card
from mtpd_jax.interop.formats import FORMATS
from mtpd_jax.interop.reading import look
from mtpd_jax.interop.writing import plan
from mtpd_jax.model.backbone import count_parameters
from mtpd_jax.run import open_run
from mtpd_jax.runs.exported import export_model, last_evaluation
from mtpd_jax.runs.imported import import_model
from mtpd_jax.runs.whole import check_free
from mtpd_jax.runs.workdir import open_workdir, shown

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
    found = look(_local(folder, "folder"), tie)
    check_free(target, found.bytes + _MARGIN)
    if not dry_run:
        import_model(found, target)
    model, heads = found.config.model, found.config.heads
    size = f"{found.parameters:,} parameters in {found.tensors} tensors of {model.weights}"
    lines = [
        f"read: {shown(found.path)}: {found.title}, {size}" + (f", {heads.num_heads} heads" if heads.num_heads else ""),
        *found.notes,
        f"{'would be written' if dry_run else 'written'}: {shown(target)}",
    ]
    return Conversion(tuple(lines), found.parameters, found.tensors, found.bytes)


def to_hf(
    workdir: str,
    folder: str,
    *,
    format: str = "hf",
    reports: Sequence[str] = (),
    dry_run: bool = False,
    **opening: Any,
) -> Conversion:
    """Writes the model of a run as a folder for other programs.

    Args:
      workdir: of the run.
      folder: new or empty.
      format: of ``interop.formats.FORMATS``.
      reports: files of ``mtpd_jax.evaluate --json``, whose figures the model card shows.
      dry_run: look at everything, and write nothing.
      opening: what ``open_run`` takes.

    Raises:
      ValueError: bad workdir or report, or a model that the format cannot hold; saying why.
      OSError: something cannot be read or written.
    """
    source, target = open_workdir(workdir), _local(folder, "folder")
    planned = plan(source.read_config(), format)
    check_free(target, planned.bytes + _MARGIN)
    decoding = {report: read_json(pathlib.Path(report)) for report in reports}
    run = open_run(workdir, **opening).trained
    text = card(planned, run.config, run.step, Measurements(last_evaluation(source, run.step), decoding))
    if not dry_run:
        export_model(planned, run, target, text)
    heads, title = planned.config.heads.num_heads, FORMATS[format].title
    size = f"{planned.bytes:,} bytes in {planned.tensors} tensors, {len(planned.shards)} files, {heads} heads"
    lines = [
        f"read: {source.shown}, step {run.step}",
        f"{'would be written' if dry_run else 'written'}: {shown(target)}: {title}; {size}",
        *planned.notes,
    ]
    return Conversion(tuple(lines), count_parameters(run.parameters), planned.tensors, planned.bytes)


def _local(path: str, name: str) -> pathlib.Path:
    """A local folder; ``name`` says where it was given."""
    if "://" in path or not path or "\0" in path:
        raise ValueError(f"--{name}={path}: expected a local folder; what is in a bucket is copied there or from there")
    try:
        return pathlib.Path(path).expanduser().resolve()
    except RuntimeError as error:
        raise ValueError(f"--{name}={path}: {error}") from error
