"""Names as data: which of other people's tensors each array of ours is made of, and how, both ways.

A table has an entry per array. One engine (``layout``) walks it to read and to write, so that a family of models is a
few tables and a mapping of its config.json (``families``). Linear layers of theirs are [out, in], ours [in, out].
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mtpd_jax.config import ModelConfig

Shape = tuple[int, ...]
EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Form:
    """How one array of ours is made of several tensors, and the other way round: each other's inverse.

    Attributes:
      shapes: of the tensors.
      join: the tensors -> the array; raises ValueError if they are none that ``split`` could return.
      split: the array -> the tensors, as views if possible.
    """

    shapes: Callable[[ModelConfig], list[Shape]]
    join: Callable[[ModelConfig, Sequence[np.ndarray]], Any]
    split: Callable[[ModelConfig, Any], list[np.ndarray]]


def _always(_: ModelConfig) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Entry:
    """An array of ours.

    Attributes:
      ours: its path in the tree of parameters, with / between; empty for tensors that are nothing of ours.
      theirs: names of the tensors, below a prefix.
      form: see ``Form``.
      present: whether a model has it.
    """

    ours: str
    theirs: tuple[str, ...]
    form: Form
    present: Callable[[ModelConfig], bool] = _always


# Vectors and matrices.


def vector(size: Callable[[ModelConfig], int]) -> Form:
    """One that is the same on both sides."""
    return Form(lambda config: [(size(config),)], lambda _, parts: parts[0], lambda _, ours: [ours])


def matrix(rows: Callable[[ModelConfig], int], columns: Callable[[ModelConfig], int]) -> Form:
    """A linear layer, [rows, columns] here, [columns, rows] there."""
    return Form(lambda config: [(columns(config), rows(config))], lambda _, parts: parts[0].T, lambda _, ours: [ours.T])


def zeros(*shapes: Callable[[ModelConfig], Shape]) -> Form:
    """Tensors that their layers have and ours have not, and that change nothing as long as they are zero."""

    def join(_: ModelConfig, parts: Sequence[np.ndarray]) -> None:
        if any(np.any(part) for part in parts):
            raise ValueError("expected zeros, for there is no place here for anything else")

    def split(config: ModelConfig, _: None) -> list[np.ndarray]:
        return [np.zeros(shape(config), np.float32) for shape in shapes]

    return Form(lambda config: [shape(config) for shape in shapes], join, split)


def _width(config: ModelConfig) -> int:
    return config.width


def _per_head(config: ModelConfig) -> tuple[int, int, int]:
    """Key/value heads G, query heads of each R, size H."""
    return config.kv_heads, config.query_heads // config.kv_heads, config.head_size


def _qkv_shapes(config: ModelConfig) -> list[Shape]:
    groups, per_group, size = _per_head(config)
    return [(groups * per_group * size, config.width), *[(groups * size, config.width)] * 2]


def _join_qkv(config: ModelConfig, parts: Sequence[np.ndarray]) -> np.ndarray:
    """[N H, D], [G H, D], [G H, D] -> [D, G, R+2, H]; query head n is g R + r, as theirs."""
    groups, per_group, size = _per_head(config)
    query, key, value = parts
    query = query.reshape(groups, per_group, size, -1)
    key, value = (part.reshape(groups, 1, size, -1) for part in (key, value))
    return np.moveaxis(np.concatenate([query, key, value], axis=1), -1, 0)


def _split_qkv(config: ModelConfig, ours: np.ndarray) -> list[np.ndarray]:
    per_group = _per_head(config)[1]
    by_head = np.moveaxis(ours, 0, -1)
    parts = by_head[:, :per_group], by_head[:, per_group], by_head[:, per_group + 1]
    return [part.reshape(-1, part.shape[-1]) for part in parts]


def _join_bias(config: ModelConfig, parts: Sequence[np.ndarray]) -> np.ndarray:
    return _join_qkv(config, [part[:, None] for part in parts])[0]


def _split_bias(config: ModelConfig, ours: np.ndarray) -> list[np.ndarray]:
    return [part[:, 0] for part in _split_qkv(config, ours[None])]


QKV = Form(_qkv_shapes, _join_qkv, _split_qkv)
_QKV_BIAS = Form(lambda config: [shape[:1] for shape in _qkv_shapes(config)], _join_bias, _split_bias)
_OUT = Form(
    lambda config: [(config.width, config.query_heads * config.head_size)],
    lambda config, parts: parts[0].T.reshape(config.query_heads, config.head_size, config.width),
    lambda config, ours: [ours.reshape(-1, config.width).T],
)
GATE_UP = Form(
    lambda config: [(config.mlp_width, config.width)] * 2,
    lambda _, parts: np.stack([part.T for part in parts], axis=1),
    lambda _, ours: [ours[:, 0].T, ours[:, 1].T],
)
_DOWN = matrix(lambda config: config.mlp_width, _width)


# Embeddings that are scaled by sqrt(D) when they are looked up: other families have no such thing, and so are given
# the product. A matrix that was tied is two, then.


def _scaled(config: ModelConfig, table: np.ndarray) -> np.ndarray:
    """As the model multiplies it: in float32."""
    return (table.astype(np.float32) * np.float32(config.width**0.5)).astype(table.dtype)


def _join_tied(config: ModelConfig, parts: Sequence[np.ndarray]) -> np.ndarray:
    if not np.array_equal(parts[0], _scaled(config, parts[1])):
        raise ValueError(f"expected the first to be the second times sqrt({config.width}), as this project writes it")
    return parts[1]


_TABLE = Form(
    lambda config: [(config.vocabulary_size, config.width)], lambda _, parts: parts[0], lambda _, ours: [ours]
)
_SCALED_TIED = Form(
    lambda config: [(config.vocabulary_size, config.width)] * 2,
    _join_tied,
    lambda config, ours: [_scaled(config, ours), ours],
)
_SCALED = Form(
    lambda config: [(config.vocabulary_size, config.width)],
    lambda config, parts: (parts[0].astype(np.float32) / np.float32(config.width**0.5)).astype(parts[0].dtype),
    lambda config, ours: [_scaled(config, ours)],
)


def scaling_is_exact(config: ModelConfig) -> bool:
    """Whether a scaled embedding can be divided by sqrt(D) again, bit for bit."""
    return config.width & (config.width - 1) == 0 and config.width.bit_length() % 2 == 1


# The tables.

# What is there once, below no prefix.
TRUNK = (
    Entry("embedding", (EMBEDDING,), _TABLE, lambda config: not config.scale_embedding),
    Entry(
        "embedding", (EMBEDDING, UNEMBEDDING), _SCALED_TIED,
        lambda config: config.scale_embedding and config.tied_unembedding,
    ),
    Entry(
        "embedding", (EMBEDDING,), _SCALED,
        lambda config: config.scale_embedding and not config.tied_unembedding,
    ),
    Entry("unembedding", (UNEMBEDDING,), _TABLE, lambda config: not config.tied_unembedding),
    Entry("backbone/final_norm/scale", ("model.norm.weight",), vector(_width)),
)  # fmt: skip

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def _has_bias(config: ModelConfig) -> bool:
    return config.qkv_bias


# Attention as Llama and its descendants name it, below the prefix of a block.
ATTENTION = (
    Entry("attention_norm/scale", ("input_layernorm.weight",), vector(_width)),
    Entry("attention/qkv/kernel", tuple(f"self_attn.{name}.weight" for name in _PROJECTIONS), QKV),
    Entry("attention/qkv/bias", tuple(f"self_attn.{name}.bias" for name in _PROJECTIONS), _QKV_BIAS, _has_bias),
    *(
        Entry(
            f"attention/{ours}_norm/scale", (f"self_attn.{ours[0]}_norm.weight",),
            vector(lambda config: config.head_size), lambda config: config.qk_norm,
        )
        for ours in ("query", "key")
    ),
    Entry("attention/out/kernel", ("self_attn.o_proj.weight",), _OUT),
    Entry("mlp_norm/scale", ("post_attention_layernorm.weight",), vector(_width)),
)  # fmt: skip
# Of families whose biases of queries, keys and values come with one of the output, which ours has not.
OUT_BIAS = (Entry("", ("self_attn.o_proj.bias",), zeros(lambda config: (config.width,)), _has_bias),)


def _mlp(prefix: str) -> tuple[Entry, ...]:
    return (
        Entry("mlp/gate_up/kernel", (f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"), GATE_UP),
        Entry("mlp/down/kernel", (f"{prefix}.down_proj.weight",), _DOWN),
    )


BLOCK = (*ATTENTION, *_mlp("mlp"))

# GLM's heads always have layers of experts. Ours is what all tokens share, beside two experts that are nothing.
_EXPERTS = 2


def expert_width(config: ModelConfig) -> int:
    """The width of an expert, of which the shared one is a multiple; transformers' kernels take multiples of 8."""
    return next((width for width in range(8, config.mlp_width, 8) if config.mlp_width % width == 0), config.mlp_width)


_NO_EXPERTS = (
    Entry(
        "", ("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
        zeros(lambda config: (_EXPERTS, config.width), lambda _: (_EXPERTS,)),
    ),
    *(
        Entry(
            "", tuple(f"mlp.experts.{expert}.{name}_proj.weight" for name in ("gate", "up", "down")),
            zeros(
                lambda config: (expert_width(config), config.width),
                lambda config: (expert_width(config), config.width),
                lambda config: (config.width, expert_width(config)),
            ),
        )
        for expert in range(_EXPERTS)
    ),
)  # fmt: skip
SHARED_EXPERT_BLOCK = (*ATTENTION, *_mlp("mlp.shared_experts"), *_NO_EXPERTS)


@dataclasses.dataclass(frozen=True)
class HeadNames:
    """Where a head's tensors are.

    Attributes:
      entries: of what it has beside its block.
      prefix: of those; {layer} is the number of the backbone's layers and of the heads before it.
      block_prefix: of its block.
    """

    entries: tuple[Entry, ...]
    prefix: str
    block_prefix: str


def _head(embedding: str, hidden: str, projection: str, output: str) -> tuple[Entry, ...]:
    """The projection takes [embedding, hidden], in the order of DeepSeek's released checkpoints, on both sides."""
    return (
        Entry("embedding_norm/scale", (f"{embedding}.weight",), vector(_width)),
        Entry("hidden_norm/scale", (f"{hidden}.weight",), vector(_width)),
        Entry("projection/kernel", (f"{projection}.weight",), matrix(lambda config: 2 * config.width, _width)),
        Entry("output_norm/scale", (f"{output}.weight",), vector(_width)),
    )


_DEEPSEEK = _head("enorm", "hnorm", "eh_proj", "shared_head.norm")
# As further layers of the model (DeepSeek, GLM); below ``mtp``; and a single one, as Qwen3-Next and others name it.
LAYERS = HeadNames(_DEEPSEEK, "model.layers.{layer}.", "model.layers.{layer}.")
MTP_LAYERS = HeadNames(_DEEPSEEK, "mtp.layers.{layer}.", "mtp.layers.{layer}.")
FLAT = HeadNames(_head("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"), "mtp.", "mtp.layers.0.")
