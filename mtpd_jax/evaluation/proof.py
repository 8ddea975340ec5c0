"""Whether the heads that a run is about to train will decode as they are trained: proved before its first step."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtpd_jax.data.documents import Document
from mtpd_jax.data.sources import Source, split
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.decoding.options import Options
from mtpd_jax.evaluation.held_out import decoding_method
from mtpd_jax.evaluation.parity import draft_parity
from mtpd_jax.methods.method import Method
from mtpd_jax.model.backbone import LanguageModel
from mtpd_jax.shapes import Array, Parameters

# Tokens of the rows that are read, of different lengths; and tokens that are written after each. Our choice.
_PROMPTS, _NEW_TOKENS = (5, 12, 24), 10
# Layers of the backbone that are run: what can be wrong with its states is wrong after a few of them, too, and all of a
# large one, in float32 and as decoding lays it out, need not fit beside the state of the run. Our choice.
_LAYERS = 4
# Of the largest logit, in float32 at highest precision: rounding is a hundredth of it, and a wrong position, mask or
# cache a thousand times as much.
_TOLERANCE = 1e-4


class ParityError(ValueError):
    """The decoder does not compute what the trainer does."""


def prove_parity(method: Method, parameters: Parameters, source: Source, tokenizer: Tokenizer) -> str:
    """Decodes a few rows of a run's own data, and holds every draft's logits to the training path's.

    In float32, so that nothing but rounding may differ, whatever the run computes in, and on the first layers of the
    backbone. Heads that begin at zero would hide most of what can be wrong: noise is added to them, for both.

    Args:
      method: of the run.
      parameters: of its whole model, before the first step.
      source, tokenizer: of the run.

    Returns:
      What was compared, for people.

    Raises:
      ParityError: with the depth, and the difference.
    """
    config, (decodes, shardings) = method.config, decoding_method(method)
    layers = min(_LAYERS, method.model.config.layers)
    cut = dataclasses.replace(method.model.config, dtype="float32", layers=layers)
    model = LanguageModel(cut, method.model.heads_config)
    documents = split(source, config.data.validation_fraction, validation=False)
    begun = (_beginning(one, tokenizer, size) for one, size in zip(documents, itertools.cycle(_PROMPTS), strict=False))
    rows = list(itertools.islice(filter(len, begun), len(_PROMPTS)))
    shaken = {**parameters, "heads": _with_noise(parameters["heads"], config.model.width)}
    backbone: Any = parameters["backbone"]
    shaken["backbone"] = {**backbone, "blocks": jax.tree.map(lambda stacked: stacked[:layers], backbone["blocks"])}
    number = config.heads.num_heads
    found = draft_parity(
        model, jax.device_put(shaken, shardings), rows, Options(number, _NEW_TOKENS + number), decodes.platform,
        decodes.mesh if decodes.mesh.size > 1 else None,
    )  # fmt: skip
    for depth, parity in enumerate(found, 1):
        if not parity.difference <= _TOLERANCE:
            raise ParityError(
                f"the heads would not decode as they are trained: at depth {depth} the logits of drafts differ by "
                f"{parity.difference:.1e} of the largest (expected at most {_TOLERANCE:.0e}), on {parity.compared} "
                "drafts of the run's own data; this is a fault of the heads' code, and nothing was trained"
            )
    worst = max(parity.difference for parity in found)
    return f"proved on {found[0].compared} drafts: decoding computes what training does, to {worst:.0e}"


def _beginning(document: Document, tokenizer: Tokenizer, tokens: int) -> np.ndarray:
    return (tokenizer.encode_prompt(document) if isinstance(document, str) else document.ids)[:tokens]


def _with_noise(heads: Any, width: int) -> Any:
    """Heads in which nothing is zero."""

    def shake(path: Any, leaf: Array) -> Array:
        number = sum(map(ord, jax.tree_util.keystr(path)))
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), number), leaf.shape, jnp.float32)
        scale = 0.1 if path[-1].key == "scale" else width**-0.5
        return leaf + (scale * noise).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(shake, heads)
