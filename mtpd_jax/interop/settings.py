"""config.json, both ways: what a family's settings mean for a model of ours, and what says that a model is one.

Everything that changes what a model computes is mapped, or refused by name; nothing of that kind is ignored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mtpd_jax.config import Config, ModelConfig
from mtpd_jax.interop.families import FAMILIES, Family, Settings, check_dense, check_own, family_of
from mtpd_jax.interop.names import scaling_is_exact

# Settings that say nothing of what the weights compute, or only of how a library runs them.
_SILENT = {
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "model_type", "pad_token_id", "torch_dtype", "transformers_version", "use_cache", "_name_or_path",
    "_from_model_config", "output_router_logits", "router_aux_loss_coef", "is_llama_config", "name_or_path",
    "unsloth_version", "norm_topk_prob",
}  # fmt: skip
# Those that are read, whatever the family.
_READ = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "rms_norm_eps", "hidden_act", "max_position_embeddings", "tie_word_embeddings", "rope_theta",
    "rope_scaling", "rope_parameters", "rope_interleaved", "attention_bias", "mlp_bias", "pretraining_tp",
    "sliding_window", "use_sliding_window", "max_window_layers", "partial_rotary_factor", "use_qk_norm",
    "num_mtp_layers", "num_nextn_predict_layers", "mtp_hidden_states_first", "chain_hidden_post_norm", "mtpd",
    "quantization_config", "layer_types", "is_causal", "per_layer_config",
}  # fmt: skip
# What would compute something else, and what it has to be, beside not being there.
_ONLY = {
    "hidden_act": "silu", "mlp_bias": False, "pretraining_tp": 1, "rope_interleaved": False,
    "mtp_hidden_states_first": False, "is_causal": True,
}  # fmt: skip
# The setting in which this project says what no other setting can.
_OURS = "mtpd"
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Tokens of a window in which text is scored, where nothing says how many it was trained on. Our choice.
_WINDOW = 1024


@dataclasses.dataclass(frozen=True)
class Described:
    """What a config.json comes to.

    Attributes:
      kind, family: of the model.
      data, model, heads, training: fields of these sections of a config.
      tied: whether the config.json says that the embedding is the unembedding, too; the tensors decide (``reading``).
      notes: what has to be said of it.
    """

    kind: str
    family: Family
    data: dict[str, Any]
    model: dict[str, Any]
    heads: dict[str, Any]
    training: dict[str, Any]
    tied: bool
    notes: tuple[str, ...]


def describe(settings: Settings) -> Described:
    """The model that a config.json describes.

    Raises:
      ValueError: it has something that is not here, or lacks a setting.
    """
    try:
        return _described(settings)
    except (TypeError, AttributeError, KeyError, ArithmeticError) as error:
        raise ValueError(f"config.json: a setting is of another kind than it should be ({error})") from error


def _described(settings: Settings) -> Described:
    kind, family = family_of(settings)
    said: Settings = {**family.defaults, **settings}
    check_dense(said, kind)
    for name, only in _ONLY.items():
        if said.get(name) not in (only, None):
            raise ValueError(f"{name} = {said[name]!r}: expected {only!r}; anything else is not here")
    for name in ("quantization_config", "chain_hidden_post_norm", "per_layer_config"):
        if said.get(name) is not None:
            raise ValueError(f"{name} = {said[name]!r:.80}: expected none; that is not here")
    # What is not known is said: it is taken to change nothing, as transformers takes it.
    own = said.get(_OURS) or {}
    if not isinstance(own, Mapping):
        raise ValueError(f"{_OURS} = {own!r:.80}: expected an object")
    model, notes = _model(said, family, own)
    number = _number(said, "num_mtp_layers", _number(said, "num_nextn_predict_layers", 0))
    heads = {"num_heads": number, **{name: own[name] for name in ("kind", "pass_normed") if name in own}}
    trained_length = own.get("sequence_length")
    length = min(model["context"], _WINDOW) if trained_length is None else trained_length
    data = {"heads_length": trained_length if number else None}
    unknown = sorted(settings.keys() - _SILENT - _READ - _own_names(family))
    if unknown:
        notes.append(f"settings that are not known here, taken to change nothing: {', '.join(unknown)}")
    tied = own.get("tied", _flag(said, "tie_word_embeddings"))
    return Described(kind, family, data, model, heads, {"sequence_length": length}, tied, tuple(notes))


def _own_names(family: Family) -> set[str]:
    """Names of the settings that are this family's own."""
    return set(family.own(ModelConfig(), 1))


def _model(said: Settings, family: Family, own: Settings) -> tuple[dict[str, Any], list[str]]:
    """Fields of ``config.model``, and what has to be said of them."""
    notes = []
    width, heads = _number(said, "hidden_size"), _number(said, "num_attention_heads")
    theta, llama3 = _rotation(said, family)
    context, window = _number(said, "max_position_embeddings"), _window(said, family)
    if window is not None and window < context:
        notes.append(
            f"its layers see the last {window:,} tokens; texts may have as many here, where that is everything"
        )
        context = window
    model = {
        "vocabulary_size": _number(said, "vocab_size"),
        "width": width,
        "layers": _number(said, "num_hidden_layers"),
        "query_heads": heads,
        "kv_heads": _number(said, "num_key_value_heads", heads),
        "head_size": _number(said, "head_dim", width // heads),
        "mlp_width": _number(said, "intermediate_size"),
        "rope_theta": theta,
        "rope_llama3": llama3,
        "norm_epsilon": float(_number(said, "rms_norm_eps", 1e-6)),
        "qk_norm": _says(said, family.qk_norm),
        "qkv_bias": _says(said, family.qkv_bias),
        "scale_embedding": own.get("scale_embedding", False),
        "context": context,
    }
    return model, notes


def _says(settings: Settings, setting: bool | str) -> bool:
    return _flag(settings, setting) if isinstance(setting, str) else setting


def _flag(settings: Settings, name: str) -> bool:
    value = settings.get(name)
    if not isinstance(value, bool | None):
        raise ValueError(f"{name} = {value!r:.80}: expected true or false")
    return bool(value)


# Base and scaling of a rotation; None where nothing is said.
_Rotation = tuple[float | None, tuple[float, ...] | None]


def _rotation(settings: Settings, family: Family) -> tuple[float, tuple[float, ...]]:
    """Base and scaling of the rotation, in either spelling; where both are there, they have to say the same.

    (Which of them counts has changed from one version of transformers to the next.)
    """
    newer, older = (_spelled(settings, name, family) for name in ("rope_parameters", "rope_scaling"))
    older = (_number(settings, "rope_theta", older[0]), older[1])
    for one, other in zip(newer, older, strict=True):
        if one is not None and other is not None and one != other:
            raise ValueError(
                f"rope_parameters says {one!r}, and rope_scaling or rope_theta {other!r}: expected the same of both"
            )
    theta = older[0] if newer[0] is None else newer[0]
    scaling = older[1] if newer[1] is None else newer[1]
    return float(family.theta if theta is None else theta), scaling or ()


def _spelled(settings: Settings, name: str, family: Family) -> _Rotation:
    """What one spelling says."""
    found = settings.get(name)
    if family.rope_by_type and isinstance(found, Mapping) and "full_attention" in found:
        found = found["full_attention"]
    if found is None or found == {}:
        found = {}
    elif not isinstance(found, Mapping) or any(isinstance(value, Mapping) for value in found.values()):
        raise ValueError(f"{name} = {found!r:.120}: expected one kind of rotation for all layers")
    part = found.get("partial_rotary_factor", settings.get("partial_rotary_factor"))
    if (family.defaults.get("partial_rotary_factor", 1) if part is None else part) != 1:
        raise ValueError(f"partial_rotary_factor = {part!r}: expected 1; heads that turn in part are not here")
    theta, kind = _number(found, "rope_theta", None), found.get("rope_type") or found.get("type")
    if kind not in (None, "default", "llama3"):
        raise ValueError(f"rope_type = {kind!r}: expected default or llama3; other scalings are not here")
    if kind == "llama3":
        return theta, tuple(float(_number(found, part)) for part in _LLAMA3)
    return theta, None if kind is None else ()


def _window(settings: Settings, family: Family) -> int | None:
    """How far back a layer sees, if some do not see everything."""
    if family.window_by_choice:
        layers = _number(settings, "num_hidden_layers")
        some = settings.get("use_sliding_window") and settings.get("max_window_layers", 0) < layers
        if not some and "sliding_attention" not in (settings.get("layer_types") or []):
            return None
    return settings.get("sliding_window")


def _number(settings: Settings, name: str, *default: Any) -> Any:
    """A number, which has to be there unless there is a default."""
    if default and settings.get(name) is None:
        return default[0]
    value = settings.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} = {value!r}: expected a number")
    return value


def check_described(settings: Settings, described: Described, config: Config) -> None:
    """Checks a family's own settings, once the model is known; see ``families.check_own``."""
    check_own({**described.family.defaults, **settings}, described.kind, config.model, config.heads.num_heads)


def settings_of(config: Config, kind: str, end_ids: tuple[int, ...]) -> dict[str, Any]:
    """The config.json of a model, as one of a family.

    Args:
      config: of the run.
      kind: the ``model_type``.
      end_ids: of the tokens that end a text.
    """
    model, heads, family = config.model, config.heads, FAMILIES[kind]
    tied = model.tied_unembedding and not model.scale_embedding
    chosen = {
        name: value
        for name, value in ((family.qk_norm, model.qk_norm), (family.qkv_bias, model.qkv_bias))
        if isinstance(name, str)
    }
    return {
        "architectures": [family.architecture], "model_type": kind, "vocab_size": model.vocabulary_size,
        "hidden_size": model.width, "intermediate_size": model.mlp_width, "num_hidden_layers": model.layers,
        "num_attention_heads": model.query_heads, "num_key_value_heads": model.kv_heads, "head_dim": model.head_size,
        "hidden_act": "silu", "rms_norm_eps": model.norm_epsilon, "max_position_embeddings": config.context,
        "tie_word_embeddings": tied, "attention_dropout": 0.0, **_rotation_of(config, family), **chosen,
        "dtype": model.weights, "torch_dtype": model.weights, "bos_token_id": None, "pad_token_id": None,
        "eos_token_id": list(end_ids), **family.own(model, heads.num_heads), **_heads_of(config),
    }  # fmt: skip


def _rotation_of(config: Config, family: Family) -> dict[str, Any]:
    """In both spellings, with the same values: readers know one or the other."""
    theta, llama3 = config.model.rope_theta, config.model.rope_llama3
    scaling: dict[str, Any] = {"rope_type": "default"}
    if llama3:
        scaling = {"rope_type": "llama3", **dict(zip(_LLAMA3, llama3, strict=True))}
        scaling["original_max_position_embeddings"] = int(llama3[-1])
    new = {**scaling, "rope_theta": theta}
    if family.rope_by_type:
        return {"rope_parameters": {"full_attention": new}}
    return {"rope_theta": theta, "rope_scaling": scaling if llama3 else None, "rope_parameters": new}


def _heads_of(config: Config) -> dict[str, Any]:
    """How many heads there are, in both spellings; and what no other program can say."""
    model, heads = config.model, config.heads
    # What was multiplied in cannot always be divided out again; then it is said not to be there.
    scaled = model.scale_embedding and (model.tied_unembedding or scaling_is_exact(model))
    ours: dict[str, Any] = {"sequence_length": config.training.sequence_length}
    if scaled:
        ours |= {"scale_embedding": True, "tied": model.tied_unembedding}
    if not heads.num_heads:
        return {"num_nextn_predict_layers": 0, _OURS: ours}
    ours |= {"kind": heads.kind, "pass_normed": heads.pass_normed}
    return {"num_mtp_layers": heads.num_heads, "num_nextn_predict_layers": heads.num_heads, _OURS: ours}
