"""What a config and a workdir come to, and all that can be wrong with them, before anything is created."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections
import optax

from mtpd_jax.config import Config
from mtpd_jax.data.sources import Source, open_source
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.methods.method import Method, method_of
from mtpd_jax.runs.choice import NEWEST, Choice, candidates, latest_step
from mtpd_jax.runs.metrics import check_sinks
from mtpd_jax.runs.origin import completed
from mtpd_jax.runs.tokenizers import fitting, given_tokenizer, train_tokenizer
from mtpd_jax.runs.workdir import Workdir, open_workdir
from mtpd_jax.sharding import check_batch, make_mesh
from mtpd_jax.training.feasibility import check_attention, check_training
from mtpd_jax.training.optimizer import make_optimizer
from mtpd_jax.training.state import TrainState, abstract_state


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that may begin, or go on.

    Attributes:
      config: with what it leaves to the run that it starts from filled in.
      folder: the workdir, which need not be there.
      method, optimizer: what trains.
      abstract: shapes, types and places of the state.
      source: of documents.
      given_tokenizer: of the config or the run to start from; None: the run has its own, or one has to be trained.
      notes: what has to be said of it; empty ones where there is nothing to say.
    """

    config: Config
    folder: Workdir
    method: Method
    optimizer: optax.GradientTransformation
    abstract: TrainState
    source: Source
    given_tokenizer: Tokenizer | None
    notes: tuple[str, ...]

    def tokenizer(self) -> Tokenizer:
        """The run's own, which it has once it has begun; before that the given one, or one that is trained now.

        Raises:
          ValueError: the run's own cannot be read, or does not fit the model.
        """
        if self.folder.tokenizer_file.exists():
            return fitting(self.folder.read_tokenizer(self.config), self.config)
        return self.given_tokenizer or train_tokenizer(self.config, self.source)


def planned(
    config: Config | ml_collections.ConfigDict | Mapping[str, Any], workdir: str, checkpoint: Choice = NEWEST
) -> Plan:
    """Looks at everything that can be wrong, but for the parameters of a run to start from.

    Args:
      config: a ``Config``, the ConfigDict of a config file, or the same as nested mappings.
      workdir: the run's folder.
      checkpoint: that the run would go on from.

    Raises:
      ValueError: bad config, data or workdir.
    """
    folder = open_workdir(workdir)
    config = completed(Config.of(config), folder)
    folder.check(config, begun=latest_step(folder) is not None)
    candidates(folder, checkpoint)  # which says what is there, if it is not
    check_batch(mesh := make_mesh(config.mesh), config.training)
    check_sinks(config)
    method, optimizer = method_of(config, mesh), make_optimizer(config)
    notes = check_training(method), check_attention(method)
    abstract, source = abstract_state(method, optimizer), open_source(config.data)
    given = given_tokenizer(config, folder, source)
    return Plan(config, folder, method, optimizer, abstract, source, given, notes)
