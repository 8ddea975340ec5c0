"""The small parts of a run: being asked to stop, how far it is, files written whole, where parameters come from."""

import io
import os
import signal

import jax
import numpy as np
import pytest
import rich.console

from mtpd_jax import trainer
from mtpd_jax.runs import interruption
from mtpd_jax.runs import progress as progress_module
from mtpd_jax.runs import workdir as workdir_module
from mtpd_jax.runs.interruption import StopRequest
from mtpd_jax.runs.progress import Progress
from mtpd_jax.runs.workdir import open_workdir, write_atomically
from mtpd_jax.sharding import make_mesh
from mtpd_jax.training.optimizer import make_optimizer
from mtpd_jax.training.state import initial_state
from tests.builders import method_on, replace, tiny_config


def test_a_second_interrupt_is_heeded_at_once_and_the_old_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt):
        with StopRequest() as stop:
            assert not stop.asked() and stop.signal is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked() and stop.signal == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)  # whoever sends it again is no user at a keyboard
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_patience_goes_by_the_pace_of_a_run(monkeypatch):
    """A run whose steps take minutes is not ended in the middle of one."""
    clock = [0.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: clock[0])
    stop = StopRequest()
    for seconds, patience in ((1, 60), (100, 200), (2, 200), (31, 200), (150, 300)):
        clock[0] += seconds
        stop.asked()
        assert stop.patience == patience


def test_time_left_is_that_of_the_steps_made_here(monkeypatch):
    """A run resumed at step 40 of 100 whose first step is compiled for an hour, and that makes ten more in five
    seconds, needs 24.5 for the 49 that are left."""
    clock = iter([3700.0, 3705.0, 3705.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress_module.rich.progress, "Progress", Bar)
    progress = Progress("training", 100, 40)
    assert progress.remaining() == "-:--"
    progress.advance(1)
    assert progress.remaining() == "-:--"
    progress.advance(10)
    assert progress.remaining() == "0:24"
    progress.advance(25)
    assert progress.remaining() == "0:03"
    assert progress._bar.completed == 76


class Bar:
    """Stands in for the library's bar, which has a clock of its own."""

    disable = False

    def __init__(self, *_, console, **__):
        self.console = console

    def add_task(self, *_, completed, **__):
        self.completed = completed

    def update(self, _, completed=None, description=None):
        self.completed = self.completed if completed is None else completed
        self.description = description


@pytest.mark.parametrize("heads", [0, 1, 3, 16])
def test_a_line_stays_a_line_however_many_heads_there_are(heads):
    scores = {"eval/main/ce": 4.7123, "eval/main/bits_per_byte": 1.88}
    for head in range(1, heads + 1):
        of_head = {"ce": 10 + head / 100, "kl": None if head == 1 else 0.25, "agreement": head / 100}
        scores |= {f"eval/head_{head}/{name}": value for name, value in of_head.items()}
    text = trainer._shown(scores)
    assert max(map(len, f"step 100,000  held out:  {text}".splitlines())) <= 80
    assert text.startswith("main ce 4.712  1.880 bits per byte") and ("\n  heads:  ce" in text) is (heads > 0)
    shown = {0: "", 1: "ce 10.01  kl –  agreement 1 %", 3: "ce 10.01 10.02 10.03  kl", 16: "ce 10.01 10.02 … 10.16  kl"}
    assert shown[heads] in text and ("agreement 1 2 … 16 %" in text) is (heads == 16)


def test_folders_are_named_as_people_name_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_workdir("runs/mine").shown == "runs/mine" and open_workdir(str(tmp_path / "mine")).shown == "mine"
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert open_workdir("../runs").shown == str(tmp_path / "runs")


def test_what_is_being_done_is_shown_until_the_job_moves_on(monkeypatch):
    monkeypatch.setattr(progress_module.rich.progress, "Progress", Bar)
    progress = Progress("decoding", 10)
    progress.show("compiling")
    assert (progress._bar.description, progress._bar.completed) == ("compiling", 0)
    progress.advance(3)
    assert (progress._bar.description, progress._bar.completed) == ("decoding", 3)


def test_without_a_bar_a_command_says_what_is_being_done():
    """And a function that somebody's program calls does not."""
    progress, output = Progress("decoding", 10), io.StringIO()
    progress._bar.live.console = rich.console.Console(file=output)
    progress.show("loading")
    with progress_module.command():
        progress.show("compiling")
    progress.show("writing")
    assert output.getvalue() == "compiling\n"


def test_lines_are_shown_as_they_are(monkeypatch):
    monkeypatch.setattr(progress_module.rich.progress, "Progress", Bar)
    progress, output = Progress("training", 10), io.StringIO()
    progress._bar.console = rich.console.Console(file=output, width=20)
    progress.say("[bold] a path/that/is/longer/than/the/terminal")
    assert output.getvalue() == "[bold] a path/that/is/longer/than/the/terminal\n"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = open_workdir(str(tmp_path)).path / "file.json"
    write_atomically(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new" and [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_two_may_write_one_file_at_once(tmp_path, monkeypatch):
    """Neither takes the other's half-written file for its own, such as two runs of an experiment that record it."""
    path, flush = open_workdir(str(tmp_path)).path / "file.json", workdir_module.os.fsync

    def another_writes(number: int) -> None:
        flush(number)
        monkeypatch.setattr(workdir_module.os, "fsync", flush)
        write_atomically(path, "another's")
        assert path.read_text() == "another's"

    monkeypatch.setattr(workdir_module.os, "fsync", another_writes)
    write_atomically(path, "one's")
    assert path.read_text() == "one's" and [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_parameters_begin_from_the_seed():
    config = tiny_config(mesh__data=1)
    mesh = make_mesh(config.mesh)

    def begun(seed):
        one = replace(config, training__seed=seed)
        return jax.device_get(initial_state(method_on(one, mesh), make_optimizer(one)).parameters)

    first, again, other = (begun(seed)["embedding"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("there", [False, True])
def test_a_notebook_shows_a_bar_if_it_can(there, monkeypatch):
    """Without ipywidgets the library would show a warning in its place."""
    monkeypatch.setattr(progress_module.importlib.util, "find_spec", lambda name: object() if there else None)
    console = rich.console.Console(file=io.StringIO(), force_jupyter=True)
    monkeypatch.setattr(progress_module, "_console", lambda: console)
    assert Progress("training", 10)._bar.disable is not there
