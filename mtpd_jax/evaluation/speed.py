"""The speed model: what a round costs, what it brings, and so which number of heads is fastest.

    seconds per round(K)   = verify(K+1) + draft(K) + bookkeeping(K)
    tokens per round(K)    = 1 + cumulative_1 + … + cumulative_K
    tokens per second(K)   = rows * tokens per round / seconds per round

A round has to bring more tokens than it costs plain steps (break-even). A batch of prompts takes as many rounds as
its longest; with a queue behind it, rows that are finished take the next prompt (``rounds_of_queue``). Costs are
measured, in ``experiments/bench``; acceptance is that of ``evaluation.acceptance``. Our choice.
"""

import dataclasses
import heapq
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class RoundCosts:
    """Measured seconds for one batch size.

    Attributes:
      rows: prompts decoded together.
      verify: by tokens per pass of the backbone, logits and choice of tokens included.
      draft: by number of heads; all of them together.
      bookkeeping: by number of heads, 0 for plain decoding: appending, counting, moving the window.
    """

    rows: int
    verify: Mapping[int, float]
    draft: Mapping[int, float]
    bookkeeping: Mapping[int, float]

    def seconds(self, drafts: int, heads: int | None = None) -> float:
        """Seconds of a round with so many drafts, by as many heads (None: one each).

        Between measured sizes by linear interpolation.
        """
        drafting = _interpolate({0: 0.0, **self.draft}, drafts if heads is None else heads)
        return _interpolate(self.verify, drafts + 1) + drafting + _interpolate(self.bookkeeping, drafts)

    def tokens_per_second(self, heads: int, cumulative: Sequence[float]) -> float:
        """Tokens per second of all rows together, prefill left out.

        Args:
          heads: drafts per round; 0 is plain decoding.
          cumulative: cumulative acceptance of heads 1…``heads`` or more.
        """
        return self.rows * expected_tokens(heads, cumulative) / self.seconds(heads)


def rounds_of_batches(rounds: Sequence[int], rows: int) -> int:
    """Rounds until all prompts are finished, ``rows`` at a time, if each batch waits for its longest.

    Args:
      rounds: that each prompt takes, in the order of decoding.
      rows: prompts decoded together.
    """
    return sum(max(rounds[start : start + rows]) for start in range(0, len(rounds), rows))


def rounds_of_queue(rounds: Sequence[int], rows: int) -> int:
    """Rounds until all prompts are finished, if a row that is finished takes the next prompt; see above."""
    # The row that is free first takes the next prompt.
    ends = [0] * min(rows, len(rounds))
    for number in rounds:
        heapq.heappush(ends, heapq.heappop(ends) + number)
    return max(ends)


def expected_tokens(heads: int, cumulative: Sequence[float]) -> float:
    """Tokens that a round of ``heads`` drafts brings: the accepted ones, and the main head's own."""
    return 1 + sum(cumulative[:heads])


def best_heads(costs: RoundCosts, cumulative: Sequence[float]) -> int:
    """The number of heads, 0 included, with the most tokens per second."""
    return max(range(len(cumulative) + 1), key=lambda heads: costs.tokens_per_second(heads, cumulative))


def unprofitable_batch(by_rows: Sequence[RoundCosts], cumulative: Sequence[float]) -> int | None:
    """The smallest measured batch from which on plain decoding is fastest; None if drafting pays at all of them."""
    paying = [costs.rows for costs in by_rows if best_heads(costs, cumulative)]
    beyond = [costs.rows for costs in by_rows if costs.rows > max(paying, default=0)]
    return min(beyond, default=None)


def _interpolate(measured: Mapping[int, float], at: int) -> float:
    places = sorted(measured)
    if at > places[-1]:  # beyond the last, as the last two go on
        slope = (measured[places[-1]] - measured[places[-2]]) / (places[-1] - places[-2]) if len(places) > 1 else 0.0
        return measured[places[-1]] + slope * (at - places[-1])
    return float(np.interp(at, places, [measured[place] for place in places]))
