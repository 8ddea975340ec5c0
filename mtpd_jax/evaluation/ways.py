"""The ways in which a run is decoded to measure it: drafts of every length asked for, and ways to fill in masks."""

import dataclasses
from collections.abc import Sequence

from mtpd_jax.decoding.options import MASKS, Options
from mtpd_jax.decoding.strategies import STRATEGIES
from mtpd_jax.evaluation.decoding import Ways, ways_of
from mtpd_jax.evaluation.quality import span_ways
from mtpd_jax.run import Run


@dataclasses.dataclass(frozen=True)
class Asked:
    """What ``evaluate`` is asked to decode with; see ``evaluate.run``."""

    heads: Sequence[int] | None
    drafters: Sequence[str]
    spans: Sequence[str] | None
    slots: Sequence[int] | None
    confidences: Sequence[float]
    bit_exact: bool

    def check(self) -> None:
        """Checks types, as far as that goes without the run.

        Raises:
          ValueError: something is no list.
        """
        for name, kind in (
            ("heads", "integers"),
            ("slots", "integers"),
            ("spans", "names"),
            ("confidences", "numbers"),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, list | tuple):
                raise ValueError(f"{name} = {value!r}: expected a list of {kind}")

    def of_drafts(self, opened: Run, options: Options) -> Ways:
        """Drafts of every length, by everyone who drafts; plain decoding among them.

        Args:
          opened: the run.
          options: of all ways.

        Raises:
          ValueError: an option is out of range, or is not for this model.
        """
        if MASKS in self.drafters:
            raise ValueError(f"--drafters={MASKS}: expected others; --spans=verified drafts with masks")
        if opened.config.model.mask_embedding:
            self._check_student(opened, options)
        numbers = self._numbers(opened.config.heads.num_heads)
        for number in numbers:
            options.with_drafts(number).validate()
        return ways_of(options.sharing_width(max(numbers)) if self.bit_exact else options, numbers, self.drafters)

    def _check_student(self, opened: Run, options: Options) -> None:
        path = opened.trained.folder.path
        if STRATEGIES[options.strategy].drafter_name == MASKS:
            raise ValueError(f"--strategy={options.strategy}: expected --spans={options.strategy} instead, for {path}")
        if options.min_confidence:
            asked = f"--min_confidence={options.min_confidence}"
            raise ValueError(f"{asked}: expected --confidences={options.min_confidence} instead, for {path}")

    def of_spans(self, opened: Run, options: Options) -> Ways:
        """Ways to fill in masks, of a model that has them; see ``evaluation.quality.span_ways``.

        Args:
          opened: the run.
          options: of all ways.

        Raises:
          ValueError: an option is out of range, or is not for this model.
        """
        named = [name for name, one in STRATEGIES.items() if one.drafter_name == MASKS]
        if not opened.config.model.mask_embedding:
            if self.spans or self.slots:
                path = opened.trained.folder.path
                raise ValueError(f"--spans, --slots: expected neither, for {path} fills in no masks")
            return {}
        # A draw needs a pass that writes one token, which ``static`` has none of.
        possible = [name for name in named if options.sampling.greedy or name != "static"]
        chosen = possible if self.spans is None else self.spans
        if unknown := [name for name in chosen if name not in named]:
            raise ValueError(f"--spans={unknown[0]}: expected some of {','.join(named)}")
        if wrong := [length for length in self.slots or () if length < 2]:
            raise ValueError(f"--slots={wrong[0]}: expected at least 2: one is plain decoding")
        lengths = [2, None] if self.slots is None else self.slots
        lengths = sorted({opened.masks("static", None, length) + 1 for length in lengths})
        own = dataclasses.replace(options, drafter=MASKS, draft_until=None)
        ways = span_ways(
            own.sharing_width(lengths[-1] - 1) if self.bit_exact else own, chosen, lengths, self.confidences
        )
        for way in ways.values():
            way.validate()
        return ways

    def _numbers(self, most: int) -> list[int]:
        """The numbers of heads to run: those asked for, and 0 and 1 as baselines."""
        heads = self.heads
        if heads is None:
            heads = [1 << exponent for exponent in range(most.bit_length()) if 1 << exponent <= most] + [most]
        return sorted({0, *([1] if most else []), *heads})


def sharing(*groups: Ways) -> list[Ways]:
    """The same ways, with one width of passes for all if they share one: the widest."""
    widths = [way.pass_width for ways in groups for way in ways.values() if way.pass_width is not None]
    return [
        {
            name: way if way.pass_width is None else dataclasses.replace(way, pass_width=max(widths))
            for name, way in ways.items()
        }
        for ways in groups
    ]
