"""Opening a trained run for reading: what evaluation and generation begin with."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from mtpd_jax.config import Config, MeshConfig
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.model.backbone import LanguageModel, build_model
from mtpd_jax.sharding import make_mesh
from mtpd_jax.training.checkpoint import restored_parameters
from mtpd_jax.training.optimizer import make_optimizer
from mtpd_jax.training.state import abstract_state
from mtpd_jax.training.workdir import open_workdir


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run's newest checkpoint, ready to use.

    Attributes:
      config, tokenizer, model: of the run.
      parameters: the averaged ones if the run keeps an average; a whole copy on every device.
      mesh: all devices along ``data``, whatever mesh the run was trained on.
    """

    config: Config
    tokenizer: Tokenizer
    model: LanguageModel
    parameters: Any
    mesh: Mesh


def open_run(workdir: str) -> TrainedRun:
    """Loads a run's config, tokenizer and newest parameters.

    Raises:
      ValueError: there is no run in the folder, or no checkpoint that can be read.
    """
    place = open_workdir(workdir)
    config = place.read_config()
    tokenizer = place.read_tokenizer(config)
    model = build_model(config)
    mesh = make_mesh(MeshConfig(data=jax.device_count(), fsdp=1, tensor=1, expert=1))
    parameters = restored_parameters(place, abstract_state(model, make_optimizer(config), config, mesh))
    return TrainedRun(config, tokenizer, model, parameters, mesh)
