"""Ctrl-C and SIGTERM at any moment: one line, at once or when the run has saved, and never a traceback."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# A command that is in code which does not come back to Python, or not soon.
STUCK = """
    import ctypes, sys, time
    from mtpd_jax import frontdoor
    from mtpd_jax.runs import interruption
    interruption._PATIENCE = 0.6

    def main():
        print("ready", flush=True)
        if sys.argv[1] == "run":
            with interruption.StopRequest() as stop:
                print("ready", flush=True)
                if sys.argv[2] == "hears":
                    while not stop.asked():
                        time.sleep(0.01)
                    time.sleep(1.5)  # saving takes longer than anybody's patience
                    return 128 + stop.signal
                stuck()
        stuck()

    def stuck():
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):  # a signal does not interrupt the second call, and so no handler of Python's runs
            ctypes.CDLL(None).pthread_mutex_lock(mutex)

    frontdoor.guarded(main)
"""


def python(*arguments, cwd=ROOT):
    """Starts Python as a shell in front of a user does: whoever started these tests may have them ignore Ctrl-C."""
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def start(*arguments):
    process = python("-c", textwrap.dedent(STUCK), *arguments)
    for _ in range(2 if arguments[0] == "run" else 1):
        assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    return process


def end(process):
    errors = process.communicate(timeout=30)[1]
    return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_ends_at_once_wherever_it_is(number):
    process = start("command")
    process.send_signal(number)
    assert end(process) == (128 + number, "interrupted\n")


def test_a_run_that_does_not_hear_is_ended():
    process = start("run", "deaf")
    process.send_signal(signal.SIGTERM)
    status, errors = end(process)
    assert status == 128 + signal.SIGTERM
    assert errors == "error: what runs did not end within 1 s of being asked to stop\n"


def test_a_second_interrupt_ends_it_at_once():
    process = start("run", "deaf")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert end(process) == (128 + signal.SIGINT, "interrupted\n")


def test_a_run_that_has_heard_may_take_its_time():
    process = start("run", "hears")
    process.send_signal(signal.SIGTERM)
    assert end(process) == (128 + signal.SIGTERM, "")


def test_ctrl_c_while_a_command_imports_says_nothing():
    process = python("-m", "mtpd_jax.generate", "--help")
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    assert end(process) == (-signal.SIGINT, "")


def test_help_reaches_whoever_reads_it():
    """Through a pipe, with output that is kept back until somebody asks for it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for command in ("train", "generate"):
        found = subprocess.run(
            [sys.executable, "-m", f"mtpd_jax.{command}", "--help"], cwd=ROOT, env=environment, capture_output=True
        )
        assert found.returncode == 0 and b"--workdir" in found.stdout


@pytest.mark.parametrize("closed", [False, True], ids=["full", "closed"])
def test_an_error_that_nobody_can_be_told_has_its_status(closed):
    """And is not written where results are."""
    where = "2>&-" if closed else "2>/dev/full"
    found = subprocess.run(f"{sys.executable} -m mtpd_jax.train {where}", shell=True, cwd=ROOT, capture_output=True)
    assert (found.returncode, found.stdout) == (2, b"")


def test_a_command_that_is_interrupted_in_python_says_so_once():
    program = """
        import os, signal, time
        from mtpd_jax import frontdoor

        def main():
            raise KeyboardInterrupt

        frontdoor.guarded(main)
    """
    assert end(python("-c", textwrap.dedent(program))) == (130, "interrupted\n")


def test_a_library_does_not_touch_the_handlers(tmp_path):
    program = "import signal, mtpd_jax; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert python("-c", program).communicate(timeout=60) == ("True\n", "")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "__init__.py").write_text("import mtpd_jax")
    (tmp_path / "job" / "work.py").write_text(program)
    process = python("-m", "job.work", cwd=tmp_path)  # another program, which imports it while it is being found
    assert process.communicate(timeout=60) == ("True\n", "")


def test_what_libraries_say_of_a_failure_is_not_shown():
    """Threads that fail, futures that nobody asks, warnings, and what C code writes when an interpreter ends."""
    program = """
        import asyncio, logging, threading, warnings
        from mtpd_jax import frontdoor

        def main():
            warnings.warn("a warning")
            logging.getLogger("asyncio").error("an error")
            thread = threading.Thread(target=lambda: 1 / 0)
            thread.start()
            thread.join()
            threading.Thread(target=lambda: threading.Event().wait()).start()  # which would keep it from ending
            raise OSError(28, "No space left on device", "a file")

        frontdoor.guarded(main)
    """
    process = python("-c", textwrap.dedent(program))
    assert end(process) == (2, "error: a file: No space left on device\n")
