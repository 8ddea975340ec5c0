"""What acceptance means here, and how sure we are of it.

    conditional_k = accepted_k / tried_k      head k is tried in the rounds in which its draft was verified and drafts
                                              1…k-1 were accepted; drafts after an emitted end token or past the
                                              length limit are not tried
    cumulative_k  = conditional_1 · … · conditional_k; 0 from the first head on that was never accepted, or never tried
                    though head 1 was: none of its drafts ever stood
    tokens per pass                = (tokens - the one from prefill) / verification passes
    tokens per pass without bonus  = accepted drafts / verification passes

MTP-D's "acceptance rate" is the conditional one, its "cumulative acceptance rate" the cumulative (arXiv 2603.23911).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from mtpd_jax.decoding.decoder import Continuation
from mtpd_jax.decoding.rows import FIRST_PLACE
from mtpd_jax.evaluation.statistics import Counts, Interval, figure_of, mean_of

Rate = TypeVar("Rate")


@dataclasses.dataclass(frozen=True)
class Acceptance(Generic[Rate]):
    """Rates per draft of a round, from the first on; with heads, draft k is that of head k."""

    conditional: tuple[Rate, ...]
    cumulative: tuple[Rate, ...]


def acceptance_of(continuations: Sequence[Continuation]) -> Acceptance[float | None]:
    """Rates as plain numbers; None for a head that was never tried, and for cumulative rates if head 1 was not."""
    found = _acceptance(continuations, figure_of)
    return Acceptance(tuple(rate.mean for rate in found.conditional), tuple(rate.mean for rate in found.cumulative))


def acceptance_intervals(continuations: Sequence[Continuation]) -> Acceptance[Interval]:
    """Rates with their intervals over prompts."""
    return _acceptance(continuations, mean_of)


def _acceptance(continuations: Sequence[Continuation], figure: Callable[[Counts], Interval]) -> Acceptance[Interval]:
    # Draft by draft, over prompts.
    tried = list(zip(*(one.tried for one in continuations), strict=True))
    accepted = list(zip(*(one.accepted for one in continuations), strict=True))
    places = range(len(tried))
    return Acceptance(
        tuple(figure(Counts.of_prompts([accepted[k]], [tried[k]])) for k in places),
        tuple(figure(Counts.of_prompts(accepted[: k + 1], tried[: k + 1])) for k in places),
    )


@dataclasses.dataclass(frozen=True)
class PlaceScore:
    """What drafting came to in the rounds that began at a place of the text, prompt included.

    Attributes:
      begin, end: tokens of text before the round, from and below.
      passes: rounds, over all prompts.
      tokens_per_pass_without_bonus: accepted drafts per pass.
      conditional: per draft of a round.
    """

    begin: int
    end: int
    passes: int
    tokens_per_pass_without_bonus: Interval
    conditional: tuple[Interval, ...]


def by_place(continuations: Sequence[Continuation]) -> tuple[PlaceScore, ...]:
    """Acceptance by place in the text; places that no round began at are left out."""
    found = []
    for begin in sorted({place.begin for one in continuations for place in one.by_place}):
        # A prompt whose text never came there has nothing to say of it.
        here = [place for one in continuations for place in one.by_place if place.begin == begin]
        passes = [one.passes for one in here]
        rate = mean_of(Counts.of_prompts([[sum(one.accepted) for one in here]], [passes]))
        accepted, tried = (zip(*(getattr(one, name) for one in here), strict=True) for name in ("accepted", "tried"))
        drafts = zip(accepted, tried, strict=True)
        conditional = tuple(mean_of(Counts.of_prompts([stood], [of])) for stood, of in drafts)
        found.append(PlaceScore(begin, max(FIRST_PLACE, 2 * begin), sum(passes), rate, conditional))
    return tuple(found)


def tokens_per_pass(continuations: Sequence[Continuation]) -> Interval:
    """Tokens written per verification pass, the bonus token included; the one from prefill is not counted."""
    written = [len(one.tokens) - 1 for one in continuations]
    return mean_of(Counts.of_prompts([written], [[one.passes for one in continuations]]))


def tokens_per_pass_without_bonus(continuations: Sequence[Continuation]) -> Interval:
    """Accepted drafts per verification pass."""
    accepted = [sum(one.accepted) for one in continuations]
    return mean_of(Counts.of_prompts([accepted], [[one.passes for one in continuations]]))
