"""Decoding prompts with a trained model: batching, compilation kept apart from timing, and results as plain values."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtpd_jax.decoding.plain import Rows, logits_of, make_plain, precision_of
from mtpd_jax.decoding.sampling import GREEDY, Sampling
from mtpd_jax.decoding.speculative import make_speculative
from mtpd_jax.model.backbone import LanguageModel
from mtpd_jax.model.layers import apply
from mtpd_jax.shapes import Array

# Prompts are padded to a multiple of this, so that few lengths are compiled. Our choice.
_PROMPT_MULTIPLE = 32


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What was written after one prompt.

    Attributes:
      tokens: ids, the end token included if one was written.
      proposers: for each token, 0 if the main head chose it, k if it is an accepted draft of head k.
      passes: verification passes, without prefill.
      tried, accepted: per head, rounds in which its draft was verified after all those before it were accepted, and
        those of them in which it was accepted, too.
      seconds: wall time of the call that wrote it, shared evenly among the call's prompts.
    """

    tokens: tuple[int, ...]
    proposers: tuple[int, ...]
    passes: int
    tried: tuple[int, ...]
    accepted: tuple[int, ...]
    seconds: float


class Decoder:
    """Plain and speculative decoding with a trained model; each combination of options and shapes is compiled once."""

    def __init__(self, model: LanguageModel, parameters: Any, end_id: int):
        self._model, self._parameters, self._end_id = model, parameters, end_id
        self._compiled: dict[Any, Any] = {}

    def run(
        self,
        prompts: Sequence[np.ndarray],
        *,
        num_heads: int,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        first_row: int = 0,
    ) -> list[Continuation]:
        """Decodes a batch of prompts.

        Args:
          prompts: token ids, at least one per prompt.
          num_heads: drafts per round; 0 is plain decoding.
          max_new_tokens: at most this many tokens per prompt, the one from prefill included.
          sampling: greedy, or how to sample.
          seed, first_row: row r draws from the key (seed, first_row + r), whatever else is in the batch.

        Raises:
          ValueError: see ``check``.
        """
        self.check(prompts, num_heads=num_heads, max_new_tokens=max_new_tokens, sampling=sampling)
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        width = -(-int(lengths.max()) // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
        padded = np.zeros((len(prompts), width), np.int32)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        rows = np.arange(first_row, first_row + len(prompts), dtype=np.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(rows))
        arguments = (self._parameters, jnp.asarray(padded), jnp.asarray(lengths), keys)
        loop = self._loop(arguments, num_heads, max_new_tokens, sampling)
        start = time.perf_counter()
        found: Rows = jax.device_get(jax.block_until_ready(loop(*arguments)))
        seconds = (time.perf_counter() - start) / len(prompts)
        return [_continuation(found, row, int(lengths[row]), seconds) for row in range(len(prompts))]

    def margin(self, tokens: Sequence[int], place: int) -> float:
        """The main head's largest logit minus its second largest, where it chose ``tokens[place]``.

        Two ways of computing the same logits differ by rounding; where they differ in the token chosen, this says
        whether rounding can be the reason.
        """
        row = jnp.asarray(np.asarray(tokens[:place], np.int32))[None]
        positions = jnp.arange(place)[None]

        def top_two(parameters: Any, row: Array) -> Array:
            hidden = apply(self._model, parameters, row, jnp.ones_like(row), positions).main
            return jax.lax.top_k(logits_of(hidden[0, -1], parameters), 2)[0]

        with jax.default_matmul_precision(precision_of(self._model)):
            first, second = jax.jit(top_two)(self._parameters, row)
        return float(first - second)

    def check(
        self, prompts: Sequence[np.ndarray], *, num_heads: int, max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> None:
        """Checks what ``run`` would be given; callers with many batches call it for all of them first.

        Raises:
          ValueError: an empty prompt, or options out of range.
        """
        sampling.validate()
        most = self._model.heads_config.num_heads
        if not 0 <= num_heads <= most:
            raise ValueError(
                f"heads = {num_heads}: expected 0 (plain decoding) to {most}, the heads that the model has"
            )
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {max_new_tokens}: expected at least one")
        if not prompts:
            raise ValueError("no prompt was given")
        for number, prompt in enumerate(prompts, 1):
            if not len(prompt):
                raise ValueError(f"prompt {number} is empty: decoding needs at least one token to begin from")

    def _loop(self, arguments: tuple[Any, ...], num_heads: int, max_new_tokens: int, sampling: Sampling) -> Any:
        key = (num_heads, max_new_tokens, sampling, arguments[1].shape)
        if key not in self._compiled:
            options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "end_id": self._end_id, "sampling": sampling}
            if num_heads:
                loop = make_speculative(self._model, num_heads=num_heads, **options)
            else:
                loop = make_plain(self._model, **options)
            self._compiled[key] = loop.lower(*arguments).compile()
        return self._compiled[key]


def _continuation(found: Rows, row: int, prompt_length: int, seconds: float) -> Continuation:
    span = slice(prompt_length, int(found.length[row]))
    return Continuation(
        tokens=tuple(map(int, found.tokens[row, span])),
        proposers=tuple(map(int, found.proposer[row, span])),
        passes=int(found.passes[row]),
        tried=tuple(map(int, found.tried[row])),
        accepted=tuple(map(int, found.accepted[row])),
        seconds=seconds,
    )
