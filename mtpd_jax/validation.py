"""What arguments, and a configuration's values, have to be: each by itself, and those beside others."""

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtpd_jax.config import (
        Config,
        DataConfig,
        HeadsConfig,
        InitConfig,
        ModelConfig,
        ObjectiveConfig,
        TokenizerConfig,
    )


def check_integer(name: str, value: object) -> None:
    """Checks the type of an argument.

    Raises:
      ValueError: naming the argument and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} = {value!r}: expected an integer")


def check_number(name: str, value: object) -> None:
    """Checks the type of an argument; see ``check_integer``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} = {value!r}: expected a number")


def check_flag(name: str, value: object) -> None:
    """Checks the type of an argument; see ``check_integer``."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} = {value!r}: expected True or False")


def check(config: "Config") -> None:
    """Checks every value and every relation between values.

    Raises:
      ValueError: naming the field, the value and what is allowed.
    """
    for section in dataclasses.fields(config):
        _check_numbers(getattr(config, section.name), section.name)
    _validate_data(config.data, config.tokenizer)
    _validate_model(config.model, config.heads)
    _validate_init(config.init, config.objective, config.heads)
    # How many heads a loop trains is known once the run that it extends has been looked at.
    known = config.objective.mode == "joint" or config.init.num_heads is not None
    _validate_objective(config.objective, config.trained_heads if known else None)
    _validate_training(config)


def _require(condition: bool, path: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"config.{path} = {value!r}: expected {expected}")


_MAY_BE_ZERO = {
    "validation_fraction",
    "warmup_steps",
    "weight_decay",
    "num_heads",
    "seed",
    "shuffle_window",
    "final_fraction",
    "b1",
    "b2",
}
_MAY_BE_MINUS_ONE = {"data", "fsdp"}


def _check_numbers(section: Any, name: str) -> None:
    for field in dataclasses.fields(section):
        value, path = getattr(section, field.name), f"{name}.{field.name}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        _require(value == value and abs(value) != float("inf"), path, value, "a finite number")
        if field.name in {"alpha", "beta"} or field.name in _MAY_BE_ZERO:
            _require(value >= 0, path, value, "zero or more")
        elif not (name == "mesh" and field.name in _MAY_BE_MINUS_ONE and value == -1):
            _require(value > 0, path, value, "more than zero")


def _validate_data(data: "DataConfig", tokenizer: "TokenizerConfig") -> None:
    sources = ("python", "text", "jsonl", "tfds")
    _require(data.source in sources, "data.source", data.source, "one of " + ", ".join(sources))
    if data.source in ("text", "jsonl"):
        _require(len(data.paths) > 0, "data.paths", data.paths, f"at least one file or glob for source {data.source!r}")
    if data.source == "text":
        _require(data.separator != "", "data.separator", data.separator, "the text that stands between documents")
    if data.source in ("jsonl", "tfds"):
        _require(data.field != "", "data.field", data.field, "the name of the field that holds the text")
    if data.source == "tfds":
        _require(data.name != "", "data.name", data.name, "the name of a tensorflow-datasets data set")
    _require(data.validation_fraction < 1, "data.validation_fraction", data.validation_fraction, "less than one")
    _require(tokenizer.end_token != "", "tokenizer.end_token", tokenizer.end_token, "the token that ends a document")


def _validate_model(model: "ModelConfig", heads: "HeadsConfig") -> None:
    _require(
        model.query_heads % model.kv_heads == 0,
        "model.kv_heads",
        model.kv_heads,
        f"a divisor of model.query_heads = {model.query_heads}",
    )
    _require(model.head_size % 2 == 0, "model.head_size", model.head_size, "an even number (RoPE rotates pairs)")
    # 256 bytes and the end token: a smaller byte-level vocabulary cannot write every text.
    _require(model.vocabulary_size >= 257, "model.vocabulary_size", model.vocabulary_size, "at least 257")
    dtypes = ("auto", "float32", "bfloat16")
    _require(model.dtype in dtypes, "model.dtype", model.dtype, "one of " + ", ".join(dtypes))
    kinds = ("cascade", "recurrent")
    _require(heads.kind in kinds, "heads.kind", heads.kind, "one of " + ", ".join(kinds))


def _validate_init(init: "InitConfig", objective: "ObjectiveConfig", heads: "HeadsConfig") -> None:
    modes = ("joint", "loop")
    _require(objective.mode in modes, "objective.mode", objective.mode, "one of " + ", ".join(modes))
    if objective.mode == "joint":
        _require(not init.workdir, "init.workdir", init.workdir, "nothing with objective.mode = 'joint'")
        _require(init.num_heads is None, "init.num_heads", init.num_heads, "None with objective.mode = 'joint'")
        return
    _require(init.workdir != "", "init.workdir", init.workdir, "the workdir of the run to extend")
    _require(heads.kind == "cascade", "heads.kind", heads.kind, "cascade: a recurrent head runs to any depth as it is")
    if init.num_heads is not None:
        _require(init.num_heads > 0, "init.num_heads", init.num_heads, "at least one head to begin from")
        _require(
            heads.num_heads > init.num_heads,
            "heads.num_heads",
            heads.num_heads,
            f"more than the {init.num_heads} heads of {init.workdir}, which is to be extended",
        )
    _require(
        objective.detach_teacher, "objective.detach_teacher", objective.detach_teacher, "True: the teacher is frozen"
    )


def _validate_objective(objective: "ObjectiveConfig", trained_heads: int | None) -> None:
    kinds = ("forward", "reverse", "js", "tv", "lk", "lk_hybrid")
    _require(objective.kl in kinds, "objective.kl", objective.kl, "one of " + ", ".join(kinds))
    _require(
        objective.detach_teacher or not objective.detach_trunk,
        "objective.detach_teacher",
        objective.detach_teacher,
        "True with detach_trunk: the teacher's logits are the trunk's",
    )
    for name in ("alpha", "beta"):
        value = getattr(objective, name)
        if isinstance(value, tuple) and trained_heads is not None:
            expected = f"one number or {trained_heads} (the heads that are trained), each zero or more"
            _require(len(value) == trained_heads, f"objective.{name}", value, expected)
            _require(all(0 <= number < float("inf") for number in value), f"objective.{name}", value, expected)


def _validate_training(config: "Config") -> None:
    optimizer, training, heads = config.optimizer, config.training, config.heads
    schedules = ("cosine", "linear", "wsd")
    _require(
        optimizer.schedule in schedules, "optimizer.schedule", optimizer.schedule, "one of " + ", ".join(schedules)
    )
    for name in ("decay_fraction", "final_fraction"):
        _require(getattr(optimizer, name) <= 1, f"optimizer.{name}", getattr(optimizer, name), "at most one")
    for name in ("b1", "b2", "ema_decay"):
        value = getattr(optimizer, name)
        _require(value is None or value < 1, f"optimizer.{name}", value, "less than one")
    _require(training.steps < 2**31, "training.steps", training.steps, "less than 2**31: they are counted in 32 bits")
    _require(
        optimizer.warmup_steps < training.steps,
        "optimizer.warmup_steps",
        optimizer.warmup_steps,
        f"fewer than training.steps = {training.steps}",
    )
    _require(
        training.batch_size % training.micro_batches == 0,
        "training.micro_batches",
        training.micro_batches,
        f"a divisor of training.batch_size = {training.batch_size}",
    )
    _require(
        training.sequence_length > heads.num_heads + 1,
        "training.sequence_length",
        training.sequence_length,
        f"more than heads.num_heads + 1 = {heads.num_heads + 1}, so that the last head has a target",
    )
    _require(training.seed < 2**32, "training.seed", training.seed, "less than 2**32")
    mesh = config.mesh
    _require(not mesh.data == mesh.fsdp == -1, "mesh.data", mesh.data, "at most one of data and fsdp to be -1")
    _require(mesh.expert == 1, "mesh.expert", mesh.expert, "1 (no layer has experts)")
