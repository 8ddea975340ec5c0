"""One process at a time trains in a workdir: on a disk, where the lock dies with its holder, and in a bucket."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from mtpd_jax import train
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.runs import lock as lock_module
from mtpd_jax.runs.lock import take_lock
from mtpd_jax.runs.metrics import MetricsLog
from mtpd_jax.runs.workdir import Workdir, open_workdir
from tests.builders import tiny_config


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path, monkeypatch):
    monkeypatch.setattr(Workdir, "remote", request.param == "bucket")
    (tmp_path / "run").mkdir()
    return open_workdir(str(tmp_path / "run"))


def test_a_second_one_is_told_who_has_it(place):
    with take_lock(place) as lock:
        lock.check()
        with pytest.raises(ValueError, match=rf"process {os.getpid()} on {os.uname().nodename} .*--break_lock"):
            take_lock(place)
        lock.check()
    with take_lock(place):
        assert place.lock_file.exists()
    assert not place.lock_file.exists()


def test_one_that_was_broken_is_noticed_by_its_holder_and_left_to_the_new_one(place):
    (place.path / "config.json").write_text("{}")
    with take_lock(place) as old:
        new = take_lock(place, break_lock=True)
        with pytest.raises(ValueError, match=r"process \d+ on .* took this run over; nothing more is saved"):
            old.check()
    new.check()  # giving the old one back did not give away the new one
    with pytest.raises(ValueError, match="--break_lock"):
        take_lock(place)
    with new:
        place.lock_file.unlink()
        with pytest.raises(ValueError, match="its lock is gone"):
            new.check()


def test_it_dies_with_its_holder(tmp_path):
    program = """
        import sys, time
        from mtpd_jax.runs.lock import take_lock
        from mtpd_jax.runs.workdir import open_workdir
        lock = take_lock(open_workdir(sys.argv[1]))
        print("taken", flush=True)
        time.sleep(600)
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "taken\n"
        with pytest.raises(ValueError, match=f"process {holder.pid} on"):
            take_lock(open_workdir(str(tmp_path / "run")))
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with take_lock(open_workdir(str(tmp_path / "run"))) as lock:
        lock.check()
    assert not (tmp_path / "run").exists()  # nothing came of it


def test_in_a_bucket_it_is_renewed_and_left_behind_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(Workdir, "remote", True)
    monkeypatch.setattr(lock_module, "_RENEWED_EVERY", 0.02)
    place = open_workdir(str(tmp_path))
    with take_lock(place):
        first = json.loads(place.lock_file.read_text())["renewed"]
        while json.loads(place.lock_file.read_text())["renewed"] == first:
            pass
    stale = {"host": "a", "process": 1, "token": "b", "renewed": first - lock_module._LEFT_BEHIND_AFTER + 30}
    place.lock_file.write_text(json.dumps(stale))
    with pytest.raises(ValueError, match="process 1 on a"):
        take_lock(place)
    place.lock_file.write_text(json.dumps({**stale, "renewed": stale["renewed"] - 60}))
    with take_lock(place):
        pass


@pytest.fixture
def run_config(text_file):
    return tiny_config(
        data__source="text", data__paths=(text_file,), training__steps=3, checkpoint__every_steps=2,
        evaluation__every_steps=3,
    )  # fmt: skip


def test_a_run_where_another_trains_changes_nothing(run_config, tmp_path):
    place = open_workdir(str(tmp_path / "run"))
    with take_lock(place):
        with pytest.raises(ValueError, match="has been at work here since"):
            train.run(run_config, str(tmp_path / "run"))
        assert [file.name for file in (tmp_path / "run").iterdir()] == ["lock"]
        assert train.run(run_config, str(tmp_path / "run"), break_lock=True).finished


def test_a_process_does_not_keep_itself_out(run_config, tmp_path, monkeypatch):
    """Interrupted while it begins, or without room to write its name, it may try again."""
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train.run(run_config, str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(
            lock_module.os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(OSError, match=r"No space left on device: '.*lock'"):
            train.run(run_config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert train.run(run_config, str(tmp_path / "run")).finished


def test_where_files_cannot_be_locked_a_lease_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    with take_lock(open_workdir(str(tmp_path))) as lock:
        assert isinstance(lock, lock_module._Lease)
        with pytest.raises(ValueError, match="has been at work here"):
            take_lock(open_workdir(str(tmp_path)))
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("remote", [False, True])
def test_metrics_of_a_run_that_was_taken_over_are_the_others(tmp_path, monkeypatch, remote):
    """Whoever lost the lock leaves the winner's lines as they are."""
    monkeypatch.setattr(Workdir, "remote", remote)
    place, config = open_workdir(str(tmp_path)), tiny_config(logging__tensorboard=False)
    with pytest.raises(ValueError, match="took this run over"):
        with take_lock(place) as old, MetricsLog(place, 0, config, old) as losing:
            losing.write(1, {"loss": 1.0})
            with take_lock(place, break_lock=True) as new:
                with MetricsLog(place, 0, config, new) as winning:
                    winning.write(1, {"loss": 2.0})
                losing.write(1, {"eval": 3.0}) if not remote else losing.publish()
    assert [json.loads(line) for line in place.metrics_file.read_text().splitlines()] == [{"step": 1, "loss": 2.0}]


def test_a_run_that_was_taken_over_stops_before_it_saves(run_config, tmp_path, monkeypatch):
    place, taken, real = open_workdir(str(tmp_path / "run")), [], train.make_step

    def taking(*arguments):
        step = real(*arguments)
        return lambda state, batch: (taken or taken.append(take_lock(place, break_lock=True)), step(state, batch))[1]

    monkeypatch.setattr(train, "make_step", taking)
    with pytest.raises(ValueError, match="took this run over; nothing more is saved"):
        train.run(run_config, str(tmp_path / "run"))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    taken[0].check()
    taken[0].__exit__()
