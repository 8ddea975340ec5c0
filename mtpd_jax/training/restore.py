"""Opening a trained run for reading: what evaluation and generation begin with."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from mtpd_jax.config import Config
from mtpd_jax.data.sources import identity, open_source, split
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.methods.method import method_of
from mtpd_jax.model.backbone import LanguageModel
from mtpd_jax.sharding import data_mesh
from mtpd_jax.training.checkpoint import restore_parameters
from mtpd_jax.training.optimizer import make_optimizer
from mtpd_jax.training.origin import trained_on
from mtpd_jax.training.progress import say
from mtpd_jax.training.state import abstract_state
from mtpd_jax.training.workdir import open_workdir


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A checkpoint of a run, ready to use.

    Attributes:
      config, tokenizer, model: of the run.
      parameters: the averaged ones if the run keeps an average; a whole copy on every device.
      mesh: all devices along ``data``, whatever mesh the run was trained on.
      step: optimizer steps done.
      sources: the documents that it was trained on (see ``sources.identity``); if it extends another run, that one's
        after its own.
    """

    config: Config
    tokenizer: Tokenizer
    model: LanguageModel
    parameters: Any
    mesh: Mesh
    step: int
    sources: tuple[dict[str, Any], ...]

    def held_out_documents(self) -> Iterator[str]:
        """The run's own held-out documents.

        Raises:
          ValueError: its data are not what they were when it was trained: what it was trained on might count as held
            out, for a document's side is decided by a hash of its text.
        """
        data = self.config.data
        source = open_source(data)
        present, expected = identity(source), self.sources[0]
        if present != expected:
            raise ValueError(
                f"config.data of the run: the {present['documents']} documents found are not the "
                f"{expected['documents']} that it was trained on, have changed, or were recorded by an earlier "
                "version, so that none is sure to be held out; restore them, or score files that it was not trained on "
                "with --text"
            )
        return split(source, data.validation_fraction, validation=True)


def open_run(workdir: str, checkpoint: int | None = None) -> TrainedRun:
    """Loads a run's config, tokenizer and parameters.

    A damaged checkpoint is passed over for the one before, and a line on standard error says so.

    Args:
      workdir: of the run.
      checkpoint: its step; None: the newest that is whole.

    Raises:
      ValueError: there is no run in the folder, no checkpoint that can be read, or the run's files were changed.
    """
    folder = open_workdir(workdir)
    config = folder.read_config()
    method = method_of(config, data_mesh())
    restored = restore_parameters(folder, method, abstract_state(method, make_optimizer(config)), checkpoint)
    tokenizer = folder.read_tokenizer(config, restored.record["tokenizer"])
    if note := restored.note(folder):
        say(note)
    sources = tuple(trained_on(restored.record))
    parameters = jax.block_until_ready(restored.tree)
    return TrainedRun(config, tokenizer, method.model, parameters, method.mesh, restored.step, sources)
