"""Runs as folders that other programs read, whole or not at all."""

import pathlib
from typing import Any

from mtpd_jax.interop.writing import Plan, write_settings, write_tensors
from mtpd_jax.runs.metrics import read_metrics
from mtpd_jax.runs.opening import TrainedRun
from mtpd_jax.runs.progress import Progress
from mtpd_jax.runs.whole import whole_folder
from mtpd_jax.runs.workdir import Workdir


def export_model(planned: Plan, run: TrainedRun, target: pathlib.Path, text: str) -> None:
    """Writes a folder.

    Args:
      planned: of the run's config.
      run: open; its parameters are read where they lie.
      target: a folder, which ``whole.check_free`` has found to be free.
      text: of the model card.

    Raises:
      OSError: something cannot be written.
    """
    with whole_folder(target) as (written, _):
        folder = pathlib.Path(written.path)
        write_settings(planned, run.config, run.tokenizer, run.folder.path, folder)
        (folder / "README.md").write_text(text, encoding="utf-8")
        with Progress(f"writing {target}", len(planned.shards)) as progress:
            write_tensors(planned, run.parameters, folder, progress.advance)


def last_evaluation(workdir: Workdir, step: int) -> dict[str, Any]:
    """The newest line of a run's metrics that is of held-out text, up to a step; empty without any."""
    evaluated = [line for line in read_metrics(workdir) if "eval/main/ce" in line and line["step"] <= step]
    return max(evaluated, key=lambda line: line["step"], default={})
