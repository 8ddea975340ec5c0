"""Small disks, to be filled up."""

import pathlib
import subprocess


class Disk:
    """A file system in memory of a size that can be changed; wants the right to mount one."""

    def __init__(self, place: pathlib.Path):
        """Mounts it, or raises ``CalledProcessError`` where that is refused."""
        self._place = place
        place.mkdir(parents=True, exist_ok=True)
        self.make(100)

    def make(self, kilobytes: int) -> pathlib.Path:
        """An empty disk of this size, in place of the one before."""
        self.remove()
        _call("mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(self._place))
        return self._place

    def resize(self, kilobytes: int) -> None:
        """Makes room."""
        _call("mount", "-o", f"remount,size={kilobytes}k", str(self._place))

    def remove(self) -> None:
        """Unmounts it."""
        if self._place.is_mount():
            _call("umount", str(self._place))


def _call(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
