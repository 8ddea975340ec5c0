"""What a run reports while it trains: metrics.jsonl, TensorBoard, and model FLOP utilisation."""

import contextlib
import importlib.util
import json
import math
import os
import pathlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import tensorboardX.event_file_writer
import tensorboardX.summary
from etils import epath
from tensorboardX.proto import event_pb2

from mtpd_jax.config import Config
from mtpd_jax.fields import require
from mtpd_jax.methods.method import Method
from mtpd_jax.runs.lock import Lock
from mtpd_jax.runs.workdir import Workdir, write_atomically

# Made when the module is imported, which type checkers do not do.
Event, SessionLog = event_pb2.Event, event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]


def utilisation(method: Method, tokens_per_second: float) -> float | None:
    """Model FLOP utilisation of the mesh's devices, which need not be all, or None where their peak is not known."""
    peak = method.platform.peak_flops
    if peak is None:
        return None
    return tokens_per_second * method.costs().flops_per_token / (peak * method.mesh.size)


class _TensorBoard:
    """A file of TensorBoard events, written as they come: the library's own writer hands them to a thread, and waits
    for ever for one that a full disk has ended."""

    def __init__(self, folder: pathlib.Path, resumed_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tensorboardX.event_file_writer.EventsWriter(str(folder / "events"), f".{os.getpid()}")
        # What was written for later steps is not shown any more.
        start = SessionLog(status=SessionLog.SessionStatus.Value("START"))
        self._write(resumed_step + 1, session_log=start)

    def _write(self, step: int, **what: Any) -> None:
        self._file.write_event(Event(wall_time=time.time(), step=step, **what))

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None:
                self._write(step, summary=tensorboardX.summary.scalar(name, value))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def check_sinks(config: Config) -> None:
    """Checks that what the metrics are to be sent to is there.

    Raises:
      ValueError: Weights & Biases is asked for, and not installed.
    """
    project = config.logging.wandb
    there = not project or importlib.util.find_spec("wandb") is not None
    require(there, "logging.wandb", project, "nothing, for wandb is not installed (pip install wandb)")


class _WeightsAndBiases:
    """A run of Weights & Biases with the workdir's name, with which a run that is resumed goes on.

    Raises:
      ValueError: it does not begin.
    """

    def __init__(self, project: str, workdir: Workdir, config: Mapping[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]  # here, for who does not ask for it need not have it

        # The folder knows its run there; one that is trained anew in its place is another.
        if not workdir.wandb_file.exists():
            write_atomically(workdir.wandb_file, uuid.uuid4().hex)
        name, identity = workdir.path.name, workdir.wandb_file.read_text()
        try:
            self._run = wandb.init(project=project, name=name, id=identity, resume="allow", config=dict(config))
        except Exception as error:  # a library of many kinds of errors
            raise ValueError(f"config.logging.wandb = {project!r}: {error}") from error

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        self._run.log({name: value for name, value in values.items() if value is not None}, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        self._run.finish()


class MetricsLog:
    """Appends to metrics.jsonl, to TensorBoard, and to Weights & Biases if that is asked for.

    Lines beyond the step that a run resumes from are dropped.

    A line that is no metrics of a step is put aside with those like it, and the others are kept.

    For a run in a bucket both are written to a local folder, and uploaded whole by ``publish``. Only the first
    process writes. A context manager.
    """

    def __init__(self, workdir: Workdir, resumed_step: int, config: Config, lock: Lock):
        """Begins with what a run that resumes from a step has written before.

        Raises:
          ValueError: Weights & Biases is asked for, and does not begin.
        """
        self._lock = lock
        # A bucket cannot be appended to: a local copy is written, and uploaded.
        self._remote = workdir.path if workdir.remote else None
        self._scratch = tempfile.TemporaryDirectory() if workdir.remote else None
        self._folder = pathlib.Path(self._scratch.name if self._scratch else workdir.path)
        self._local = self._folder / "metrics.jsonl"
        self._lines: list[dict[str, Any]] = []
        self._writing = jax.process_index() == 0
        self._note = ""
        self._sinks: list[_TensorBoard | _WeightsAndBiases] = []
        if not self._writing:
            return
        # Lines of steps that will be done again are dropped, and what is no line is kept elsewhere.
        stored = workdir.metrics_file
        if stored.exists():
            good, broken = _parse(stored.read_bytes())
            self._lines = [line for line in good if line["step"] <= resumed_step]
            if broken:
                copy = workdir.copy_aside(stored)
                self._note = f"{stored}: {broken} lines that are no metrics were left out; all of it is kept in {copy}"
        self._rewrite()
        if config.logging.tensorboard:
            self._sinks.append(_TensorBoard(self._folder / "tb", resumed_step))
        if config.logging.wandb:
            self._sinks.append(_WeightsAndBiases(config.logging.wandb, workdir, config.to_dict()))
        self.publish()

    @property
    def note(self) -> str:
        """What has to be said of the lines that were there; nothing where there is nothing to say."""
        return self._note

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        # What went wrong before is what is reported: a full disk or a lost lock, which these would run into again.
        with contextlib.suppress(*([OSError, ValueError] if kind else [])):
            if self._writing:
                self.publish()
                for sink in self._sinks:
                    sink.close()
        if self._scratch:
            self._scratch.cleanup()

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Adds values to the step's line; None and what is not finite become null, and are left out of TensorBoard.

        Raises:
          ValueError: another process has taken the run over.
        """
        values = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
        # A step that is evaluated after it was logged has one line.
        again = bool(self._lines) and self._lines[-1]["step"] == step
        if again:
            self._lines[-1].update(values)
        else:
            self._lines.append({"step": step, **values})
        if not self._writing:
            return
        # From here on it is the first process alone, on its files.
        if self._remote is None:
            self._lock.check()  # a run that was taken over must not put its lines among the other's
        if again:
            self._rewrite()
        else:
            with self._local.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self._lines[-1]) + "\n")
        for sink in self._sinks:
            sink.write(step, values)

    def _rewrite(self) -> None:
        write_atomically(epath.Path(self._local), "".join(json.dumps(line) + "\n" for line in self._lines))

    def has(self, step: int, name: str) -> bool:
        """Whether a value of that name was written for that step, as the first process knows."""
        return any(line["step"] == step and name in line for line in self._lines)

    def publish(self) -> None:
        """Uploads everything, if the run lives in a bucket.

        Raises:
          ValueError: another process has taken the run over.
        """
        if not self._writing:
            return
        if self._remote is not None:
            self._lock.check()
        for sink in self._sinks:
            sink.flush()
        if self._remote is not None:
            # All files whole, for a bucket keeps no part of one.
            for file in (path for path in self._folder.rglob("*") if path.is_file()):
                target = self._remote / str(file.relative_to(self._folder))
                target.parent.mkdir(parents=True, exist_ok=True)
                with file.open("rb") as local, target.open("wb") as uploaded:
                    shutil.copyfileobj(local, uploaded)


def read_metrics(workdir: Workdir) -> list[dict[str, Any]]:
    """The lines of a run's metrics, in their order; none where there is no such file."""
    file = workdir.metrics_file
    return _parse(file.read_bytes())[0] if file.exists() else []


def _parse(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Reads the lines of a metrics file; returns those that are metrics, and how many others there are.

    A last line that a crash cut short, without its end, is dropped.
    """
    lines, broken = [], 0
    # What follows the last newline was being written, and is none.
    *whole, _ = content.split(b"\n")
    for line in filter(None, whole):
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict) and type(parsed.get("step")) is int:
            lines.append(parsed)
        else:
            broken += 1
    return lines, broken
