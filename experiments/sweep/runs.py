"""What a sweep runs: variants as config diffs, and the keys by which their runs and rows are known."""

import ast
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import mtpd_jax
from experiments.sweep.scale import Scale
from mtpd_jax.config import Config

# Of mtpd_jax.
_DECIDING = (
    *("config.py", "sharding.py", "shapes.py", "data/*.py", "model/*.py", "losses/*.py", "decoding/*.py"),
    *(f"training/{name}.py" for name in ("loop", "optimizer", "partition", "state", "step")),
    "evaluation/*.py",
)

# More than any experiment has.
_SEEDS = 1000

# They decide where and how often a run writes, not what it learns.
_LEFT_OUT = ("mesh", "checkpoint", "logging", "evaluation")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One arm of an experiment.

    Attributes:
      name: its name in tables and in ``--only``.
      diff: ``section.field`` -> value, over the scale's base config.
      start: the variant whose heads are extended; None: trained from nothing.
      decode: numbers of heads to decode with, beside none, one, and all that it has.
      seeds: the only ones of the experiment's that it is run with, where a run is too long for all; None: all.
    """

    name: str
    diff: Mapping[str, Any] = dataclasses.field(hash=False)
    start: "Variant | None" = None
    decode: tuple[int, ...] = ()
    seeds: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """A variant with a seed at a scale."""

    variant: Variant
    seed: int
    scale: Scale

    @property
    def start(self) -> "Run | None":
        """The run that this one starts from."""
        return None if self.variant.start is None else Run(self.variant.start, self.seed, self.scale)

    @property
    def extensions(self) -> int:
        """How many times heads were added, this run included."""
        return 0 if self.start is None else 1 + self.start.extensions

    def config(self, root: pathlib.Path) -> Config:
        """The config to train with; ``root`` is the folder that all runs lie in.

        Raises:
          ValueError: a diff names no field, or its value is out of range.
        """
        # An extension reads the data in another order than what it starts from, and so not the same batches again.
        diff = {"training.seed": self.seed + _SEEDS * self.extensions, **self.variant.diff}
        if self.start is not None:
            diff |= {"objective.mode": "loop", "init.workdir": str(self.start.workdir(root))}
        return self.scale.changed(diff)

    def training_key(self) -> str:
        """A hash of every field of the configuration that decides what is learned, but for the seed."""
        tree = self.config(pathlib.Path()).to_dict()
        del tree["training"]["seed"], tree["init"]
        trained = {name: fields for name, fields in tree.items() if name not in _LEFT_OUT}
        return _digest([trained, None if self.start is None else self.start.training_key()])

    def key(self) -> str:
        """A hash of what is learned and how it is measured: with seed and code version, the name of a row."""
        scale = self.scale
        return _digest([self.training_key(), self.heads(), scale.texts, scale.prompt_tokens, scale.new_tokens])

    def heads(self) -> list[int]:
        """Numbers of heads to decode with."""
        most = self.config(pathlib.Path()).heads.num_heads
        return sorted({0, most, *([1] if most else []), *self.variant.decode})

    def workdir(self, root: pathlib.Path) -> pathlib.Path:
        """Where this version of the code trains it. Variants of several experiments that learn the same share it."""
        return root / f"{self.training_key()}-{code_version()}-seed{self.seed}"


@functools.cache
def code_version() -> str:
    """A hash of the code that decides results; what only checks, stores and reports is left out."""
    package, measuring = pathlib.Path(mtpd_jax.__path__[0]), pathlib.Path(__file__).with_name("measure.py")
    files = [path for name in _DECIDING for path in sorted(package.glob(name))]
    return version_of([*files, measuring])


def version_of(files: Sequence[pathlib.Path]) -> str:
    """A hash of the syntax of files of Python, so that comments, docstrings and layout are free."""
    return _digest([ast.unparse(_without_docstrings(ast.parse(path.read_text()))) for path in files])


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
