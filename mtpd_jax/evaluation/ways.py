"""The ways in which a run is decoded to measure it: drafts of every length asked for, and ways to fill in masks."""

import dataclasses
from collections.abc import Sequence

from mtpd_jax.config import Config
from mtpd_jax.decoding.drafters import DRAFTERS
from mtpd_jax.decoding.options import MASKS, Options
from mtpd_jax.decoding.strategies import STRATEGIES
from mtpd_jax.evaluation.decoding import Ways, ways_of
from mtpd_jax.evaluation.quality import span_ways
from mtpd_jax.validation import check_count, check_integer

# Drafts per round where neither the user nor heads say how many. Our choice: docs/decoding.md.
_WITHOUT_HEADS = 4


@dataclasses.dataclass(frozen=True)
class Asked:
    """What ``evaluate`` is asked to decode with; see ``evaluate.run``.

    Raises:
      ValueError: something should be a list.
    """

    heads: Sequence[int] | None
    drafters: Sequence[str]
    spans: Sequence[str] | None
    slots: Sequence[int] | None
    confidences: Sequence[float] | None
    bit_exact: bool

    def __post_init__(self) -> None:
        for name, kind in (
            ("heads", "integers"),
            ("slots", "integers"),
            ("spans", "names"),
            ("confidences", "numbers"),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, list | tuple):
                raise ValueError(f"{name} = {value!r}: expected a list of {kind}")
        for name in ("heads", "slots"):
            for number in getattr(self, name) or ():
                check_integer(name, number)

    def ways(self, config: Config, where: str, options: Options) -> tuple[Ways, Ways]:
        """Drafts of every length by everyone who drafts, plain decoding among them; and ways to fill in masks, of a
        model that has them (see ``evaluation.quality.span_ways``). If they are to be bit exact, all have one width.

        Args:
          config, where: of the run, and its folder.
          options: of all ways.

        Raises:
          ValueError: an option is out of range, or is not for this model.
        """
        drafts, spans = self._of_drafts(config, where, options), self._of_spans(config, where, options)
        widths = [way.pass_width for way in (*drafts.values(), *spans.values()) if way.pass_width is not None]

        def shared(way: Options) -> Options:
            return way if way.pass_width is None else dataclasses.replace(way, pass_width=max(widths))

        of_drafts, of_spans = ({name: shared(way) for name, way in ways.items()} for ways in (drafts, spans))
        return of_drafts, of_spans

    def _of_drafts(self, config: Config, where: str, options: Options) -> Ways:
        if MASKS in self.drafters:
            raise ValueError(f"--drafters={MASKS}: expected others; --spans=verified drafts with masks")
        if config.model.mask_embedding:
            _check_student(where, options)
        numbers = self._numbers(max((drafts_of(config, name) for name in self.drafters), default=0))
        for number in numbers:
            options.with_drafts(number).validate()
        return ways_of(options.sharing_width(max(numbers)) if self.bit_exact else options, numbers, self.drafters)

    def _of_spans(self, config: Config, where: str, options: Options) -> Ways:
        named = [name for name, one in STRATEGIES.items() if one.drafter_name == MASKS]
        if not config.model.mask_embedding:
            given = {"spans": self.spans, "slots": self.slots, "confidences": self.confidences}
            if wrong := [name for name, value in given.items() if value]:
                raise ValueError(f"--{wrong[0]}: expected none, for {where} fills in no masks")
            return {}
        # A draw needs a pass that writes one token, which ``static`` has none of.
        possible = [name for name in named if options.sampling.greedy or name != "static"]
        chosen = possible if self.spans is None else self.spans
        if unknown := [name for name in chosen if name not in named]:
            raise ValueError(f"--spans={unknown[0]}: expected some of {','.join(named)}")
        if short := [length for length in self.slots or () if length < 2]:
            raise ValueError(f"--slots={short[0]}: expected at least 2: one is plain decoding")
        lengths = [2, None] if self.slots is None else self.slots
        lengths = sorted({masks_to_read(config, where, "static", length) + 1 for length in lengths})
        own = dataclasses.replace(options, drafter=MASKS, draft_until=None)
        ways = span_ways(
            own.sharing_width(lengths[-1] - 1) if self.bit_exact else own, chosen, lengths,
            [0.9] if self.confidences is None else self.confidences,
        )  # fmt: skip
        for way in ways.values():
            way.validate()
        return ways

    def _numbers(self, most: int) -> list[int]:
        """The numbers of heads to run: those asked for, and 0 and 1 as baselines."""
        heads = self.heads
        if heads is None:
            heads = [1 << exponent for exponent in range(most.bit_length()) if 1 << exponent <= most] + [most]
        return sorted({0, *([1] if most else []), *heads})


def drafts_of(config: Config, drafter: str) -> int:
    """Drafts per round where none are asked for: one by each head, and some by who drafts without heads."""
    needs_heads = drafter not in DRAFTERS or DRAFTERS[drafter].needs_heads
    return config.heads.num_heads or (0 if needs_heads else _WITHOUT_HEADS)


def _check_student(where: str, options: Options) -> None:
    strategy, tau = options.strategy, options.min_confidence
    if STRATEGIES[strategy].drafter_name == MASKS:
        raise ValueError(f"--strategy={strategy}: expected --spans={strategy} instead, for {where} fills in masks")
    if tau:
        raise ValueError(f"--min_confidence={tau}: expected --confidences={tau} instead, for {where} fills in masks")


def who_drafts(
    config: Config, where: str, heads: int | None, drafter: str, strategy: str | None, slots: int | None
) -> tuple[int, str, str]:
    """Drafts per round, who makes them, and the strategy, where a user left something to the model.

    Args:
      config, where: of the run, and its folder.
      heads, drafter, strategy, slots: see ``Run.generate``.

    Raises:
      ValueError: they do not go together, or not with this model.
    """
    if strategy is None:
        own = config.model.mask_embedding and heads is None and drafter == "heads"
        strategy = "verified" if own or slots is not None or drafter == MASKS else "speculative"
    if strategy in STRATEGIES and STRATEGIES[strategy].drafter_name == MASKS:
        if drafter not in ("heads", MASKS):
            raise ValueError(f"drafter = {drafter!r}: expected none with strategy = {strategy!r}: the masks draft")
        if heads is not None:
            expected = f"expected none with strategy = {strategy!r}; slots says how long spans are"
            raise ValueError(f"heads = {heads}: {expected}")
        return masks_to_read(config, where, strategy, slots), MASKS, strategy
    if slots is not None or drafter == MASKS:
        name, value = ("drafter", drafter) if slots is None else ("slots", slots)
        raise ValueError(f"{name} = {value!r}: expected none with strategy = {strategy!r}, which fills in no masks")
    drafts = drafts_of(config, drafter) if heads is None else heads
    if drafter in DRAFTERS and drafter != "heads" and not drafts and heads is None:
        raise ValueError(f"drafter = {drafter!r}: expected another, for {where} has no heads")
    return drafts, drafter, strategy


def masks_to_read(config: Config, where: str, strategy: str, slots: int | None) -> int:
    """How many masks a pass reads: spans of ``slots`` tokens, by default as long as the longest in training.

    Args:
      config, where: of the run, and its folder.
      strategy: that fills in masks.
      slots: k; None: as many as in training.

    Raises:
      ValueError: the model fills in no masks, or spans would be longer than any text.
    """
    if not config.model.mask_embedding:
        raise ValueError(f"strategy = {strategy!r}: expected another, for {where} was not trained to fill in masks")
    length = config.objective.longest_span if slots is None else slots
    check_count("slots", length)
    if length > config.context:
        raise ValueError(f"slots = {length}: expected at most {config.context}, the longest text of this model")
    return length - 1
