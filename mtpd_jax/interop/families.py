"""Families of models, by the ``model_type`` of their config.json: names of their tensors, and what is their own.

A new family is an entry here: tables of names (``names``), and what its settings say that others' do not.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from mtpd_jax.config import HeadsConfig, ModelConfig
from mtpd_jax.interop.names import (
    BLOCK,
    FLAT,
    LAYERS,
    MTP_LAYERS,
    OUT_BIAS,
    SHARED_EXPERT_BLOCK,
    Entry,
    HeadNames,
    expert_width,
)

Settings = Mapping[str, Any]
# A layer that sees as far back as this sees everything.
_EVERYTHING = 1 << 20


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of model, as transformers knows it.

    Attributes:
      title: as people call it.
      architecture: transformers' class.
      qk_norm, qkv_bias: whether its blocks have them; or the setting that says so.
      block, head_block: tables of the backbone's blocks and of those of heads.
      heads: where so many heads are.
      defaults: settings that a config.json may leave out, where the family's own are not the usual ones.
      own: settings that say of this family that its layers are what ours are, of a model with so many heads: written,
        and on reading compared (but for windows and rotation, which ``settings`` looks at).
      needs: what a model has to have or to be for this family; empty if that is so.
      rope_by_type: whether the rotation is given for each type of layer.
      window_by_choice: whether a sliding window counts only where another setting says so.
      theta: the base of the rotation, where none is said.
      declares_heads: whether transformers' class knows which tensors are heads; else a client has to say so.
      since: the version of transformers from which on heads of it draft.
    """

    title: str
    architecture: str
    qk_norm: bool | str = False
    qkv_bias: bool | str = False
    block: tuple[Entry, ...] = BLOCK
    head_block: tuple[Entry, ...] = BLOCK
    heads: Callable[[int], HeadNames] = lambda _: LAYERS
    defaults: Settings = dataclasses.field(default_factory=dict)
    own: Callable[[ModelConfig, int], Settings] = lambda model, heads: {}
    needs: Callable[[ModelConfig, HeadsConfig], str] = lambda model, heads: ""
    rope_by_type: bool = False
    window_by_choice: bool = False
    theta: float = 1e4
    declares_heads: bool = False
    since: str = "5.16"


def _whole_heads(model: ModelConfig, _: HeadsConfig) -> str:
    return "" if model.width % model.query_heads == 0 else "a width that is a multiple of the number of query heads"


def _no_biases(model: ModelConfig, _: HeadsConfig) -> str:
    return "a model without biases" if model.qkv_bias else ""


def _qk_norm_alone(model: ModelConfig, _: HeadsConfig) -> str:
    return "" if model.qk_norm and not model.qkv_bias else "norms of queries and keys, and a model without biases"


def _one_head(model: ModelConfig, heads: HeadsConfig) -> str:
    return _qk_norm_alone(model, heads) or ("" if heads.num_heads == 1 else "one head")


def _of_eights(model: ModelConfig, _: HeadsConfig) -> str:
    return "" if model.mlp_width % 8 == 0 else "a feed-forward layer whose width is a multiple of 8"


def _layer_types(model: ModelConfig, heads: int, attention: str) -> dict[str, list[str]]:
    """All layers see as much, and none has experts; heads are layers, too."""
    return {
        "layer_types": [attention] * model.layers,
        "mlp_layer_types": ["dense"] * model.layers,
        "mtp_layer_types": [attention] * heads,
        "mtp_mlp_layer_types": ["dense"] * heads,
    }


def _shared_expert(model: ModelConfig, _: int) -> Settings:
    return {
        "first_k_dense_replace": model.layers, "n_routed_experts": 2, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "routed_scaling_factor": 1.0, "moe_intermediate_size": expert_width(model),
        "n_shared_experts": model.mlp_width // expert_width(model), "partial_rotary_factor": 1.0,
    }  # fmt: skip


def _all_sliding(model: ModelConfig, heads: int) -> Settings:
    """EXAONE's layers that see everything have no rotation; so all slide, over everything."""
    return {**_layer_types(model, heads, "sliding_attention"), "sliding_window": _EVERYTHING}


def _none_sliding(model: ModelConfig, heads: int) -> Settings:
    return {**_layer_types(model, heads, "full_attention"), "sliding_window": None}


def _types_of_heads(_: ModelConfig, heads: int) -> Settings:
    return {"mtp_layer_types": ["full_attention"] * heads} if heads else {}


# Where a window is used, and neither how wide it is nor from which layer on is said.
_QWEN_WINDOW = {"sliding_window": 4096, "max_window_layers": 28}
_LLAMA_BLOCK = (*BLOCK, *OUT_BIAS)
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "Llama", "LlamaForCausalLM", qkv_bias="attention_bias", block=_LLAMA_BLOCK, head_block=_LLAMA_BLOCK,
        needs=_whole_heads,
    ),
    "mistral": Family(
        "Mistral", "MistralForCausalLM", defaults={"sliding_window": 4096}, own=lambda *_: {"sliding_window": None},
        needs=_no_biases,
    ),
    "qwen2": Family(
        "Qwen2", "Qwen2ForCausalLM", qkv_bias=True, window_by_choice=True, defaults={**_QWEN_WINDOW},
    ),
    "qwen3": Family(
        "Qwen3", "Qwen3ForCausalLM", qk_norm=True, qkv_bias="attention_bias", block=_LLAMA_BLOCK,
        head_block=_LLAMA_BLOCK, defaults={"head_dim": 128, **_QWEN_WINDOW}, own=_types_of_heads, window_by_choice=True,
    ),
    "glm4_moe": Family(
        "GLM-4.5", "Glm4MoeForCausalLM", qk_norm="use_qk_norm", qkv_bias="attention_bias",
        head_block=SHARED_EXPERT_BLOCK, own=_shared_expert, needs=_of_eights,
        defaults={"partial_rotary_factor": 0.5, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-5},
    ),
    "exaone_moe": Family(
        "EXAONE-MoE", "ExaoneMoEForCausalLM", qk_norm=True, own=_all_sliding, needs=_qk_norm_alone,
        heads=lambda number: FLAT if number == 1 else MTP_LAYERS, declares_heads=True,
        defaults={"sliding_window": 4096, "rms_norm_eps": 1e-5},
    ),
    "mellum": Family(
        "Mellum", "MellumForCausalLM", qk_norm=True, own=_none_sliding, needs=_one_head, heads=lambda _: FLAT,
        rope_by_type=True, window_by_choice=True, declares_heads=True, since="5.20",
        defaults={"sliding_window": 1024}, theta=5e5,
    ),
}  # fmt: skip
# Feed-forward layers of experts are not here yet; dense models of the last three are above.
_OF_EXPERTS = {"qwen3_moe": "Qwen3-MoE", "glm4_moe": "GLM-4.5-MoE", "exaone_moe": "EXAONE-MoE", "mellum": "Mellum"}
# Settings of ``Family.own`` that are looked at with others.
_ELSEWHERE = {"sliding_window", "partial_rotary_factor"}


def family_of(settings: Settings) -> tuple[str, Family]:
    """The family of a config.json, and its ``model_type``.

    Raises:
      ValueError: there is none here.
    """
    kind = settings.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        return kind, FAMILIES[kind]
    if isinstance(kind, str) and kind in _OF_EXPERTS:
        raise _no_experts(kind)
    raise ValueError(f"model_type = {kind!r}: expected one of {', '.join(FAMILIES)}")


def check_dense(settings: Settings, kind: str) -> None:
    """Checks that a model of a family that may have layers of experts has none.

    Raises:
      ValueError: it has some.
    """
    if kind not in _OF_EXPERTS:
        return
    if kind == "glm4_moe":
        dense = settings.get("first_k_dense_replace", 1) >= settings.get("num_hidden_layers", 0)
    else:
        kinds = settings.get("mlp_layer_types")
        dense = isinstance(kinds, list) and set(kinds) == {"dense"}
    if not dense:
        raise _no_experts(kind)


def check_own(settings: Settings, kind: str, model: ModelConfig, heads: int) -> None:
    """Checks the settings of a family that say whether its layers are what ours are.

    Raises:
      ValueError: naming one that says otherwise.
    """
    for name, value in FAMILIES[kind].own(model, heads).items():
        found = settings.get(name)
        if name in _ELSEWHERE or found == value or (value == [] and found is None):
            continue
        attention = name in ("layer_types", "mtp_layer_types")
        if kind in _OF_EXPERTS and not attention:
            raise _no_experts(kind, f", {name} = {found!r:.60}")
        raise ValueError(f"{name} = {found!r:.80}: expected {value!r:.80}; other layers are not here")


def _no_experts(kind: str, found: str = "") -> ValueError:
    return ValueError(
        f"model_type = {kind!r}{found}: {_OF_EXPERTS[kind]} has layers of experts, which are not here yet"
    )
