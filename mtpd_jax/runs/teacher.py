"""The teacher of a run that keeps one: the model that it started from, stored once, as a run of its own.

It lies in the folder ``teacher`` of the run, which can be opened like any other, to be decoded beside its student or to
be scored. The run that it came from need not be there any more. Its digest stands in the student's checkpoints.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mtpd_jax.config import Config, HeadsConfig, ObjectiveConfig
from mtpd_jax.methods.method import Method
from mtpd_jax.methods.partition import language_model
from mtpd_jax.runs.checkpoint import Checkpointer, read_record
from mtpd_jax.runs.choice import latest_step
from mtpd_jax.runs.lock import Lock
from mtpd_jax.runs.models import RunModel, backbone_digest
from mtpd_jax.runs.workdir import Workdir
from mtpd_jax.shapes import Parameters
from mtpd_jax.sharding import within
from mtpd_jax.training.state import TrainState, abstract_parameters


def teacher_folder(folder: Workdir) -> Workdir:
    """Where the teacher of a run lies."""
    return Workdir(folder.path / "teacher")


def teacher_record(parameters: Parameters) -> dict[str, Any]:
    """What checkpoints of a student say of its teacher."""
    return {"digest": backbone_digest(language_model(parameters))}


def keep_teacher(folder: Workdir, lock: Lock, origin: dict[str, Any], parameters: Parameters) -> None:
    """Stores the teacher; another one, of a run that was ended before its first checkpoint, is put aside.

    Args:
      folder: of the run, whose tokenizer is there.
      lock: of the run.
      origin: what the run's checkpoints will say of where it comes from.
      parameters: of the model that it starts from.

    Raises:
      OSError: it cannot be written.
    """
    kept, about = teacher_folder(folder), origin["teacher"]
    if latest_step(kept) is not None and read_record(kept).get("teacher") == about:
        return
    if jax.process_index() == 0:
        if kept.path.exists():
            folder.set_aside(kept.path)
        kept.write_config(_config_of(Config.stored(origin["config"])))
        folder.tokenizer_file.copy(kept.tokenizer_file, overwrite=True)
    # Its documents are those of the run that it comes from, and of those before.
    own, *before = origin["sources"]
    older = {"config": origin["config"], "step": origin["step"], "sources": before} if before else None
    record = {"data": {"source": own}, "tokenizer": folder.tokenizer_digest(), "origin": older, "teacher": about}
    state = TrainState(jnp.zeros((), jnp.int32), language_model(parameters), optimizer=None, average=None, frozen=None)
    with Checkpointer(kept, keep=1, lock=lock) as checkpointer:
        config = _config_of(Config.stored(origin["config"]))
        checkpointer.save(0, state, config, {**record, "tokens": 0, "seconds": 0.0})


def read_teacher(folder: Workdir, method: Method, origin: dict[str, Any]) -> Parameters | None:
    """What is frozen of a run that goes on, made of the teacher that it keeps; None where that teaches nothing.

    Raises:
      ValueError: it is not there, or not what it was.
    """
    kept = teacher_folder(folder)
    if not kept.config_file.exists() or latest_step(kept) is None:
        raise ValueError(f"{kept.path}: the teacher of this run is not there; put it back, or start a new run")
    parameters = RunModel(kept).read(method.mesh).parameters
    check_teacher(kept, parameters, origin)
    _, wanted = abstract_parameters(method)
    if wanted is None:
        return None
    shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    return jax.jit(within(method.mesh, method.frozen_of), out_shardings=shardings)(parameters)


def check_teacher(kept: Workdir, parameters: Parameters, origin: dict[str, Any]) -> None:
    """Checks that what lies where a run keeps its teacher is the one that its checkpoints name.

    Raises:
      ValueError: it is not.
    """
    if backbone_digest(parameters) != origin["teacher"]["digest"]:
        raise ValueError(f"{kept.path}: not the teacher of this run (its parameters differ); put its own back")


def _config_of(config: Config) -> Config:
    """The config of a model without heads or masks, whatever trained it."""
    joint = ObjectiveConfig.cases[ObjectiveConfig.default_case]()
    model = dataclasses.replace(config.model, mask_embedding=False)
    return dataclasses.replace(config, heads=HeadsConfig(num_heads=0), objective=joint, model=model)
