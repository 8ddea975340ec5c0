"""Folders that are there as a whole, or not at all."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from etils import epath

from mtpd_jax.runs.lock import Lock, take_lock
from mtpd_jax.runs.workdir import Workdir


def check_free(target: pathlib.Path, needed: int) -> None:
    """Checks that a folder may be written: it is not there, or empty, and there is room for so many bytes.

    Raises:
      ValueError: naming what is there, or how much room there is.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists: use a new or an empty folder")
    above = next(folder for folder in target.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{target}: {above} may not be written to")
    free = shutil.disk_usage(above).free
    if free < needed:
        raise ValueError(f"{target}: {needed:,} bytes are to be written, and there is room for {free:,}")


@contextlib.contextmanager
def whole_folder(target: pathlib.Path) -> Iterator[tuple[Workdir, Lock]]:
    """Yields a locked folder to write into, beside the target, which becomes it when all of it is on disk.

    It is called ``.TARGET.mtpd_jax_incomplete``. What a process left there that was killed is deleted by the next one,
    and if this one fails, so is what it has written.

    Raises:
      ValueError: another process is writing it.
    """
    incomplete = target.with_name(f".{target.name}.mtpd_jax_incomplete")
    if incomplete.is_symlink():
        raise ValueError(f"{incomplete}: is a link, and would be emptied; move it away")
    folder = Workdir(epath.Path(incomplete))
    held = pathlib.Path(folder.lock_file)
    with take_lock(folder) as lock:
        try:
            for left in incomplete.iterdir():
                if left != held:
                    shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            yield folder, lock
            # In this order: contents, names, and then the one name that makes it there.
            for path in [*incomplete.rglob("*"), incomplete]:
                _to_disk(path)
            incomplete.rename(target)
            (target / held.name).unlink()
            _to_disk(target.parent)
        except BaseException:
            shutil.rmtree(incomplete, ignore_errors=True)
            raise


def _to_disk(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
