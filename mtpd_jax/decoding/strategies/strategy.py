"""What a decoding strategy is: what a round does between one confirmed text and the next."""

import abc
from typing import Any, ClassVar

from mtpd_jax.decoding.network import DecodingParameters, Network
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.rows import Rows
from mtpd_jax.decoding.stops import Stops
from mtpd_jax.shapes import Array, Hidden, Int

STRATEGIES: dict[str, type["Strategy"]] = {}


class Strategy(abc.ABC):
    """Writes text, round by round. A subclass gives its name: ``class Speculative(Strategy, name="speculative")``.

    Whoever drafts, and whether anything verifies what was drafted, is its own affair. Its state is a tree of caches,
    and of arrays whose first axis is the row of the batch.

    Args:
      network, options: of decoding.

    Attributes:
      lossless: whether text is plain decoding's, or distributed as it.
      drafter_name: who drafts, where it is played with one drafter alone; None: any.
    """

    lossless: ClassVar[bool]
    drafter_name: ClassVar[str | None] = None

    def __init_subclass__(cls, name: str | None = None) -> None:
        if name is not None:  # a class without one is what several strategies share
            STRATEGIES[name] = cls

    def __init__(self, network: Network, options: Options):
        self.network, self.options = network, options

    @classmethod  # noqa: B027  most have nothing to say
    def check(cls, options: Options) -> None:
        """Checks options that only this strategy has something to say of.

        Raises:
          ValueError: naming the option and what is allowed.
        """

    @abc.abstractmethod
    def start(self, batch: int, slots: int) -> Any:
        """The state before anything was read, of rows that may come to ``slots`` positions."""

    @abc.abstractmethod
    def read(
        self, parameters: DecodingParameters, rows: Rows, state: Any, first: Int[Array, " B"], count: int
    ) -> tuple[Hidden, Any]:
        """Reads ``count`` tokens of the prompts in ``rows``, from position ``first`` on; returns their h^0 as well.

        It may read past a prompt: what it writes there is not seen before it is overwritten.
        """

    @abc.abstractmethod
    def round(
        self, parameters: DecodingParameters, rows: Rows, state: Any, keys: Array, stops: Stops
    ) -> tuple[Rows, Any]:
        """Writes at least one token to every row that is not finished.

        All tokens but the last confirmed one have been read. Rows that are finished come along, and must stay as they
        are.

        Args:
          keys: [B]; of the rows, for this round.
          stops: what ends a text.
        """


def strategy_of(network: Network, options: Options) -> Strategy:
    """The strategy that options name."""
    return STRATEGIES[options.strategy](network, options)


def is_lossless(options: Options) -> bool:
    """Whether a way of decoding promises plain decoding's text, or its distribution: without guesses every one does."""
    return not options.num_drafts or STRATEGIES[options.strategy].lossless
