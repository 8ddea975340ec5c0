"""Reading a trained run: its config, tokenizer and parameters, which is what evaluation and generation begin with."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from mtpd_jax.config import Config
from mtpd_jax.data.documents import Document
from mtpd_jax.data.sources import identity, open_source, split
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.methods.method import method_of
from mtpd_jax.model.backbone import LanguageModel
from mtpd_jax.runs.choice import Choice, parse_choice
from mtpd_jax.runs.models import RunModel
from mtpd_jax.runs.progress import say
from mtpd_jax.runs.workdir import Workdir, open_workdir
from mtpd_jax.shapes import Parameters
from mtpd_jax.sharding import copies_of, make_mesh
from mtpd_jax.training.feasibility import devices_per_copy
from mtpd_jax.validation import check_integer


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A checkpoint of a run, ready to use.

    Attributes:
      folder: the workdir.
      config, tokenizer, model: of the run.
      parameters: the averaged ones if the run keeps an average.
      mesh: where they lie, whatever mesh the run was trained on; see ``load_run``.
      step: optimizer steps done.
      sources: the documents that it was trained on (see ``sources.identity``); if it extends another run, that one's
        after its own.
      other_backbone: whether its heads were trained on another backbone.
    """

    folder: Workdir
    config: Config
    tokenizer: Tokenizer
    model: LanguageModel
    parameters: Parameters
    mesh: Mesh
    step: int
    sources: tuple[dict[str, Any], ...]
    other_backbone: bool = False

    def held_out_documents(self) -> Iterator[Document]:
        """The run's own held-out documents.

        Raises:
          ValueError: its data are not what they were when it was trained: what it was trained on might count as held
            out, for a document's side is decided by a hash of its text.
        """
        data = self.config.data
        # Compared document by document, through a digest of them all.
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


def load_run(
    workdir: str,
    checkpoint: Choice = None,
    devices_per_model: int | None = None,
    backbone: str | None = None,
    other_backbone: bool = False,
) -> TrainedRun:
    """Loads a run's config, tokenizer and parameters; the optimizer's state is not read.

    A damaged checkpoint is passed over for the one before, and a line on standard error says so.

    Args:
      workdir: of the run.
      checkpoint: its step, "newest", or "best", by decoding while the run trained; None: the best of a run that rates
        its checkpoints so and whose text stays as it was (heads on a frozen backbone), else the newest.
      devices_per_model: devices that share one copy of the model, split by the rules (``ShardingRules``); as many
        copies as there is room for share the work. None: as few as the model fits on.
      backbone: of a run that names its backbone, the workdir or folder where that lies now; None: where it lay.
      other_backbone: take another one, too, on which the heads were not trained.

    Raises:
      ValueError: there is no run in the folder, no checkpoint that can be read, or the run's files were changed; the
        devices cannot share the model so.
    """
    # The config says what it is, and how many devices it takes.
    folder, choice = open_workdir(workdir), parse_choice(checkpoint)
    config = folder.read_config()
    if devices_per_model is None:
        devices_per_model = devices_per_copy(config, jax.devices())
    check_integer("devices_per_model", devices_per_model)
    if devices_per_model < 1 or jax.device_count() % devices_per_model:
        raise ValueError(f"devices_per_model = {devices_per_model}: expected a divisor of {jax.device_count()} devices")
    # The run's own method says what its parameters are; where they lie is for here to say.
    method = method_of(config, make_mesh(copies_of(devices_per_model)))
    model = RunModel(folder).read(method.mesh, choice, backbone, other_backbone)
    if model.note:
        say(model.note)
    parameters, tokenizer = jax.block_until_ready(model.parameters), folder.read_tokenizer(config)
    sources = tuple(model.sources)
    of_run = folder, config, tokenizer, method.model, parameters, method.mesh, model.step, sources
    return TrainedRun(*of_run, model.other_backbone)
