"""The rows of one variant, one per seed, read as figures."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

import numpy as np

from experiments.sweep.rows import Row, WayCounts
from mtpd_jax.evaluation.statistics import Counts, Interval, difference, mean_of

# What a row has a single number of.
Number = Literal["steps", "tokens", "parameters", "head_parameters", "training_flops", "seconds"]


@dataclasses.dataclass(frozen=True)
class Arm:
    """A variant's finished runs; every figure is taken from the counts in their rows.

    Attributes:
      name: of the variant.
      rows: one per seed, in the order of seeds.
    """

    name: str
    rows: Sequence[Row]

    @property
    def seeds(self) -> list[int]:
        """The seeds of the rows."""
        return [row.seed for row in self.rows]

    @property
    def heads(self) -> int:
        """Heads that the model has."""
        return len(self.rows[0].text.heads)

    def of(self, seeds: Collection[int]) -> "Arm":
        """The same with some of its seeds."""
        return Arm(self.name, [row for row in self.rows if row.seed in seeds])

    def mean(self, number: Number) -> float:
        """A number of the rows: its mean over seeds."""
        return float(np.mean([getattr(row, number) for row in self.rows]))

    def main_ce(self) -> Counts:
        """Cross entropy of the main head on the held-out texts, nats per token."""
        return Counts.ratio([row.text.nats for row in self.rows], [row.text.weight for row in self.rows])

    def agreement(self, head: int) -> Counts:
        """Teacher-forced agreement with the main head on the held-out texts."""
        found = [row.text.heads[head - 1] for row in self.rows]
        return Counts.ratio([part.agreed for part in found], [part.weight for part in found])

    def agreement_on_output(self, mode: str, head: int) -> Counts:
        """Teacher-forced agreement on what plain decoding wrote."""
        found = [row.decoding[mode] for row in self.rows]
        return Counts.ratio([part.agreed[head - 1] for part in found], [part.counted[head - 1] for part in found])

    def conditional(self, mode: str, heads: int, head: int) -> Counts:
        """Conditional acceptance of a head when decoding with ``heads`` of them."""
        return self.conditional_of(mode, heads, [head])

    def conditional_of(self, mode: str, heads: int, of: Collection[int]) -> Counts:
        """Conditional acceptance of several heads together: all that they had accepted over all that they tried."""
        found = self._decoded(mode, heads)

        def together(by_head: list[list[int]]) -> list[float]:
            return [sum(of_text) for of_text in zip(*(by_head[k - 1] for k in of), strict=True)]

        return Counts.ratio([together(way.accepted) for way in found], [together(way.tried) for way in found])

    def cumulative(self, mode: str, heads: int, head: int) -> Counts:
        """Cumulative acceptance of heads 1 to ``head``."""
        factors = [self.conditional(mode, heads, k) for k in range(1, head + 1)]
        product = factors[0]
        for factor in factors[1:]:
            product = product * factor
        return product

    def tokens_per_pass(self, mode: str, heads: int) -> Counts:
        """Tokens per verification pass, the bonus token included, the one from prefill not."""
        found = self._decoded(mode, heads)
        return Counts.ratio([[count - 1 for count in way.tokens] for way in found], [way.passes for way in found])

    def speed_over(self, mode: str, heads: int, baseline: int) -> Counts:
        """Tokens per second over those of another number of heads of the same model; 0 is plain decoding."""
        fast, slow = self._decoded(mode, heads), self._decoded(mode, baseline)
        return Counts.ratio([way.tokens for way in fast], [way.seconds for way in fast]) * Counts.ratio(
            [way.seconds for way in slow], [way.tokens for way in slow]
        )

    def distinct_4grams(self, mode: str) -> float:
        """Share of 4-grams of plain decoding's output that are the first of their kind in it."""
        shares = [way.distinct_4grams for way in self._decoded(mode, 0)]
        return float(np.mean([share for share in shares if share is not None]))

    def decodes(self, heads: int) -> bool:
        """Whether decoding with that many heads was measured."""
        return heads in self.rows[0].decoding["greedy"].by_heads

    def _decoded(self, mode: str, heads: int) -> list[WayCounts]:
        return [row.decoding[mode].by_heads[heads] for row in self.rows]


def paired(arms: Mapping[str, Arm], name: str, base: str) -> tuple[Arm, Arm] | None:
    """Two variants with the seeds only that both have, or None if there is none.

    Raises:
      ValueError: they were measured on other texts (another Python, other packages), so that nothing is comparable.
    """
    if name not in arms or base not in arms:
        return None
    seeds = set(arms[name].seeds) & set(arms[base].seeds)
    if not seeds:
        return None
    first, second = arms[name].of(seeds), arms[base].of(seeds)
    if len({str(row.text.bytes) for arm in (first, second) for row in arm.rows}) > 1:
        raise ValueError(f"{name} and {base} were measured on other texts: delete the rows of one, and run it again")
    return first, second


def gain(arm: Arm, base: Arm, figure: Callable[[Arm], Counts]) -> tuple[Interval, list[float]]:
    """How much larger an arm's figure is than the base's, the two being paired; and the same per seed."""
    return difference(figure(arm), figure(base))


def times(
    arm: Arm, base: Arm, figure: Callable[[Arm], Counts], of_base: Callable[[Arm], Counts] | None = None
) -> Interval:
    """How many times the base's figure an arm's is, the two being paired; ``of_base`` if the base's is another one."""
    return mean_of(figure(arm) * (of_base or figure)(base).inverse())
