"""Formats that models with heads are written in: which family a model is written as, and why some do not fit.

Sources: transformers 5.23's ``MtpModel`` reads heads as further layers of any family, where the config says how many;
glm4_moe is the family that vLLM and SGLang know them by, exaone_moe and mellum those in which a head's block is dense.
"""

import dataclasses
from collections.abc import Callable

from mtpd_jax.config import Config, HeadsConfig, ModelConfig
from mtpd_jax.interop.families import FAMILIES
from mtpd_jax.model.head import Head
from mtpd_jax.model.heads import HEAD_KINDS


@dataclasses.dataclass(frozen=True)
class Format:
    """A way to write a model.

    Attributes:
      title: what it is for.
      kind: the ``model_type`` that a model is written as.
      with_heads: whether heads are written.
      remote_code: whether the folder brings a class of its own, for clients that trust it.
    """

    title: str
    kind: Callable[[ModelConfig], str]
    with_heads: bool = True
    remote_code: bool = False


def _own_family(model: ModelConfig) -> str:
    """Qwen3 has norms of queries and keys; Llama wants a width that its heads divide, and Mistral no biases."""
    if model.qk_norm:
        return "qwen3"
    return "llama" if model.width % model.query_heads == 0 or model.qkv_bias else "mistral"


FORMATS = {
    "hf": Format("the backbone's own family, heads as further layers", _own_family, remote_code=True),
    "backbone": Format("the backbone alone", _own_family, with_heads=False),
    "glm4_moe": Format("GLM-4.5, whose shared expert each head's feed-forward layer is", lambda _: "glm4_moe"),
    "exaone_moe": Format("EXAONE-MoE with dense layers alone", lambda _: "exaone_moe"),
    "mellum": Format("Mellum with dense layers alone, one head", lambda _: "mellum"),
}


def written_as(config: Config, name: str) -> tuple[str, Config]:
    """The ``model_type`` that a run's model is written as, and the config of what is written of it.

    Args:
      config: of the run.
      name: of the format.

    Raises:
      ValueError: the model does not fit; saying why.
    """
    if name not in FORMATS:
        raise ValueError(f"--format={name}: expected one of {', '.join(FORMATS)}")
    chosen, model, heads = FORMATS[name], config.model, config.heads
    if not chosen.with_heads:
        config = dataclasses.replace(config, heads=dataclasses.replace(heads, num_heads=0))
    elif heads.num_heads:
        _check_heads(heads, name)
    elif name != "hf":
        raise ValueError(f"--format={name}: the run has no heads; --format=backbone writes what it has")
    kind = chosen.kind(model)
    needed = FAMILIES[kind].needs(model, config.heads)
    if needed:
        raise ValueError(f"--format={name}: this model does not fit: {FAMILIES[kind].title} wants {needed}")
    return kind, config


def _check_heads(heads: HeadsConfig, name: str) -> None:
    if HEAD_KINDS[heads.kind].module is not Head:
        raise ValueError(f"--format={name}: heads.kind = {heads.kind!r} is no head that others know")
    if heads.cache == "shared" and heads.num_heads > 1:
        raise ValueError(
            f"--format={name}: heads.cache = 'shared': others keep a cache per depth, with which these heads "
            "would draft worse without a word; --format=backbone leaves the heads out"
        )
    if not heads.pass_normed and heads.num_heads > 1:
        raise ValueError(
            f"--format={name}: heads.pass_normed = False: others hand the normed state from head to head; "
            "--format=backbone leaves the heads out"
        )
