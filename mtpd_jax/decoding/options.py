"""What a user decides about decoding: frozen, hashable, checked in one place."""

import dataclasses

from mtpd_jax.decoding.sampling import GREEDY, Sampling
from mtpd_jax.validation import check_count, check_integer, check_number

# The drafter whose masks are read in the passes that verify; see ``drafters.masks``.
MASKS = "masks"


def check_seed(seed: int) -> None:
    """Checks a seed of sampling.

    Raises:
      ValueError: it is none of those that give different texts.
    """
    check_integer("seed", seed)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed}: expected 0 to 2**32 - 1")


@dataclasses.dataclass(frozen=True)
class Options:
    """How prompts are continued.

    Attributes:
      num_drafts: K, the length of a draft at most; 0 is plain decoding. Heads make one each; more than the model has
        modules loops them (MTP-D §3.3, without training): depth j uses module ((j-1) mod modules)+1, with a cache of
        its own. A model that fills in masks reads K of them: spans of k = K+1 tokens.
      max_new_tokens: tokens per prompt at most, the one from prefill included.
      sampling: greedy, or how to sample.
      min_confidence: drafting stops when the probability that the heads give to a row's drafts so far, all together,
        falls below this; 0 always drafts K tokens. At least one is drafted. Of masks, tau: those are filled in up to
        the first one whose own probability is below it, perhaps none.
      pass_width: tokens per pass of the backbone; None: as many as it takes. Passes of the same width run the same
        kernels, whose results do not depend on what else stands in the pass: with one width for plain and speculative
        decoding, greedy text is equal bit for bit, whatever the dtype.
      drafter: who drafts, a name in ``drafters.drafter.DRAFTERS``.
      strategy: how a round goes, a name in ``strategies.strategy.STRATEGIES``.
      draft_until: tokens of text that heads draft up to: what they were trained on. Beyond, a text is decoded plainly.
        None: to the end.
    """

    num_drafts: int
    max_new_tokens: int
    sampling: Sampling = GREEDY
    min_confidence: float = 0.0
    pass_width: int | None = None
    drafter: str = "heads"
    strategy: str = "speculative"
    draft_until: int | None = None

    @property
    def words(self) -> str:
        """The way of decoding in a few words, for people."""
        if not self.num_drafts:
            return "plain decoding"
        sure = f" at {self.min_confidence:g}" if self.min_confidence else ""
        return f"{self.strategy} decoding with {self.num_drafts} {'draft' if self.num_drafts == 1 else 'drafts'}{sure}"

    @property
    def width(self) -> int:
        """Tokens per pass."""
        return self._least_width if self.pass_width is None else self.pass_width

    @property
    def _least_width(self) -> int:
        """What a pass has to have room for: the last confirmed token, drafts, and masks that draft the next ones."""
        return 1 + self.num_drafts * (2 if self.drafter == MASKS else 1)

    @property
    def adaptive(self) -> bool:
        """Whether the number of drafts is decided round by round."""
        return self.min_confidence > 0 and self.num_drafts > 1

    def with_drafts(self, num_drafts: int) -> "Options":
        """These options with another length of a draft."""
        return dataclasses.replace(self, num_drafts=num_drafts)

    @property
    def fastest_plain(self) -> "Options":
        """Plain decoding as fast as there is: one token per pass, whatever width and strategy these options ask for."""
        plain = Options(0, self.max_new_tokens)
        how = {"drafter": plain.drafter, "strategy": plain.strategy, "min_confidence": plain.min_confidence}
        return dataclasses.replace(self, num_drafts=0, pass_width=None, **how)

    def sharing_width(self, most_drafts: int) -> "Options":
        """These options with one pass width for up to ``most_drafts`` drafts, and so for plain decoding, too.

        It is a multiple of 8: kernels for products of few rows treat the rows that are left over differently.
        """
        needed = self.with_drafts(most_drafts)._least_width
        return dataclasses.replace(self, pass_width=-(-needed // 8) * 8)

    def validate(self) -> None:
        """Checks the values; whether the model can draft so is for ``Decoder.check``.

        Raises:
          ValueError: naming the value and what is allowed.
        """
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling = {self.sampling!r}: expected a Sampling")
        self.sampling.validate()
        # Types first, then ranges.
        check_integer("heads", self.num_drafts)
        check_count("max_new_tokens", self.max_new_tokens)
        check_number("min_confidence", self.min_confidence)
        if self.num_drafts < 0:
            raise ValueError(f"heads = {self.num_drafts}: expected 0 (plain decoding) or more")
        if not 0 <= self.min_confidence < 1:
            raise ValueError(f"min_confidence = {self.min_confidence}: expected a probability, zero or more, under one")
        if self.width < self._least_width:
            raise ValueError(
                f"pass_width = {self.pass_width}: expected at least {self._least_width}, for heads = {self.num_drafts}"
            )
