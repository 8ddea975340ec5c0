"""Runs the project's commands in processes of their own, with something going wrong at a chosen place."""

import contextlib
import dataclasses
import functools
import importlib
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
# Nothing here takes a tenth of it: what does has hung.
LIMIT = 120.0

# Where a command is: what is called there. A fault comes at such a call, or a moment later.
PHASES = {
    "train": {
        "flags": "mtpd_jax.frontdoor:parse_config_flags",
        "config": "mtpd_jax.runs.plan:completed",
        "data": "mtpd_jax.runs.plan:open_source",
        "lock": "mtpd_jax.train:take_lock",
        "tokenizer": "mtpd_jax.data.tokenizer:Tokenizer.train",
        "creation": "mtpd_jax.train:Workdir.write_config",
        "digest": "mtpd_jax.data.pipeline:identity",
        "initial state": "mtpd_jax.train:initial_state",
        "restoring": "mtpd_jax.train:restore_state",
        "opening metrics": "mtpd_jax.train:MetricsLog",
        "compilation": "mtpd_jax.train:make_step",
        "step": "mtpd_jax.trainer:put_on_devices",
        "logging": "mtpd_jax.trainer:Trainer._log",
        "evaluation": "mtpd_jax.evaluation.scoring:Scorer.sum_documents",
        "writing metrics": "mtpd_jax.train:MetricsLog.write",
        "saving": "mtpd_jax.train:Checkpointer.save",
        "waiting for a save": "mtpd_jax.train:Checkpointer.wait",
        "leaving": "mtpd_jax.train:MetricsLog.__exit__",
    },
    "generate": {
        "opening": "mtpd_jax.generate:open_run",
        "decoding": "mtpd_jax.evaluation.generation:Decoder.run",
        "showing": "mtpd_jax.generate:show",
        "writing": "mtpd_jax.generate:write_json",
    },
    "evaluate": {
        "opening": "mtpd_jax.evaluate:open_run",
        "scoring": "mtpd_jax.evaluation.scoring:Scorer.score",
        "decoding": "mtpd_jax.evaluate:decode_prompts",
        "counting": "mtpd_jax.evaluate:compare_ways",
        "writing": "mtpd_jax.evaluate:write_json",
    },
}


def place_of(command: str, phase: str) -> tuple[Any, str]:
    """The module or class of what is called in a phase, and its name there."""
    module, _, names = PHASES[command][phase].partition(":")
    *path, name = names.split(".")
    return functools.reduce(getattr, path, importlib.import_module(module)), name


@dataclasses.dataclass(frozen=True)
class Strike:
    """A fault: what happens ``delay`` seconds after a phase was entered for the ``call``-th time."""

    command: str
    phase: str
    action: Callable[[], Any]
    call: int = 1
    delay: float = 0.0

    def arm(self, marker: int) -> None:
        """Puts itself in the way of the phase, in the process that is to be struck, and marks a pipe when it does."""
        owner, name = place_of(self.command, self.phase)
        real, calls = owner.__dict__[name], []
        function = real.__func__ if isinstance(real, classmethod) else real

        def strike() -> None:
            os.write(marker, b"!")
            self.action()

        def struck(*arguments: Any, **options: Any) -> Any:
            calls.append(None)
            if len(calls) == self.call:
                if self.delay:
                    threading.Timer(self.delay, strike).start()
                else:
                    strike()
            return function(*arguments, **options)

        setattr(owner, name, classmethod(struck) if isinstance(real, classmethod) else struck)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended: its status (None: it hung), what it wrote, and whether the fault came before the end."""

    status: int | None
    output: str
    errors: str
    struck: bool = False

    def complaint(self, *allowed: int) -> str | None:
        """What is wrong with it, whatever the fault was: it hung, crashed, or said more or less than a line."""
        if self.status is None:
            return f"hung for {LIMIT:.0f} s"
        if self.status not in allowed:
            return f"exit status {self.status}: {self.errors[-300:]}"
        lines = [line for line in self.errors.splitlines() if line.strip()]
        strange = [line for line in lines if not _KNOWN.match(line)]
        if strange:
            return f"says {strange[0][:300]!r}"
        errors = sum(line.startswith("error: ") for line in lines)
        if errors != (self.status in (1, 2)):
            return f"exit status {self.status} with {errors} lines of error: {self.errors[-300:]}"
        return None


# What a command may say on standard error: what it does, how far it is, what is wrong.
_KNOWN = re.compile(
    r"error: |interrupted$|step \d+(/\d+)? |\S+: (training|resuming|already finished|asked to stop|damaged: |without )"
    r"|/\S+: \d+ lines that are no metrics|no checkpoint is there|nothing is held out|held-out text: |[\d,]+ steps take"
    r"|compiling .* …$|  (heads|decoded): "
)


def run(command: str, arguments: list[str], strike: Strike | None = None) -> Outcome:
    """Runs a command in a fork of this process, which has imported everything and started nothing."""
    readers, writers = zip(*(os.pipe() for _ in range(3)), strict=True)
    child = os.fork()
    if not child:
        _become(command, arguments, strike, writers)
    for writer in writers:
        os.close(writer)
    return _gather(child, dict.fromkeys(readers, b""))


def _become(command: str, arguments: list[str], strike: Strike | None, writers: tuple[int, ...]) -> None:
    try:
        os.setpgid(0, 0)
        for number, writer in enumerate(writers[:2], 1):
            os.dup2(writer, number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = [command, *arguments]
        module, frontdoor = (importlib.import_module(f"mtpd_jax.{name}") for name in (command, "frontdoor"))
        if strike is not None:
            strike.arm(writers[2])
        frontdoor.guarded(module.main)
    except BaseException:
        traceback.print_exc()
    os._exit(70)


def run_from_the_start(command: str, arguments: list[str], number: int, delay: float) -> Outcome:
    """Runs a command as a user does, and sends it a signal ``delay`` seconds after it was started."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"mtpd_jax.{command}", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as for a user, whoever started the soak
    )  # fmt: skip
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    struck = process.poll() is None
    if struck:
        process.send_signal(number)
    try:
        output, errors = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        return Outcome(None, *process.communicate(), struck)
    return Outcome(process.returncode, output, errors, struck)


def _gather(child: int, found: dict[int, bytes]) -> Outcome:
    """Reads what a child writes until it ends; kills it when it does not."""
    deadline, status, open_pipes = time.monotonic() + LIMIT, None, set(found)
    while time.monotonic() < deadline:
        for reader in select.select(list(open_pipes), [], [], 0.05)[0]:
            data = os.read(reader, 1 << 16)
            found[reader] += data
            if not data:
                open_pipes.discard(reader)
        ended, code = os.waitpid(child, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(code)
            break
    else:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    texts = []
    for reader, data in found.items():
        while reader in open_pipes and select.select([reader], [], [], 0)[0]:
            more = os.read(reader, 1 << 16)
            if not more:
                break
            data += more
        os.close(reader)
        texts.append(data.decode(errors="replace"))
    return Outcome(status, *texts[:2], struck=bool(texts[2]))
