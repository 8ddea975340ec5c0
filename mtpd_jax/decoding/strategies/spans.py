"""A model that fills in masks, and is believed: several tokens per pass, and not the text of plain decoding.

One pass, with n confirmed tokens of which a have not been read (arXiv 2602.06019 §3.3):

    read     the a tokens, and k-1 masks after them
    take     of the k tokens that come next, as their likeliest ones are there: all (``static``); or those before the
             first whose probability is below tau, and at least one (``confident``, which the paper calls ConfAdapt)

The first of the k is the model's own next token, whatever is taken after it. Where the model is not sure even of that,
nothing is taken after it.

Masks leave nothing behind: the next pass reads the tokens that were taken, and writes their keys and values where those
of the masks were, before anything can attend to them.
"""

import abc
import dataclasses

import jax.numpy as jnp
from flax import struct

from mtpd_jax.decoding.drafters.masks import likeliest
from mtpd_jax.decoding.network import DecodingParameters
from mtpd_jax.decoding.options import MASKS, Options
from mtpd_jax.decoding.rows import Rows, read, slice_rows
from mtpd_jax.decoding.sampling import count_leading, draw, probabilities
from mtpd_jax.decoding.stops import Stops
from mtpd_jax.decoding.strategies.strategy import Strategy
from mtpd_jax.model.cache import Caches
from mtpd_jax.shapes import Array, Bool, Hidden, Int


@struct.dataclass
class SpanState:
    """What goes from round to round.

    Attributes:
      cache: the model's, holding the tokens before ``unread``.
      unread: [B]; the first token that has not been read.
    """

    cache: Caches
    unread: Int[Array, " B"]


class Spans(Strategy):
    """What is taken of a span is for the subclass to say. A temperature draws where a pass takes one token."""

    lossless = False
    drafter_name = MASKS

    @abc.abstractmethod
    def taken(self, sure: Bool[Array, "B K"]) -> Bool[Array, "B K"]:
        """Which slots are taken, up to the first that is not; but the first slot always is.

        Args:
          sure: whether their probability is at least ``Options.min_confidence``.
        """

    def start(self, batch: int, slots: int) -> SpanState:
        return SpanState(self.network.empty_cache(batch, slots), jnp.zeros(batch, jnp.int32))

    def read(
        self, parameters: DecodingParameters, rows: Rows, state: SpanState, first: Int[Array, " B"], count: int
    ) -> tuple[Hidden, SpanState]:
        hidden, cache = self.network.extend(parameters, read(rows.tokens, first, count), first, state.cache)
        return hidden, SpanState(cache, jnp.minimum(rows.length, first + count))

    def round(
        self, parameters: DecodingParameters, rows: Rows, state: SpanState, keys: Array, stops: Stops
    ) -> tuple[Rows, SpanState]:
        masks, width = self.options.num_drafts, self.options.width
        unread_B = rows.length - state.unread
        # The tokens that are new since the last pass, and masks after them.
        tokens = read(rows.tokens, state.unread, width)
        mask = self.network.config.vocabulary_size
        tokens = jnp.where(jnp.arange(width)[None, :] < unread_B[:, None], tokens, mask)
        hidden, cache = self.network.extend(parameters, tokens, state.unread, state.cache)
        # Of the k tokens that come next, those that are taken. Logits of all that was read where passes share a width.
        if self.options.pass_width is None:
            logits = self.network.logits(parameters, slice_rows(hidden, unread_B - 1, masks + 1))
        else:
            logits = slice_rows(self.network.logits(parameters, hidden), unread_B - 1, masks + 1)
        choices, sure = likeliest(logits, self.options.min_confidence)
        count = jnp.maximum(1, count_leading(self.taken(sure)))
        if not self.options.sampling.greedy:
            drawn = draw(keys, probabilities(logits[:, 0], self.options.sampling))
            choices = choices.at[:, 0].set(jnp.where(count == 1, drawn, choices[:, 0]))
        proposers = jnp.broadcast_to(jnp.arange(masks + 1), choices.shape)
        after = _counted(rows, rows.append(choices, count, proposers, stops))
        # All but what was just written has been read; a finished row's last token counts as unread for ever.
        return after, SpanState(cache, jnp.minimum(rows.length, after.length - 1))


class Static(Spans, name="static"):
    """All k tokens of every span are taken."""

    @classmethod
    def check(cls, options: Options) -> None:
        if options.min_confidence:
            raise ValueError(f"min_confidence = {options.min_confidence}: expected 0 with strategy = 'static'")
        if not options.sampling.greedy and options.num_drafts:
            raise ValueError(
                f"temperature = {options.sampling.temperature}: expected 0 with strategy = 'static': only a pass that "
                "writes one token can draw it"
            )

    def taken(self, sure: Bool[Array, "B K"]) -> Bool[Array, "B K"]:
        return jnp.ones_like(sure)


class Confident(Spans, name="confident"):
    """Those before the first whose probability, at temperature 1, is below tau, and at least one."""

    @classmethod
    def check(cls, options: Options) -> None:
        if options.num_drafts and not options.min_confidence:
            raise ValueError("min_confidence = 0: expected more with strategy = 'confident'; 'static' takes all")

    def taken(self, sure: Bool[Array, "B K"]) -> Bool[Array, "B K"]:
        return sure


def _counted(before: Rows, after: Rows) -> Rows:
    """The rows after a pass, with it counted: what was taken after the first token, and what was tried and was not."""
    k, going, place = jnp.arange(after.tried.shape[-1])[None, :], ~before.finished[:, None], before.place
    taken = (after.length - before.length)[:, None] - 1
    accepted = k < taken
    tried = accepted | ((k == taken) & ~after.finished[:, None])  # beyond an end or a limit nothing is
    return dataclasses.replace(
        after,
        passes=after.passes + place * going,
        tried=after.tried + place[:, :, None] * tried[:, None],
        accepted=after.accepted + place[:, :, None] * accepted[:, None],
    )
