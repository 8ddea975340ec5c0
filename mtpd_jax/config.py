"""The configuration as frozen dataclasses, one section each: defaults, units, and what a value may be.

It is built from ml_collections at the edge, checked once, then passed around. The cases of ``data`` and ``objective``
stand beside the code that reads them (``data.sources``, ``methods``).
"""

import dataclasses
import functools
import importlib
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import ml_collections

from mtpd_jax.fields import (
    POSITIVE,
    ZERO_OR_MORE,
    Constraint,
    Section,
    at_least,
    at_most,
    check_section,
    field,
    flat,
    given,
    less_than,
    read_section,
    require,
)

# Where the cases of sections stand: they are known once these are imported. The one import that goes up, and only when
# a config is built: who adds a method or a source of text changes nothing here.
_CASES = ("mtpd_jax.data", "mtpd_jax.methods")


@dataclasses.dataclass(frozen=True)
class DataConfig(Section, tag="source", default="python"):
    """What every source of documents has; see ``data.sources`` for their own fields."""

    source: ClassVar[str]
    # Share of documents held out, chosen by a hash of their text; 0: none.
    validation_fraction: float = field(0.02, ZERO_OR_MORE, less_than(1, "one"))
    # Packed sequences shuffled among each other, beyond the shuffle of documents.
    shuffle_window: int = field(1024, ZERO_OR_MORE)

    def open(self) -> Any:
        """Opens the documents: a ``data.sources.Source``."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(Section):
    path: str = field("")  # a tokenizer.json; empty: train a byte-level BPE on the training documents
    end_token: str = field("<|endoftext|>", given("the token that ends a document"))  # must be in a given tokenizer
    # The token before every document and prompt, where the tokenizer is of a model that was taught so; empty: none.
    begin_token: str = field("", as_before="")
    # Other tokens that end a text in decoding: those of a model that was taught several.
    more_end_tokens: tuple[str, ...] = field((), resumable=True, as_before=())
    train_bytes: int = field(200_000_000, POSITIVE)  # of training text that the BPE is trained on, at most


# What parameters are kept in, in memory and on disk: those that are trained in float32, what is read of others' models
# as it came. (What products run in is ``model.dtype``.)
Weights = Literal["float32", "bfloat16", "float16"]
_EVEN = Constraint(lambda size: size % 2 == 0, "an even number (RoPE rotates pairs)")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    # Tokens: rows of the embedding, and the size of a BPE trained here. 256 bytes and the end token are the least that
    # a byte-level vocabulary can write every text with.
    vocabulary_size: int = field(32_768, at_least(257))
    width: int = field(768, POSITIVE)  # D, of the hidden states
    layers: int = field(12, POSITIVE)  # Transformer blocks of the backbone
    query_heads: int = field(12, POSITIVE)  # of attention, per block
    kv_heads: int = field(4, POSITIVE)  # each is shared by query_heads / kv_heads query heads
    head_size: int = field(64, POSITIVE, _EVEN)  # of a query head and of a key/value head
    feed_forward: Literal["gated"] = field("gated", as_before="gated")  # the layer after attention: SwiGLU
    mlp_width: int = field(2048, POSITIVE)  # of the gated feed-forward layer
    rope_theta: float = field(10_000.0, POSITIVE)  # the base of RoPE's wavelengths
    # Slower rotation for longer texts than a model was first trained on, as of Llama 3.1: factor, low_freq_factor,
    # high_freq_factor, and the length of texts before; see model.views. Empty: none.
    rope_llama3: tuple[float, ...] = field((), POSITIVE, as_before=())
    norm_epsilon: float = field(1e-6, POSITIVE)  # of RMSNorm
    qk_norm: bool = field(True)  # RMSNorm on queries and keys, each head by itself
    qkv_bias: bool = field(False)  # on queries, keys and values
    tied_unembedding: bool = field(True)  # the unembedding is the embedding
    scale_embedding: bool = field(True)  # multiply input embeddings by sqrt(width)
    # An input embedding beside the vocabulary's, which stands for a token that is not there yet: the id after the last
    # one, vocabulary_size, which no logit is of. A run that trains it says so.
    mask_embedding: bool = field(False, as_before=False)
    remat: bool = field(False)  # recompute each block's activations in the backward pass
    weights: Weights = field("float32", as_before="float32")  # of embedding, backbone and unembedding
    # Of activations; auto: bfloat16 on accelerators, float32 on CPU.
    dtype: Literal["auto", "float32", "bfloat16"] = field("auto")
    # The kernel of training; auto: splash on TPU, triton on GPU, dense on CPU and where a kernel cannot be used.
    attention: Literal["auto", "dense", "splash", "triton", "cudnn"] = field("auto", resumable=True, as_before="dense")
    # Tokens that a text may have, prompt and continuation; None: those of a training sequence.
    context: int | None = field(None, POSITIVE, resumable=True, as_before=None)

    def check(self, config: "Config") -> None:
        """Checks values beside each other; see ``Config.validate``."""
        expected = f"a divisor of model.query_heads = {self.query_heads}"
        require(self.query_heads % self.kv_heads == 0, "model.kv_heads", self.kv_heads, expected)
        expected = "nothing, or factor, low_freq_factor, a larger high_freq_factor, and a length"
        holds = not self.rope_llama3 or (len(self.rope_llama3) == 4 and self.rope_llama3[1] < self.rope_llama3[2])
        require(holds, "model.rope_llama3", self.rope_llama3, expected)
        length = config.training.sequence_length
        expected = f"at least training.sequence_length = {length}, or None"
        require(config.context >= length, "model.context", self.context, expected)
        there = not self.mask_embedding or config.objective.source_run is not None
        require(there, "model.mask_embedding", self.mask_embedding, "False without a run to start from")


@dataclasses.dataclass(frozen=True)
class HeadsConfig(Section):
    num_heads: int = field(4, ZERO_OR_MORE)  # K: tokens drafted beyond the main head's; 0: next-token prediction only
    # cascade: K modules; recurrent: one module, applied K times; see model.heads.
    kind: str = field("cascade", given("a kind of head"))
    # Keys and values of a recurrent head: of each depth by itself, or one cache for all depths; see model.chains.
    cache: Literal["per_depth", "shared"] = field("per_depth", as_before="per_depth")
    pass_normed: bool = field(True)  # a head hands its normed state to the next one (False: the state before its norm)
    weights: Weights = field("float32", as_before="float32")  # of the heads


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Section, tag="mode", default="joint"):
    """What every training method has; see ``methods`` for their own fields."""

    mode: ClassVar[str]
    chunk_rows: int | None = field(None, POSITIVE)  # rows of logits alive at once, per device; None: chosen

    @property
    def source_run(self) -> str | None:
        """The workdir of the run that training starts from, ``objective.source``; None: from random parameters."""
        return None

    @property
    def source_choice(self) -> str | None:
        """Which checkpoint of that run, ``objective.source_checkpoint``; None: the one that it is opened with."""
        return None

    @property
    def longest_span(self) -> int:
        """Tokens that the model itself learns to write in one pass, at most: 1 but for methods that have masks."""
        return 1

    def starting_from(self, source: str) -> "ObjectiveConfig":
        """This section with another ``objective.source``, for methods that have one."""
        return dataclasses.replace(self, source=source)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    learning_rate: float = field(1e-3, POSITIVE)  # at the peak
    schedule: Literal["cosine", "linear", "wsd"] = field("cosine")  # wsd: constant, then a linear decay
    warmup_steps: int = field(500, ZERO_OR_MORE)  # of linear warm-up
    decay_fraction: float = field(0.2, POSITIVE, at_most(1))  # wsd: the share of all steps over which the rate decays
    final_fraction: float = field(0.1, ZERO_OR_MORE, at_most(1))  # of the peak rate, where the decay ends
    weight_decay: float = field(0.1, ZERO_OR_MORE)  # of matrices; norms and biases are not decayed
    b1: float = field(0.9, ZERO_OR_MORE, less_than(1, "one"))  # AdamW's, of the mean
    b2: float = field(0.95, ZERO_OR_MORE, less_than(1, "one"))  # AdamW's, of the squares
    epsilon: float = field(1e-8, POSITIVE)  # AdamW's
    clip_norm: float | None = field(1.0, POSITIVE)  # of the global norm; None: none
    ema_decay: float | None = field(None, POSITIVE, less_than(1, "one"))  # of the copy that is evaluated; None: no copy

    def check(self, config: "Config") -> None:
        """Checks values beside each other; see ``Config.validate``."""
        expected = f"fewer than training.steps = {config.training.steps}"
        require(self.warmup_steps < config.training.steps, "optimizer.warmup_steps", self.warmup_steps, expected)


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Section):
    # Optimizer steps. Resumable, though it also moves the end of a decaying learning rate: that is what someone who
    # prolongs a run asks for.
    steps: int = field(20_000, POSITIVE, less_than(2**31, "2**31", ": they are counted in 32 bits"), resumable=True)
    batch_size: int = field(256, POSITIVE)  # sequences per optimizer step, over all devices
    sequence_length: int = field(1024, POSITIVE)  # tokens
    micro_batches: int = field(1, POSITIVE)  # parts that a step's batch is cut into, in turn, to save memory
    seed: int = field(0, ZERO_OR_MORE, less_than(2**32, "2**32"))  # of the parameters and of the order of the data

    def check(self, config: "Config") -> None:
        """Checks values beside each other; see ``Config.validate``."""
        expected = f"a divisor of training.batch_size = {self.batch_size}"
        require(self.batch_size % self.micro_batches == 0, "training.micro_batches", self.micro_batches, expected)
        needed = config.heads.num_heads + 1
        expected = f"more than heads.num_heads + 1 = {needed}, so that the last head has a target"
        require(self.sequence_length > needed, "training.sequence_length", self.sequence_length, expected)


_MINUS_ONE = Constraint(lambda size: size > 0 or size == -1, "more than zero, or -1")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """Devices per axis; -1 for one of data and fsdp: all that are left. Another mesh rounds differently."""

    data: int = field(-1, _MINUS_ONE, resumable=True)  # copies of the model
    fsdp: int = field(1, _MINUS_ONE, resumable=True)  # parameters and batch split
    tensor: int = field(1, POSITIVE, resumable=True)  # query and key/value heads, feed-forward and vocabulary split
    # Experts split.
    expert: int = field(1, Constraint(lambda size: size == 1, "1 (no layer has experts)"), resumable=True)

    def check(self, config: "Config") -> None:
        """Checks values beside each other; see ``Config.validate``."""
        require(not self.data == self.fsdp == -1, "mesh.data", self.data, "at most one of data and fsdp to be -1")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Section):
    every_steps: int = field(1000, POSITIVE, resumable=True)  # and after the last step
    keep: int = field(2, POSITIVE, resumable=True)  # newest checkpoints kept


@dataclasses.dataclass(frozen=True)
class LoggingConfig(Section):
    every_steps: int = field(20, POSITIVE, resumable=True)  # and after the last step
    tensorboard: bool = field(True, resumable=True)  # write tb/ in the workdir, too
    # A project of Weights & Biases that the metrics are sent to as well; empty: none. Needs wandb, and a login.
    wandb: str = field("", resumable=True, as_before="")


# Prompts that rate, and prompts that are reported.
SOME_OF_BOTH = Constraint(
    lambda value: value != 1, "none, or at least two: some that rate, and others that are reported"
)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Section):
    every_steps: int = field(1000, POSITIVE, resumable=True)  # and after the last step
    documents: int = field(64, POSITIVE, resumable=True)  # held-out documents scored, at most
    # Held-out prompts that are decoded: half of them rate the checkpoint, the others are reported. None: 32 with
    # objective.mode=posthoc, none elsewhere.
    prompts: int | None = field(None, ZERO_OR_MORE, SOME_OF_BOTH, as_before=None)
    prompt_tokens: int = field(32, POSITIVE, as_before=32)  # of each of these prompts, at most
    # Written after each, at most; together with the prompt no more than a training sequence.
    new_tokens: int = field(64, POSITIVE, as_before=64)


# Of configs that earlier versions stored: names that are others now, and values.
_RENAMED = {"init.workdir": "objective.source", "init.num_heads": "objective.frozen_heads"}
_RENAMED_VALUES = {("objective.mode", "loop"): "extension"}


@dataclasses.dataclass(frozen=True)
class Config:
    data: DataConfig
    tokenizer: TokenizerConfig
    model: ModelConfig
    heads: HeadsConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    evaluation: EvaluationConfig

    @classmethod
    def build(cls, tree: Mapping[str, Any]) -> "Config":
        """Builds and validates a config from nested mappings; what is left out has its default.

        Raises:
          ValueError: a field is unknown, of the wrong type or out of range; the message names the field, its value and
            what is allowed.
        """
        return cls._read(tree, stored=False)

    @classmethod
    def stored(cls, tree: Mapping[str, Any]) -> "Config":
        """Builds and validates the config of a run, from what it was stored as, perhaps by an earlier version.

        Raises:
          ValueError: as ``build``; or a field is missing that earlier versions had, too.
        """
        check_section(tree, "config")
        renamed: dict[str, Any] = {}
        # Every field under the name that it has today.
        for section, fields in tree.items():
            if not isinstance(fields, Mapping):
                renamed[section] = fields  # and is refused
                continue
            for name, value in flat({section: fields}):
                section, _, last = _RENAMED.get(name, name).partition(".")
                if last in renamed.get(section, {}):
                    raise ValueError(f"config.{name}: is there as config.{section}.{last}, too")
                replaced = _RENAMED_VALUES.get((name, value), value) if isinstance(value, str) else value
                renamed.setdefault(section, {})[last] = replaced
        missing = [name for name in sections() if name not in renamed]
        if missing:
            raise ValueError(f"config.{missing[0]} is missing")
        return cls._read(renamed, stored=True)

    @classmethod
    def _read(cls, tree: Mapping[str, Any], stored: bool) -> "Config":
        check_section(tree, "config")
        declared = sections()
        unknown = [name for name in tree if name not in declared]
        if unknown:
            raise ValueError(f"config.{unknown[0]}: no such field; fields of config are {', '.join(declared)}")
        read = {
            name: read_section(section, tree.get(name, {}), f"config.{name}", stored)
            for name, section in declared.items()
        }
        config = cls(**read)  # pyright: ignore[reportArgumentType]
        config.validate()
        return config

    @classmethod
    def of(cls, config: Any) -> "Config":
        """The config that a caller gave: a ``Config``, a ConfigDict, or a nested mapping.

        Raises:
          ValueError: it is none of these; or see ``build``.
        """
        if isinstance(config, Config | ml_collections.ConfigDict):
            return cls.build(config.to_dict())
        if isinstance(config, Mapping):
            return cls.build(config)
        raise ValueError(f"config = {config!r}: expected a Config, a ConfigDict, or a nested mapping")

    @property
    def context(self) -> int:
        """Tokens that a text may have: ``model.context``, or the length of a training sequence."""
        return self.training.sequence_length if self.model.context is None else self.model.context

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The config as nested plain dictionaries, ready for JSON."""
        return {name: getattr(self, name).to_dict() for name in sections()}

    def validate(self) -> None:
        """Checks every value and every relation between values.

        Raises:
          ValueError: naming the field, the value and what is allowed.
        """
        parts = {name: getattr(self, name) for name in sections()}
        for name, section in parts.items():
            section.check_fields(name)
        for section in parts.values():
            section.check(self)


@functools.cache
def sections() -> dict[str, type[Section]]:
    """The sections of a config by name, with their cases known."""
    for module in _CASES:
        importlib.import_module(module)
    return typing.get_type_hints(Config)


def differences(left: Config, right: Config) -> list[str]:
    """Names the fields (``section.field``) in which two configs differ, leaving out those that a resume may change."""
    trees, absent = [dict(flat(config.to_dict())) for config in (left, right)], object()
    names = [name for name in trees[0] | trees[1] if trees[0].get(name, absent) != trees[1].get(name, absent)]
    return [name for name in names if not _resumable(left, name)]


def _resumable(config: Config, path: str) -> bool:
    section, _, name = path.partition(".")
    declared = {one.name: one for one in dataclasses.fields(getattr(config, section))}
    return name in declared and declared[name].metadata["resumable"]
