"""The folder of a run: its config and tokenizer, written once and checked on every later use."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import uuid

from etils import epath

from mtpd_jax.config import Config, differences
from mtpd_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Names the files of a run. ``path`` is a local folder or a bucket (``gs://…``)."""

    path: epath.Path

    @property
    def config_file(self) -> epath.Path:
        return self.path / "config.json"

    @property
    def tokenizer_file(self) -> epath.Path:
        return self.path / "tokenizer.json"

    @property
    def checkpoints(self) -> epath.Path:
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> epath.Path:
        return self.path / "metrics.jsonl"

    @property
    def wandb_file(self) -> epath.Path:
        return self.path / "wandb_id"

    @property
    def lock_file(self) -> epath.Path:
        return self.path / "lock"

    @property
    def shown(self) -> str:
        """Its name for people: within the current folder what stands after that."""
        return shown(self.path)

    @property
    def remote(self) -> bool:
        """Whether the folder lies in a bucket, where files cannot be appended to."""
        return "://" in str(self.path)

    def set_aside(self, file: epath.Path) -> epath.Path:
        """Moves a file or folder of the run to where it is in nobody's way, and returns its new place.

        Nothing that a run has written is deleted because it cannot be used.
        """
        target = self._free_place(file)
        if self.remote:
            file.rename(target)
        else:
            shutil.move(file, target)  # also to another disk, as where a folder of the run is a link
        return target

    def copy_aside(self, file: epath.Path) -> epath.Path:
        """Copies a file that goes on being used; see ``set_aside``."""
        return epath.Path(file.copy(self._free_place(file)))

    def _free_place(self, file: epath.Path) -> epath.Path:
        folder = self.path / "set_aside"
        folder.mkdir(parents=True, exist_ok=True)
        names = itertools.chain([file.name], (f"{file.name}.{number}" for number in itertools.count(2)))
        return next(folder / name for name in names if not (folder / name).exists())

    def check(self, config: Config, begun: bool) -> None:
        """Checks that a config may be run here; creates nothing.

        Args:
          config: to be run.
          begun: whether the run has a checkpoint, which tells its data wherever they lie now.

        Raises:
          ValueError: the folder holds a run with another config, or files that are no run at all.
        """
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise ValueError(f"{self.checkpoints}: expected the folder of the run's checkpoints, found a file")
        # A run goes on with the config that it was made with; once it has begun, its data may lie elsewhere.
        if self.config_file.exists():
            stored = self.read_config()
            changed = differences(stored, config)
            paths = [getattr(one.data, "paths", None) for one in (stored, config)]
            changed += ["data.paths"] if not begun and paths[0] != paths[1] else []
            if changed:
                verb = "differs" if len(changed) == 1 else "differ"
                raise ValueError(
                    f"{self.path} holds a run with another config: {', '.join(changed)} {verb}; "
                    "use another --workdir, or the config that it was made with"
                )
        elif self.path.exists() and not (
            self.path.is_dir() and all(self._is_left_over(file) for file in self.path.iterdir())
        ):
            raise ValueError(f"{self.path} exists and holds no run (no config.json): use a new or an empty folder")

    def _is_left_over(self, file: epath.Path) -> bool:
        """Whether a file is what a run leaves that was ended before it began, or whose folder was deleted meanwhile."""
        if file == self.checkpoints:
            return all(".orbax-checkpoint-tmp" in part.name for part in file.iterdir())
        return is_temporary(file) or file == self.lock_file

    def read_config(self) -> Config:
        """Reads config.json.

        Raises:
          ValueError: there is no run here, or its config cannot be read.
        """
        if not self.config_file.exists():
            raise ValueError(f"{self.path}: holds no run (no config.json); train one with mtpd_jax.train")
        try:
            return Config.stored(json.loads(self.config_file.read_bytes()))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.config_file}: not a readable config ({error})") from error

    def write_config(self, config: Config) -> None:
        """Creates the folder, if need be, and writes config.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config_file, json.dumps(config.to_dict(), indent=2) + "\n")

    def read_tokenizer(self, config: Config) -> Tokenizer:
        """Reads tokenizer.json, which a config of the run says how to use.

        Raises:
          ValueError: it is missing, or cannot be read.
        """
        self._require_tokenizer()
        return Tokenizer.load(self.tokenizer_file, config.tokenizer)

    def check_tokenizer(self, digest: str | None) -> None:
        """Checks that tokenizer.json is what ``tokenizer_digest`` was of when the run was trained; None: unknown.

        Raises:
          ValueError: it is missing, or another one.
        """
        self._require_tokenizer()
        if digest not in (None, self.tokenizer_digest()):
            raise ValueError(
                f"{self.tokenizer_file}: not the tokenizer that the run was trained with; its own has to be put back"
            )

    def tokenizer_digest(self) -> str:
        """A hash of tokenizer.json, as it lies there."""
        return hashlib.sha256(self.tokenizer_file.read_bytes()).hexdigest()

    def _require_tokenizer(self) -> None:
        if not self.tokenizer_file.exists():
            raise ValueError(f"{self.tokenizer_file} is missing, without which the run's tokens cannot be read")


def shown(path: os.PathLike[str]) -> str:
    """A path for people: within the current folder what stands after that."""
    whole = os.fspath(path)
    return whole.removeprefix(f"{pathlib.Path.cwd()}{os.sep}")


def open_workdir(path: str | os.PathLike[str]) -> Workdir:
    """Names a run's folder. A local path is made absolute, which is what checkpoints need.

    Raises:
      ValueError: it is no name of a folder; or it is a bucket, and what reads buckets is not installed.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ValueError(f"workdir = {path!r}: expected the name of a folder, or a bucket path (gs://…)")
    if "\0" in str(path) or ("://" in str(path) and not str(path).startswith("gs://")):
        raise ValueError(f"--workdir={path}: expected a local folder, or a bucket path (gs://…)")
    try:
        named = epath.Path(path)
        named.exists()
    except ImportError as error:
        raise ValueError(f"--workdir={path}: {error} (pip install 'etils[epath-gcs]')") from error
    return Workdir(named if "://" in str(path) else named.expanduser().resolve())


def is_temporary(path: pathlib.PurePath) -> bool:
    """Whether a file is what ``write_atomically`` leaves when it is killed."""
    return path.name.endswith(".tmp")


def write_atomically(path: epath.Path, text: str) -> None:
    """Writes a file so that a reader, or a crash, finds either the old contents or the new.

    Of several processes that write it at once, each writes a file of its own; the last to finish is read.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(text.encode())
            if "://" not in str(path):
                file.flush()
                os.fsync(file.fileno())  # or after a crash the new name might have no contents yet
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
