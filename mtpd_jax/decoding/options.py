"""What a user decides about decoding: frozen, hashable, checked in one place."""

import dataclasses

from mtpd_jax.decoding.sampling import GREEDY, Sampling
from mtpd_jax.validation import check_integer, check_number


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
      num_heads: K, drafts per round at most; 0 is plain decoding. More than the model has modules loops them
        (MTP-D §3.3, without training): depth j uses module ((j-1) mod modules)+1, with a cache of its own.
      max_new_tokens: tokens per prompt at most, the one from prefill included.
      sampling: greedy, or how to sample.
      min_confidence: drafting stops when the probability that the heads give to a row's drafts so far, all together,
        falls below this; 0 always drafts K tokens. At least one is drafted.
      pass_width: tokens per pass of the backbone; None: K+1. Passes of the same width run the same kernels, whose
        results do not depend on what else stands in the pass: with one width for plain and speculative decoding,
        greedy text is equal bit for bit, whatever the dtype.
    """

    num_heads: int
    max_new_tokens: int
    sampling: Sampling = GREEDY
    min_confidence: float = 0.0
    pass_width: int | None = None

    @property
    def width(self) -> int:
        """Tokens per pass."""
        return self.num_heads + 1 if self.pass_width is None else self.pass_width

    @property
    def adaptive(self) -> bool:
        """Whether the number of drafts is decided round by round."""
        return self.min_confidence > 0 and self.num_heads > 1

    @property
    def window(self) -> int:
        """Positions that every head that drafts is run over, the newest ones (see ``decoding.drafting``)."""
        return 3 * self.num_heads + 1 if self.adaptive else self.num_heads + 1

    def with_heads(self, num_heads: int) -> "Options":
        """These options with another number of heads."""
        return dataclasses.replace(self, num_heads=num_heads)

    @property
    def fastest_plain(self) -> "Options":
        """Plain decoding as fast as there is: one token per pass, whatever width these options ask for."""
        return dataclasses.replace(self, num_heads=0, pass_width=None)

    def sharing_width(self, most_heads: int) -> "Options":
        """These options with one pass width for up to ``most_heads`` heads, and so for plain decoding, too.

        It is a multiple of 8: kernels for products of few rows treat the rows that are left over differently.
        """
        return dataclasses.replace(self, pass_width=-(-(most_heads + 1) // 8) * 8)

    def validate(self, modules: int) -> None:
        """Checks the values.

        Args:
          modules: heads that the model has.

        Raises:
          ValueError: naming the value and what is allowed.
        """
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling = {self.sampling!r}: expected a Sampling")
        self.sampling.validate()
        for name in ("num_heads", "max_new_tokens"):
            check_integer(name.removeprefix("num_"), getattr(self, name))
        check_number("min_confidence", self.min_confidence)
        if self.num_heads < 0:
            raise ValueError(f"heads = {self.num_heads}: expected 0 (plain decoding) or more")
        if self.num_heads and not modules:
            raise ValueError(f"heads = {self.num_heads}: expected 0, for the model was trained without heads")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens}: expected at least one")
        if not 0 <= self.min_confidence < 1:
            raise ValueError(f"min_confidence = {self.min_confidence}: expected a probability, zero or more, under one")
        if self.width <= self.num_heads:
            raise ValueError(f"pass_width = {self.pass_width}: expected more than heads = {self.num_heads}")
