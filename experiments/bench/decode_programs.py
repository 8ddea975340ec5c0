"""The parts of a decoding round as programs of their own, each run many times in a loop, for timing."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtpd_jax.decoding.batch import Batch, one_round, prefill
from mtpd_jax.decoding.drafters.drafter import Drafts
from mtpd_jax.decoding.network import DecodingParameters, Network
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.stops import Stops
from mtpd_jax.decoding.strategies.speculative import Speculative, accept
from mtpd_jax.model.cache import Caches
from mtpd_jax.shapes import Array
from mtpd_jax.sharding import WHOLE

# Rounds per call: enough for the first one's cold caches not to count, fewer where a round takes long.
_ITERATIONS = 24
# Tokens of all prompts together that are read at a time, and of one.
_CHUNK_OF_ALL, _CHUNK = 4096, 512
# Nothing ends a text.
NEVER = Stops(())


def iterations(rows: int) -> int:
    """Rounds per call for this many rows; where rows cost next to nothing, as many as for one."""
    return max(4, _ITERATIONS // rows) if jax.default_backend() == "cpu" else _ITERATIONS


@dataclasses.dataclass(frozen=True)
class Program:
    """Runs its part so many times in a loop. The loop's beginning (it copies what it changes) is the time of no times.

    Attributes:
      compiled: the loop.
      parameters, state: what it is given.
    """

    compiled: jax.stages.Compiled
    parameters: DecodingParameters
    state: Any

    def __call__(self, times: int) -> Any:
        return self.compiled(self.parameters, self.state, jnp.int32(times))


def repeated(network: Network, step: Callable[[Any, Any], Any], parameters: DecodingParameters, state: Any) -> Program:
    """Compiles a loop around ``step(parameters, state) -> state``."""

    def run(parameters: DecodingParameters, state: Any, times: Array) -> Any:
        return jax.lax.fori_loop(0, times, lambda _, now: step(parameters, now), state)

    return Program(network.jit(run).lower(parameters, state, jnp.int32(0)).compile(), parameters, state)


class Parts:
    """Programs for one model and one batch size; each returns something that depends on all of its work.

    Args:
      network, parameters: from ``Network``.
      rows: prompts decoded together.
      prompt: tokens of each; a power of two.
      new_tokens: room after the prompt: with it, the number of slots that attention reads.
    """

    def __init__(self, network: Network, parameters: DecodingParameters, rows: int, prompt: int, new_tokens: int):
        self.network, self.parameters, self.rows = network, parameters, rows
        self.prompt, self.new_tokens = prompt, new_tokens
        self._started: tuple[int, Batch] | None = None
        rng = np.random.default_rng(0)
        vocabulary = parameters.unembedding.shape[1]
        self.prompts = jnp.asarray(rng.integers(0, vocabulary, (rows, prompt)), jnp.int32)
        self.keys = jax.random.split(jax.random.key(0), rows)

    def options(self, heads: int) -> Options:
        """Room for every iteration's tokens, whatever is accepted."""
        return Options(heads, max(self.new_tokens, iterations(self.rows) * (heads + 1) + 1))

    def _strategy(self, heads: int) -> Speculative:
        return Speculative(self.network, self.options(heads))

    def _start(self, heads: int) -> Batch:
        """What all parts with so many heads begin from: one for all of them, for its caches may be large."""
        if self._started is None or self._started[0] != heads:
            lengths, strategy = jnp.full(self.rows, self.prompt, jnp.int32), self._strategy(heads)
            chunk = min(self.prompt, _CHUNK, max(64, _CHUNK_OF_ALL // self.rows))
            start = self.network.jit(
                lambda parameters, prompts: prefill(strategy, parameters, prompts, lengths, self.keys, NEVER, chunk)
            )
            self._started = heads, start(self.parameters, self.prompts)
        return self._started[1]

    def _repeated(self, step: Callable[[Any, Any], Any], state: Any) -> Program:
        return repeated(self.network, step, self.parameters, state)

    def round(self, heads: int) -> Program:
        """Whole rounds; plain steps with 0 heads."""
        strategy = self._strategy(heads)

        def step(parameters: DecodingParameters, batch: Batch) -> Batch:
            return one_round(strategy, parameters, batch, NEVER)

        return self._repeated(step, self._start(heads))

    def cache(self, widest: int) -> Caches:
        """What passes read, of up to so many tokens: one for all of them."""
        return self.network.empty_cache(self.rows, self.prompt + self.new_tokens + widest)

    def verify(self, width: int, cache: Caches) -> Program:
        """Passes of the backbone over ``width`` tokens, with logits and the choice of tokens."""
        start = jnp.full(self.rows, self.prompt, jnp.int32)

        def step(parameters: DecodingParameters, state: tuple[Array, Any]) -> tuple[Array, Any]:
            hidden, cache = self.network.extend(parameters, state[0], start, state[1])
            return WHOLE.argmax(self.network.logits(parameters, hidden)), cache

        return self._repeated(step, (self.prompts[:, :width], cache))

    def draft(self, heads: int) -> Program:
        """Drafting by all heads; the last draft becomes the token that the next drafts begin from."""
        drafter = self._strategy(heads).drafter

        def step(parameters: DecodingParameters, batch: Batch) -> Batch:
            drafts, new = drafter.draft(parameters, batch.rows, batch.state.drafter, batch.keys)
            rows = dataclasses.replace(
                batch.rows, tokens=batch.rows.tokens.at[:, self.prompt].set(drafts.tokens[:, -1])
            )
            return dataclasses.replace(batch, rows=rows, state=dataclasses.replace(batch.state, drafter=new))

        return self._repeated(step, self._start(heads))

    def bookkeeping(self, heads: int) -> Program:
        """Appending, counting and moving the window, with made-up drafts, and the loop itself."""
        drafter, width = self._strategy(heads).drafter, self.network.config.width
        hidden = jnp.zeros((self.rows, heads + 1, width), self.network.dtype)

        def step(_: DecodingParameters, batch: Batch) -> Batch:
            rows = batch.rows
            accepted = rows.length % (heads + 1)
            candidates = (rows.length[:, None] + jnp.arange(heads + 1)) % 7
            made = candidates[:, :heads]
            after = accept(rows, Drafts(made, accepted * 0 + heads, made), candidates, accepted, NEVER)
            new = drafter.confirm(batch.state.drafter, rows, after, hidden)
            return dataclasses.replace(batch, rows=after, state=dataclasses.replace(batch.state, drafter=new))

        return self._repeated(step, self._start(heads))


def bare_products(network: Network, unrolled: DecodingParameters, rows: int, heads: int) -> Program:
    """The floor of a round: the products with the weights, one after the other, and nothing else.

    Args:
      network: of the model.
      unrolled: parameters with a tree per layer: the chain is written out.
      rows: prompts decoded together.
      heads: 0 for a plain step.
    """
    config = network.config
    width, mixed, mlp = config.width, config.query_heads * config.head_size, config.mlp_width

    def block(weights: Any, x: Array) -> Array:
        attention, feed_forward = weights["attention"], weights["mlp"]
        # One shape for all: what lies between two products is left out, or stands for itself.
        x = (x @ attention["qkv"]["kernel"].reshape(width, -1))[:, :mixed] @ attention["out"]["kernel"].reshape(
            -1, width
        )
        x = x @ feed_forward["gate_up"]["kernel"].reshape(width, -1)
        return (x[:, :mlp] * x[:, mlp:]) @ feed_forward["down"]["kernel"]

    def step(parameters: DecodingParameters, x: Array) -> Array:
        for weights in parameters.blocks:
            x = block(weights, x)
        found = jnp.max(network.logits(parameters, x))
        state = x
        for depth in range(heads):
            weights = parameters.heads[depth % network.modules]
            state = block(weights["block"], jnp.concatenate([state, x], axis=1) @ weights["projection"]["kernel"])
            found += jnp.max(network.logits(parameters, state[-rows:]))
        return jnp.ones_like(x) + 1e-9 * found

    return repeated(network, step, unrolled, jnp.ones((rows * (heads + 1), width), network.dtype))
