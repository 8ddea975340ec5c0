"""The rows of one variant, one per seed, read as figures."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.sweep.runner import Row
from experiments.sweep.statistics import Counts, difference, mean_of
from mtpd_jax.evaluation.acceptance import Interval


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
        return [row["seed"] for row in self.rows]

    @property
    def heads(self) -> int:
        """Heads that the model has."""
        return len(self.rows[0]["text"]["heads"])

    def of(self, seeds: Collection[int]) -> "Arm":
        """The same with some of its seeds."""
        return Arm(self.name, [row for row in self.rows if row["seed"] in seeds])

    def mean(self, field: str) -> float:
        """A number of the rows, such as ``seconds``: its mean over seeds."""
        return float(np.mean([row[field] for row in self.rows]))

    def main_ce(self) -> Counts:
        """Cross entropy of the main head on the held-out texts, nats per token."""
        return Counts.ratio(self._text("nats"), self._text("weight"))

    def agreement(self, head: int) -> Counts:
        """Teacher-forced agreement with the main head on the held-out texts."""
        found = [row["text"]["heads"][head - 1] for row in self.rows]
        return Counts.ratio([part["agreed"] for part in found], [part["weight"] for part in found])

    def agreement_on_output(self, mode: str, head: int) -> Counts:
        """Teacher-forced agreement on what plain decoding wrote."""
        found = [row["decoding"][mode] for row in self.rows]
        return Counts.ratio([part["agreed"][head - 1] for part in found], [part["counted"][head - 1] for part in found])

    def conditional(self, mode: str, heads: int, head: int) -> Counts:
        """Conditional acceptance of a head when decoding with ``heads`` of them."""
        return self.conditional_of(mode, heads, [head])

    def conditional_of(self, mode: str, heads: int, of: Collection[int]) -> Counts:
        """Conditional acceptance of several heads together: all that they had accepted over all that they tried."""
        found = self._decoded(mode, heads)
        accepted, tried = (
            [[sum(part[name][k - 1][text] for k in of) for text in range(len(part["tokens"]))] for part in found]
            for name in ("accepted", "tried")
        )
        return Counts.ratio(accepted, tried)

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
        return Counts.ratio([[count - 1 for count in part["tokens"]] for part in found], [p["passes"] for p in found])

    def speed_over(self, mode: str, heads: int, baseline: int) -> Counts:
        """Tokens per second over those of another number of heads of the same model; 0 is plain decoding."""
        fast, slow = self._decoded(mode, heads), self._decoded(mode, baseline)
        return Counts.ratio([p["tokens"] for p in fast], [p["seconds"] for p in fast]) * Counts.ratio(
            [p["seconds"] for p in slow], [p["tokens"] for p in slow]
        )

    def distinct_4grams(self, mode: str) -> float:
        """Share of 4-grams of plain decoding's output that are the first of their kind in it."""
        return float(np.mean([part["distinct_4grams"] for part in self._decoded(mode, 0)]))

    def decodes(self, heads: int) -> bool:
        """Whether decoding with that many heads was measured."""
        return str(heads) in self.rows[0]["decoding"]["greedy"]

    def _decoded(self, mode: str, heads: int) -> list[dict[str, Any]]:
        return [row["decoding"][mode][str(heads)] for row in self.rows]

    def _text(self, name: str) -> list[list[float]]:
        return [row["text"][name] for row in self.rows]


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
    if len({str(row["text"]["bytes"]) for arm in (first, second) for row in arm.rows}) > 1:
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
