"""Whether the decoder's heads compute what the trainer's do: draft logits, round by round, against the training path.

Heads that are fine in training and useless in decoding are the commonest fault of systems like this one, and the text
that comes out does not show it: drafts are verified.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mtpd_jax.decoding.batch import prefill
from mtpd_jax.decoding.drafters.drafter import Drafts
from mtpd_jax.decoding.network import DecodingParameters, Network
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.rows import Rows
from mtpd_jax.decoding.stops import Stops
from mtpd_jax.decoding.strategies.speculative import Speculative, SpeculativeState
from mtpd_jax.model.backbone import LanguageModel, unembedding_of
from mtpd_jax.model.layers import apply
from mtpd_jax.platform import Platform
from mtpd_jax.shapes import Array, Float, Int, Parameters
from mtpd_jax.sharding import replicated

# Tokens of another document before the text, in the row that training reads. Our choice.
_BEFORE = 13


@dataclasses.dataclass(frozen=True)
class Parity:
    """One depth's draft logits beside the training path's on the same tokens.

    Attributes:
      difference: the largest, as a share of the largest logit.
      same_choice: the share of drafts that are the training path's likeliest token.
      compared: drafts.
    """

    difference: float
    same_choice: float
    compared: int


def rounds(
    strategy: Speculative, parameters: DecodingParameters, prompts: Sequence[np.ndarray]
) -> Iterator[tuple[Rows, Drafts, np.ndarray, Rows]]:
    """Decodes without an end token, and yields what each round saw and did.

    Args:
      strategy: of greedy decoding.
      parameters: as its network lays them out.
      prompts: token ids, decoded together.

    Yields:
      The rows before the round, the drafts, how many of them each row accepted, [B], and the rows after it.
    """
    stops, width = Stops(()), max(map(len, prompts))
    padded = jnp.asarray(np.stack([np.pad(prompt, (0, width - len(prompt))) for prompt in prompts]), jnp.int32)
    lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    keys = jax.vmap(jax.random.key)(jnp.arange(len(prompts)))

    def start(parameters: DecodingParameters) -> Any:
        batch = prefill(strategy, parameters, padded, lengths, keys, stops, width)
        return _whole(batch.rows, strategy.network), batch.state

    def one_round(parameters: DecodingParameters, rows: Rows, state: SpeculativeState) -> Any:
        *seen, state = strategy.play(parameters, rows, state, keys, stops)
        return *_whole(seen, strategy.network), state

    (rows, state), play = strategy.network.jit(start)(parameters), strategy.network.jit(one_round)
    before = jax.device_get(rows)
    while not before.finished.all():
        drafts, accepted, rows, state = play(parameters, rows, state)
        after = jax.device_get(rows)
        yield before, jax.device_get(drafts), np.asarray(accepted), after
        before = after


def draft_parity(
    model: LanguageModel,
    parameters: Parameters,
    prompts: Sequence[np.ndarray],
    options: Options,
    platform: Platform,
    mesh: Mesh | None = None,
) -> list[Parity]:
    """Compares every draft of every round with the training path on the text so far and the drafts before it.

    Training reads them behind another document, on which they must not depend.

    Args:
      model, parameters: what was trained.
      prompts: token ids, decoded together.
      options: greedy, with a fixed number of drafts, at most one per head.
      platform: of the devices.
      mesh: on which the parameters lie; None: on one device.

    Returns:
      One per depth.
    """
    network = Network(model, platform, mesh=mesh)
    laid_out = network.jit(network.parameters)(parameters)
    length = _BEFORE + max(map(len, prompts)) + options.max_new_tokens + options.num_drafts
    length += -length % 128  # every attention kernel takes rows of such a length
    # A row as training packs it: the end of another document, and then the text.
    positions = jnp.concatenate([jnp.arange(_BEFORE), jnp.arange(length - _BEFORE)])[None]
    segments = jnp.where(jnp.arange(length) < _BEFORE, 1, 2)[None]

    def trained(parameters: Parameters, row: Int[Array, "1 T"], place: Array) -> Float[Array, "K V"]:
        hidden = apply(model, parameters, row, segments, positions)
        states, matrix = hidden.heads[:, 0, place], unembedding_of(parameters).astype(network.dtype)
        return _whole(jnp.einsum("kd,vd->kv", states, matrix, preferred_element_type=jnp.float32), network)

    forward, played = network.jit(trained), rounds(Speculative(network, options), laid_out, prompts)
    difference, same, compared = np.zeros(options.num_drafts), np.zeros(options.num_drafts), 0
    for before, drafts, _, _ in played:
        assert drafts.logits is not None  # heads drafted
        for row in np.nonzero(~before.finished)[0]:
            n = int(before.length[row])
            text = np.concatenate([before.tokens[row, :n], drafts.tokens[row]])
            packed = np.zeros((1, length), np.int32)
            packed[0, :_BEFORE], packed[0, _BEFORE : _BEFORE + len(text)] = np.resize(text, _BEFORE), text
            expected = np.asarray(forward(parameters, packed, _BEFORE + n - 2))[: options.num_drafts]
            errors = np.abs(drafts.logits[row] - expected).max(axis=1) / np.abs(expected).max()
            difference = np.maximum(difference, errors)
            same += expected.argmax(axis=1) == drafts.tokens[row]
            compared += 1
    return [Parity(float(d), float(s / compared), compared) for d, s in zip(difference, same, strict=True)]


def _whole(tree: Any, network: Network) -> Any:
    """Values that every process can read."""
    return tree if network.mesh is None else jax.lax.with_sharding_constraint(tree, replicated(network.mesh))
