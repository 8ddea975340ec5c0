"""The folder of a run: its config and tokenizer, written once and checked on every later use."""

import dataclasses
import json

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
    def remote(self) -> bool:
        """Whether the folder lies in a bucket, where files cannot be appended to."""
        return "://" in str(self.path)

    def check(self, config: Config) -> None:
        """Checks that a config may be run here; creates nothing.

        Raises:
          ValueError: the folder holds a run with another config, or files that are no run at all.
        """
        if self.config_file.exists():
            changed = differences(self.read_config(), config)
            if changed:
                verb = "differs" if len(changed) == 1 else "differ"
                raise ValueError(
                    f"{self.path} holds a run with another config: {', '.join(changed)} {verb}; "
                    "use another --workdir, or the config that it was made with"
                )
        elif self.path.exists() and not (
            self.path.is_dir() and all(_is_temporary(file) for file in self.path.iterdir())
        ):
            raise ValueError(f"{self.path} exists and holds no run (no config.json): use a new or an empty folder")

    def read_config(self) -> Config:
        """Reads config.json.

        Raises:
          ValueError: there is no run here, or its config cannot be read.
        """
        if not self.config_file.exists():
            raise ValueError(f"{self.path}: holds no run (no config.json); train one with mtpd_jax.train")
        try:
            return Config.build(json.loads(self.config_file.read_text()))
        except ValueError as error:
            raise ValueError(f"{self.config_file}: not a readable config ({error})") from error

    def write_config(self, config: Config) -> None:
        """Creates the folder, if need be, and writes config.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config_file, json.dumps(config.to_dict(), indent=2) + "\n")

    def read_tokenizer(self, config: Config) -> Tokenizer:
        """Reads tokenizer.json.

        Raises:
          ValueError: it is missing or cannot be read.
        """
        if not self.tokenizer_file.exists():
            raise ValueError(f"{self.tokenizer_file} is missing: the run stopped before it began; train it again")
        return Tokenizer.load(self.tokenizer_file, config.tokenizer.end_token)


def open_workdir(path: str) -> Workdir:
    """Names a run's folder. A local path is made absolute, which is what checkpoints need.

    Raises:
      ValueError: it is a bucket, and what reads buckets is not installed.
    """
    try:
        named = epath.Path(path)
        named.exists()
    except ImportError as error:
        raise ValueError(f"--workdir={path}: {error} (pip install 'etils[epath-gcs]')") from error
    return Workdir(named if "://" in str(path) else named.expanduser().resolve())


def _is_temporary(path: epath.Path) -> bool:
    """Whether a file is what ``write_atomically`` leaves when it is killed."""
    return path.name.endswith(".tmp")


def write_atomically(path: epath.Path, text: str) -> None:
    """Writes a file so that a reader, or a crash, finds either the old contents or the new."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
