"""What a drafter is: whoever proposes the tokens that a pass verifies."""

import abc
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import struct

from mtpd_jax.decoding.network import DecodingParameters, Network
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.rows import Rows, slice_rows
from mtpd_jax.shapes import AnyArray, Array, Bool, Float, Hidden, Int

DRAFTERS: dict[str, type["Drafter"]] = {}

# States h^0 of a row's newest positions.
Window = Float[Array, "B W D"]
# In ``Rows.proposer``: an accepted draft that was copied from the text so far.
COPIED = -1


@struct.dataclass
class Drafts:
    """Up to K drafts per row.

    Attributes:
      tokens: [B, K].
      count: [B]; how many of them stand to be verified.
      proposers: [B, K]; k for a draft of head k, ``COPIED`` for one out of the text.
      probabilities: [B, K, V]; what the drafts were drawn from; None if each was certain.
      logits: [B, K, V]; what a head that drafted it made of the place, in float32; None without heads.
    """

    tokens: Int[AnyArray, "B K"]
    count: Int[AnyArray, " B"]
    proposers: Int[AnyArray, "B K"]
    probabilities: Float[AnyArray, "B K V"] | None = None
    logits: Float[AnyArray, "B K V"] | None = None


class Drafter(abc.ABC):
    """Proposes tokens, round by round. A subclass gives its name: ``class Heads(Drafter, name="heads")``.

    Its state is a tree of caches, and of arrays whose first axis is the row of the batch; rows come and go
    (``decoding.batch``), each with its part of the state. Drafts may depend on the confirmed text and on the row's key
    alone: what is drawn must not decide what is proposed in its place, or sampled text would not be plain decoding's.

    Args:
      network: that verifies, and whose heads may draft.
      options: how many drafts, and how they are chosen.

    Attributes:
      needs_heads: whether there have to be heads.
      needs_masks: whether the model has to have a mask embedding.
      adapts: whether it stops drafting below ``Options.min_confidence``.
    """

    needs_heads: ClassVar[bool] = False
    needs_masks: ClassVar[bool] = False
    adapts: ClassVar[bool] = False

    def __init_subclass__(cls, name: str | None = None) -> None:
        if name is not None:
            DRAFTERS[name] = cls

    def __init__(self, network: Network, options: Options):
        self.network, self.options = network, options

    def start(self, batch: int, slots: int) -> Any:
        """The state before anything was read.

        Args:
          batch: rows.
          slots: positions that a row may come to.
        """
        return ()

    def read(
        self, parameters: DecodingParameters, state: Any, rows: Rows, first: Int[Array, " B"], hidden: Hidden
    ) -> Any:
        """Takes in a chunk of the prompts; chunks come in order.

        Args:
          rows: that hold the prompts.
          first: [B]; the chunk's first position.
          hidden: [B, T, D]; h^0 of the chunk; it may go on past a prompt.
        """
        return state

    @classmethod
    def of(cls, network: Network, options: Options, alone: bool = True) -> "Drafter":
        """The drafter for a network.

        Args:
          network, options: see above.
          alone: whether nobody else's drafts are ever confirmed.
        """
        return cls(network, options)

    @abc.abstractmethod
    def draft(self, parameters: DecodingParameters, rows: Rows, state: Any, keys: Array) -> tuple[Drafts, Any]:
        """Drafts what may follow the confirmed text, ``options.num_drafts`` tokens wide.

        Args:
          keys: [B]; of the rows, for this round. The numbers 1…K may be folded in.
        """

    def inputs(self, last: Int[Array, "B 1"], drafts: Drafts) -> Int[Array, "B W"]:
        """What a pass reads: the last confirmed token, the drafts, and after them whatever serves to draft again.

        As many tokens in every round.
        """
        return jnp.concatenate([last, drafts.tokens], axis=1)

    def confirm(self, state: Any, before: Rows, after: Rows, hidden: Hidden) -> Any:
        """Takes in what a round confirmed.

        Args:
          before, after: the rows.
          hidden: [B, W, D]; h^0 of what the pass read, of which the confirmed text has the first.
        """
        return state


class Nobody(Drafter):
    """Plain decoding: one token per pass. Drafts of no length are nobody's, whoever is named."""

    def draft(self, parameters: DecodingParameters, rows: Rows, state: Any, keys: Array) -> tuple[Drafts, Any]:
        nothing = jnp.zeros((rows.length.shape[0], 0), jnp.int32)
        return Drafts(nothing, rows.length * 0, nothing), state


def drafting(rows: Rows, options: Options) -> Bool[Array, " B"]:
    """The rows that go on, and all of whose drafts of a round lie where the heads were trained."""
    if options.draft_until is None:
        return ~rows.finished
    return ~rows.finished & (rows.length + options.num_drafts <= options.draft_until)


def moved(window: Window, hidden: Hidden, count: Int[Array, " B"]) -> Window:
    """A window of states, [B, W, D], after ``count`` more positions, whose states ``hidden`` begins with."""
    return slice_rows(jnp.concatenate([window, hidden], axis=1), count, window.shape[1])


def by_head(tokens: Int[Array, "B K"]) -> Int[Array, "B K"]:
    """The proposers of drafts that heads 1…K made."""
    return jnp.broadcast_to(1 + jnp.arange(tokens.shape[1]), tokens.shape)


def heads_that_draft(options: Options) -> int:
    """How many heads these options run, round by round."""
    return options.num_drafts if DRAFTERS[options.drafter].needs_heads else 0


def drafter_of(network: Network, options: Options) -> Drafter:
    """Who drafts for these options."""
    return (DRAFTERS[options.drafter] if options.num_drafts else Nobody).of(network, options)
