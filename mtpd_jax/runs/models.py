"""Models that there are: of a run, or of a folder as Hugging Face's libraries write them. What others start from.

A run of heads on a frozen backbone does not store the backbone: it names where it lies, and its digest, so that no
other is ever taken for it by mistake.
"""

import dataclasses
import pathlib
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from mtpd_jax.config import Config, differences
from mtpd_jax.data.files import json_digest, read_json
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.interop.reading import TOKENIZER, Found, look, read_parameters
from mtpd_jax.methods.method import Method, method_of
from mtpd_jax.methods.partition import without_heads
from mtpd_jax.runs.checkpoint import read_record, restore_parameters
from mtpd_jax.runs.choice import NEWEST, Choice, latest_step, steps_of
from mtpd_jax.runs.digests import digests_of
from mtpd_jax.runs.workdir import Workdir, open_workdir
from mtpd_jax.shapes import Parameters
from mtpd_jax.training.state import abstract_parameters


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that was read.

    Attributes:
      parameters: of all of it; the average, if a run keeps one.
      step: optimizer steps done; 0 of a folder.
      sources: which documents it was trained on (see ``sources.identity``).
      backbone: where its backbone lies: ``path``, ``step`` and ``digest``.
      note: what has to be said of it; nothing where there is nothing to say.
      other_backbone: whether its heads were trained on another one.
    """

    parameters: Parameters
    step: int
    sources: list[dict[str, Any]]
    backbone: dict[str, Any]
    note: str = ""
    other_backbone: bool = False


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A backbone that heads were trained on.

    Attributes:
      parameters: of the model without its heads.
      where: it lies, as a run records it: ``path``, ``step`` and ``digest``.
      other: whether it is another one after all.
    """

    parameters: Parameters
    where: dict[str, Any]
    other: bool


class OtherBackboneError(ValueError):
    """A backbone is not the one that heads were trained on."""


@dataclasses.dataclass(frozen=True)
class RunModel:
    """The model of a run."""

    folder: Workdir

    @property
    def path(self) -> epath.Path:
        """Where it lies, and what goes with its tokenizer."""
        return self.folder.path

    @property
    def config(self) -> Config:
        return self.folder.read_config()

    def tokenizer(self, config: Config) -> Tokenizer:
        """Its tokenizer, with the tokens around a text that a config names."""
        return self.folder.read_tokenizer(config)

    def is_origin(self, origin: dict[str, Any]) -> bool:
        """Whether it is what another run began from: by its config, and by what it was trained on."""
        return (
            latest_step(self.folder) is not None
            and not differences(self.config, Config.stored(origin["config"]))
            and trained_on(read_record(self.folder)) == origin["sources"]
        )

    def read(
        self, mesh: Mesh, choice: Choice = None, backbone: str | None = None, other_backbone: bool = False
    ) -> Model:
        """Reads it.

        Args:
          mesh: where it is to lie.
          choice: of the checkpoint; see ``runs.choice``.
          backbone, other_backbone: see ``read_backbone``; of runs that name theirs.

        Raises:
          ValueError: there is no checkpoint, none that can be read, or its backbone cannot be used.
        """
        config = self.config
        method = method_of(config, mesh)
        if choice is None and not method.freezes_text:
            choice = NEWEST
        restored = restore_parameters(self.folder, method, choice)
        record = restored.record
        self.folder.check_tokenizer(record["tokenizer"])
        trained, frozen = restored.tree
        where, other = {"path": str(self.path), "step": restored.step}, False
        if method.names_backbone:
            found = read_backbone(method, record["origin"]["backbone"], backbone, other_backbone)
            frozen, where, other = found.parameters, found.where, found.other
        elif backbone is not None or other_backbone:
            raise ValueError(f"--backbone, --other_backbone: expected neither, for {self.path} has its own backbone")
        whole = method.merge(trained, frozen)
        return Model(whole, restored.step, trained_on(record), where, restored.note(self.folder), other)


@dataclasses.dataclass(frozen=True)
class FolderModel:
    """The model of a folder."""

    found: Found

    @property
    def path(self) -> epath.Path:
        """Where it lies, and what goes with its tokenizer."""
        return epath.Path(self.found.path)

    @property
    def config(self) -> Config:
        return self.found.config

    def tokenizer(self, config: Config) -> Tokenizer:
        """Its tokenizer, with the tokens around a text that a config names."""
        return Tokenizer.load(self.path / TOKENIZER, config.tokenizer)

    def is_origin(self, origin: dict[str, Any]) -> bool:
        """Whether it is what a run began from: by its config and its weights."""
        return (
            not differences(self.config, Config.stored(origin["config"]))
            and [self.found.identity()] == origin["sources"]
        )

    def read(self, mesh: Mesh, choice: Choice = None, backbone: str | None = None) -> Model:
        """Reads it onto a mesh.

        Raises:
          ValueError: a checkpoint or a backbone is named, and it has neither; or a tensor is not what it has to be.
        """
        if choice is not None or backbone is not None:
            raise ValueError(
                f"{self.path}: expected neither a checkpoint nor a backbone, for it is a folder of a model"
            )
        trained, _ = abstract_parameters(method_of(self.config, mesh))
        tree = read_parameters(self.found, lambda: None)
        parameters = jax.tree.map(lambda array, like: jax.device_put(array, like.sharding), tree, trained)
        where, note = {"path": str(self.path), "step": 0}, "\n".join(self.found.notes)
        return Model(parameters, 0, [self.found.identity()], where, note)


def open_model(path: str) -> RunModel | FolderModel:
    """The model in a folder: a workdir, or one with the config.json of Hugging Face's libraries.

    Raises:
      ValueError: it is neither; or the folder's model cannot be read, and why.
    """
    folder = open_workdir(path)
    local = pathlib.Path(folder.path)
    if not folder.remote and _is_pretrained(local / "config.json"):
        return FolderModel(look(local))
    return RunModel(folder)


def _is_pretrained(config: pathlib.Path) -> bool:
    try:
        return "model_type" in read_json(config)
    except (OSError, ValueError):
        return False


def backbone_digest(parameters: Parameters) -> str:
    """A hash of all of a model's parameters but its heads, bit for bit."""
    digests, _ = digests_of(without_heads(parameters))
    return json_digest(digests)


def read_backbone(
    method: Method, where: dict[str, Any], path: str | None = None, other_backbone: bool = False
) -> Backbone:
    """Reads the backbone that heads were trained on.

    Args:
      method: of the heads' run, on whose mesh it is to lie.
      where: its ``path``, ``step`` and ``digest``, as the run recorded them.
      path: where it lies now; None: where it lay.
      other_backbone: take one of the same shapes, too, that is not the same.

    Raises:
      OtherBackboneError: it is another one.
      ValueError: it is not there, or has another shape.
    """
    name = where["path"] if path is None else path
    try:
        model = open_model(name)
        # A run that went on has newer checkpoints, too.
        there = isinstance(model, RunModel) and where["step"] in steps_of(model.folder)
        read = model.read(method.mesh, where["step"] if there else None)
    except ValueError as error:
        if isinstance(error, OtherBackboneError):
            raise
        raise ValueError(
            f"{name}: the backbone that the heads were trained on cannot be read ({error}); "
            "where it lies elsewhere, name that folder with --backbone"
        ) from error
    _, wanted = abstract_parameters(method)
    frozen = without_heads(read.parameters)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree) for tree in (frozen, wanted)]
    if shapes[0] != shapes[1]:
        raise OtherBackboneError(f"{name}: a model of another shape than that which the heads were trained on")
    other = backbone_digest(frozen) != where["digest"]
    if other and not other_backbone:
        raise OtherBackboneError(
            f"{name}: not the backbone that the heads were trained on (its parameters differ); "
            "--other_backbone takes it all the same, and measures how well they fit"
        )
    return Backbone(frozen, {"path": str(model.path), "step": read.step, "digest": where["digest"]}, other)


def trained_on(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Which documents a run was trained on, by its record: see ``all_sources``."""
    return all_sources(record["data"]["source"], record["origin"])


def all_sources(own: dict[str, Any], origin: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Which documents a run was trained on (see ``sources.identity``), its own first, then those of its origin."""
    return [own] if origin is None else [own, *origin["sources"]]
