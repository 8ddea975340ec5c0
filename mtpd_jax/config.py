"""The configuration as frozen dataclasses: built from ml_collections at the edge, checked once, then passed around.

``configs/base.py`` holds every field with its value and unit; the classes here hold no defaults, so that a value
stands in one place only.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from mtpd_jax import validation

PerHead = float | tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str
    packages: bool
    paths: tuple[str, ...]
    separator: str
    field: str
    name: str
    split: str
    directory: str
    validation_fraction: float
    shuffle_window: int


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    path: str
    end_token: str
    train_bytes: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vocabulary_size: int
    width: int
    layers: int
    query_heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    rope_theta: float
    norm_epsilon: float
    qk_norm: bool
    qkv_bias: bool
    tied_unembedding: bool
    scale_embedding: bool
    remat: bool
    dtype: str


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    num_heads: int
    kind: str
    pass_normed: bool


@dataclasses.dataclass(frozen=True)
class InitConfig:
    workdir: str
    num_heads: int | None


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    mode: str
    alpha: PerHead
    beta: PerHead
    top_n: int
    temperature: float
    kl: str
    detach_teacher: bool
    detach_trunk: bool
    chunk_rows: int | None

    def coefficients(self, num_heads: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns (alpha, beta), one number per head that is trained.

        None stands for the defaults: alpha = 0.3 / heads being trained (DeepSeek-V3's lambda spread over the heads;
        our choice), beta = 1 with one head and 0.5 with more (MTP-D §4).
        """
        alpha = 0.3 / max(num_heads, 1) if self.alpha is None else self.alpha
        beta = (1.0 if num_heads == 1 else 0.5) if self.beta is None else self.beta

        def per_head(value: float | tuple[float, ...]) -> tuple[float, ...]:
            return value if isinstance(value, tuple) else (float(value),) * num_heads

        return per_head(alpha), per_head(beta)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float
    schedule: str
    warmup_steps: int
    decay_fraction: float
    final_fraction: float
    weight_decay: float
    b1: float
    b2: float
    epsilon: float
    clip_norm: float | None
    ema_decay: float | None


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    steps: int
    batch_size: int
    sequence_length: int
    micro_batches: int
    seed: int


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int
    fsdp: int
    tensor: int
    expert: int


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int
    keep: int


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    every_steps: int
    tensorboard: bool


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    every_steps: int
    documents: int


# A run may be resumed with other values of these: none of them changes what a given step computes, except that another
# mesh rounds differently, and that the number of steps also moves the end of a decaying learning rate, which is what
# someone who prolongs a run asks for. Where the data lie is free, for what they hold is told by a digest.
RESUMABLE = frozenset(
    {
        "data.paths",
        "training.steps",
        "checkpoint.every_steps",
        "checkpoint.keep",
        "logging.every_steps",
        "logging.tensorboard",
        "evaluation.every_steps",
        "evaluation.documents",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
        "mesh.expert",
    }
)


@dataclasses.dataclass(frozen=True)
class Config:
    data: DataConfig
    tokenizer: TokenizerConfig
    model: ModelConfig
    heads: HeadsConfig
    init: InitConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    evaluation: EvaluationConfig

    @property
    def frozen_heads(self) -> int | None:
        """Heads that stay as they are, and with them backbone, embedding and unembedding; None: all is trained."""
        return self.init.num_heads if self.objective.mode == "loop" else None

    @property
    def trained_heads(self) -> int:
        """Heads that the objective trains."""
        return self.heads.num_heads - (self.frozen_heads or 0)

    @classmethod
    def build(cls, tree: Mapping[str, Any]) -> "Config":
        """Builds and validates a config from a nested mapping (a ConfigDict, or the parsed config.json).

        Raises:
          ValueError: a field is missing, unknown, of the wrong type or out of range; the message names the field,
            its value and what is allowed.
        """
        config = _build(cls, tree, "config")
        config.validate()
        return config

    @classmethod
    def of(cls, config: Any) -> "Config":
        """The config that a caller gave: a ``Config``, a ConfigDict, or a nested mapping.

        Raises:
          ValueError: it is none of these; or see ``build``.
        """
        if isinstance(config, Config):
            return cls.build(config.to_dict())
        if isinstance(config, ml_collections.ConfigDict):
            return cls.build(config.to_dict())
        if isinstance(config, Mapping):
            return cls.build(config)
        raise ValueError(f"config = {config!r}: expected a Config, a ConfigDict, or a nested mapping")

    def to_dict(self) -> dict[str, Any]:
        """The config as nested plain dictionaries, ready for JSON."""
        return dataclasses.asdict(self)

    def validate(self) -> None:
        """Checks every value and every relation between values.

        Raises:
          ValueError: naming the field, the value and what is allowed.
        """
        validation.check(self)


def differences(left: Config, right: Config) -> list[str]:
    """Names the fields (``section.field``) in which two configs differ, leaving out those that a resume may change."""
    left_tree, right_tree = left.to_dict(), right.to_dict()
    names = []
    for section, fields in left_tree.items():
        names += [f"{section}.{name}" for name in fields if fields[name] != right_tree[section][name]]
    return [name for name in names if name not in RESUMABLE]


def _build(cls: Any, tree: Any, path: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} = {tree!r}: expected a section with fields")
    hints = typing.get_type_hints(cls)
    unknown = [name for name in tree if name not in hints]
    if unknown:
        raise ValueError(f"{path}.{unknown[0]}: no such field; fields of {path} are {', '.join(hints)}")
    missing = [name for name in hints if name not in tree]
    if missing:
        raise ValueError(f"{path}.{missing[0]} is missing: configs/base.py has every field")
    values = {}
    for name, hint in hints.items():
        nested = dataclasses.is_dataclass(hint)
        value = tree[name]
        values[name] = _build(hint, value, f"{path}.{name}") if nested else _convert(value, hint, f"{path}.{name}")
    return cls(**values)


def _convert(value: Any, hint: Any, path: str) -> Any:
    """Accepts an int where a float is due and a list where a tuple is due; nothing else is converted."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if option in (int, bool, str) and type(value) is option:
            return value
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            item = typing.get_args(option)[0]
            return tuple(_convert(element, item, f"{path}[{index}]") for index, element in enumerate(value))
    names = " or ".join(
        "None" if option is type(None) else getattr(option, "__name__", str(option)) for option in options
    )
    raise ValueError(f"{path} = {value!r}: expected {names}")
