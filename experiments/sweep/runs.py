"""What a sweep runs: variants as config diffs, and the keys by which their runs and rows are known."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.sweep.scale import Scale
from mtpd_jax.config import Config
from mtpd_jax.data.files import json_digest
from mtpd_jax.fields import is_as_before

# More than any experiment has: seeds are 0 to this, less one.
SEEDS = 1000

# They decide where and how often a run writes, not what it learns.
_LEFT_OUT = ("mesh", "checkpoint", "logging", "evaluation")
# A row has the seed beside its key, the key of the run that it starts from in it, and digests of a scale's inputs.
_SAID_OTHERWISE = ("training.seed", "objective.source", "objective.frozen_heads", "data.paths", "data.path")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One arm of an experiment.

    Attributes:
      name: its name in tables and in ``--only``.
      diff: ``section.field`` -> value, over the scale's base config.
      start: the variant that it starts from; None: trained from nothing, or from what the diff names. What it does
        with that is extension, unless the diff names another ``objective.mode``.
      decode: numbers of heads to decode with, beside none, one, and all that it has.
      seeds: the only ones of the experiment's that it is run with, where a run is too long for all; None: all.

    Raises:
      ValueError: a name with a comma, which ``--only`` could not name.
    """

    name: str
    diff: Mapping[str, Any] = dataclasses.field(hash=False)
    start: "Variant | None" = None
    decode: tuple[int, ...] = ()
    seeds: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if "," in self.name:
            raise ValueError(f"variant {self.name!r}: a comma stands between names in --only; use none in a name")


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
    def family(self) -> str:
        """The part of the code that its row depends on; see ``fingerprint.FAMILIES``."""
        mode = self.config().objective.mode
        return mode if mode in ("posthoc", "standalone") else "heads"

    @property
    def extensions(self) -> int:
        """How many times heads were added, this run included."""
        return 0 if self.start is None else 1 + self.start.extensions

    def config(self, start: pathlib.Path | None = None) -> Config:
        """The config to train with; ``start`` is where the run that this one starts from lies.

        Raises:
          ValueError: a diff names no field, or its value is out of range.
        """
        # An extension reads the data in another order than what it starts from, and so not the same batches again.
        diff = {"training.seed": self.seed + SEEDS * self.extensions, **self.variant.diff}
        if self.start is not None:
            diff = {"objective.mode": "extension", **diff, "objective.source": str(start or "-")}
        return self.scale.changed(diff)

    def training_key(self) -> str:
        """A hash of every field of the configuration that decides what is learned, but for the seed."""
        key = [decided(self.config()), None if self.start is None else self.start.training_key()]
        return digest(key + ([dict(self.scale.inputs)] if self.scale.inputs else []))

    def key(self) -> str:
        """A hash of what is learned and how it is measured: with seed and code version, the name of a row."""
        scale = self.scale
        return digest([self.training_key(), self.heads(), scale.texts, scale.prompt_tokens, scale.new_tokens])

    def heads(self) -> list[int]:
        """Numbers of heads to decode with."""
        most = self.config().heads.num_heads
        return sorted({0, most, *([1] if most else []), *self.variant.decode})

    def workdir(self, root: pathlib.Path, code: str) -> pathlib.Path:
        """Where a version of the code trains it. Variants of several experiments that learn the same share it."""
        return root / f"{self.training_key()}-{code}-seed{self.seed}"


def decided(config: Config) -> dict[str, Any]:
    """The fields that decide what a run learns, by name: what rows are known by.

    A field that came later than rows is among them where it differs from what they did before there was one: so it
    disowns no row, and a default that changes does.
    """
    found = {}
    for section, fields in config.to_dict().items():
        declared = {one.name: one for one in dataclasses.fields(getattr(config, section))}
        for name, value in fields.items():
            later = name in declared and is_as_before(declared[name], value)
            if section not in _LEFT_OUT and f"{section}.{name}" not in _SAID_OTHERWISE and not later:
                found[f"{section}.{name}"] = value
    return found


def digest(value: Any) -> str:
    """A short hash of a value that JSON can hold."""
    return json_digest(value)[:12]
