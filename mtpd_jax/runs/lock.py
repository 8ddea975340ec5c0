"""One process at a time trains in a workdir."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from typing import Any, Protocol

import jax
from etils import epath

from mtpd_jax.runs.workdir import Workdir, write_atomically

# In a bucket nothing dies with its holder: a lock counts as left behind when it was not renewed for so long.
_RENEWED_EVERY = 60.0
_LEFT_BEHIND_AFTER = 300.0
# What file systems say that have no locks.
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


class Lock(Protocol):
    """Held from creation on; a context manager that gives it back."""

    def __enter__(self) -> "Lock": ...

    def __exit__(self, *_: Any) -> None: ...

    def check(self) -> None:
        """Checks that it is still held.

        Raises:
          ValueError: another process took it.
        """
        ...


def take_lock(workdir: Workdir, break_lock: bool = False) -> Lock:
    """Takes the lock of a run's folder, which is created if it is not there.

    With several processes the first one takes it for all.

    Args:
      workdir: of the run.
      break_lock: take it from whoever holds it; that process stops when it is about to save.

    Raises:
      ValueError: another process has it; the message names the process and its host.
    """
    # The first process holds it for all.
    if jax.process_index():
        return _HeldElsewhere()
    if not workdir.remote:
        try:
            return _FileLock(workdir, break_lock)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    return _Lease(workdir, break_lock)


def _holder() -> dict[str, Any]:
    """Who this is."""
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": since, "token": secrets.token_hex(8)}


def _taken(workdir: Workdir, holder: dict[str, Any]) -> ValueError:
    who = f"process {holder.get('process', 'unknown')} on {holder.get('host', 'an unknown host')}"
    return ValueError(
        f"{workdir.path}: {who} has been at work here since {holder.get('since', 'an unknown time')}; wait for it, "
        "or stop it (training can take the run from it with --break_lock)"
    )


def _read(text: str) -> dict[str, Any]:
    """A holder's description; empty where there is none, as between taking a lock and writing one's name."""
    with contextlib.suppress(ValueError, RecursionError):
        holder = json.loads(text)
        if isinstance(holder, dict):
            return holder
    return {}


class _HeldElsewhere:
    """What the other processes have, of which the first holds the lock."""

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: Any) -> None:
        """Gives nothing back."""

    def check(self) -> None:
        """Nothing to check here."""


class _FileLock:
    """A lock of the operating system on DIR/lock, which ends with the process however it ends."""

    def __init__(self, workdir: Workdir, break_lock: bool):
        self._workdir, self._path = workdir, pathlib.Path(workdir.lock_file)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if break_lock:
            self._path.unlink(missing_ok=True)  # the holder keeps a lock on a file without a name
        self._file = self._open()
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(_holder()).encode(), 0)
        except OSError as error:
            self.__exit__()
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def _open(self) -> int:
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _read(os.pread(file, 10_000, 0).decode(errors="replace"))
                os.close(file)
                raise _taken(self._workdir, holder) from None
            except OSError:
                os.close(file)
                raise
            if self._is_ours(file):
                return file
            os.close(file)  # given back, and its name removed, between the two calls

    def _is_ours(self, file: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(self._path.stat(), os.fstat(file))
        return False

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._is_ours(self._file):
            self._path.unlink()
            with contextlib.suppress(OSError):  # where nothing came of it, no folder is left; elsewhere it is not empty
                self._path.parent.rmdir()
        os.close(self._file)

    def check(self) -> None:
        if not self._is_ours(self._file):
            text = self._path.read_text(errors="replace") if self._path.exists() else ""
            raise _lost(self._workdir, _read(text))


def _lost(workdir: Workdir, holder: dict[str, Any]) -> ValueError:
    if not holder:
        return ValueError(f"{workdir.path}: its lock is gone (was the folder deleted or moved?); nothing more is saved")
    who = f"process {holder.get('process')} on {holder.get('host')}"
    return ValueError(f"{workdir.path}: {who} took this run over; nothing more is saved from here")


class _Lease:
    """A lock in a bucket: an object that its holder renews. Two that begin within the same second may both have it
    until either saves, for object stores do not all create a thing only where there is none."""

    def __init__(self, workdir: Workdir, break_lock: bool):
        self._workdir, self._path, self._me = workdir, epath.Path(workdir.lock_file), _holder()
        holder = self._stored()
        if holder and not break_lock and time.time() - holder.get("renewed", 0) < _LEFT_BEHIND_AFTER:
            raise _taken(workdir, holder)
        self._renew()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _stored(self) -> dict[str, Any]:
        return _read(self._path.read_text()) if self._path.exists() else {}

    def _renew(self) -> None:
        write_atomically(self._path, json.dumps({**self._me, "renewed": time.time()}))

    def _is_ours(self) -> bool:
        return self._stored().get("token") == self._me["token"]

    def _keep(self) -> None:
        while not self._over.wait(_RENEWED_EVERY):
            with contextlib.suppress(Exception):  # a bucket out of reach for a minute: the next save will say so
                if self._is_ours():
                    self._renew()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()
        if self._is_ours():
            self._path.unlink()

    def check(self) -> None:
        if not self._is_ours():
            raise _lost(self._workdir, self._stored())
