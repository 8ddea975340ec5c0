"""Runs as folders that other programs read, whole or not at all."""

import json
import pathlib
from typing import Any

from mtpd_jax.interop.card import Measurements, card
from mtpd_jax.interop.writing import Plan, write_settings, write_tensors
from mtpd_jax.runs.opening import TrainedRun
from mtpd_jax.runs.progress import Progress
from mtpd_jax.runs.whole import whole_folder
from mtpd_jax.runs.workdir import Workdir


def export_model(
    planned: Plan, run: TrainedRun, workdir: Workdir, target: pathlib.Path, measured: Measurements
) -> None:
    """Writes a folder.

    Args:
      planned: of the run's config.
      run: open; its parameters are read where they lie.
      workdir: that its tokenizer lies in.
      target: a folder, which ``whole.check_free`` has found to be free.
      measured: for the model card.

    Raises:
      OSError: something cannot be written.
    """
    with whole_folder(target) as (written, _):
        folder = pathlib.Path(written.path)
        write_settings(planned, run.config, run.tokenizer, pathlib.Path(workdir.path), folder)
        (folder / "README.md").write_text(card(planned, run.config, measured), encoding="utf-8")
        with Progress(f"writing {target}", len(planned.shards)) as progress:
            write_tensors(planned, run.parameters, folder, progress.advance)


def last_evaluation(workdir: Workdir) -> dict[str, Any]:
    """The newest line of a run's metrics that is of held-out text; empty without any."""
    if not workdir.metrics_file.exists():
        return {}
    lines = (json.loads(line) for line in workdir.metrics_file.read_text().splitlines() if '"eval/' in line)
    return max(lines, key=lambda line: line["step"], default={})
