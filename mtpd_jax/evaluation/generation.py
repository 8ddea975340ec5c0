"""Continuing prompts: texts, who proposed which token, and what it took."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from mtpd_jax.data.chat import Prompt, check_prompt
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.decoding.decoder import Continuation, Decoder
from mtpd_jax.decoding.options import Options, check_seed
from mtpd_jax.decoding.stops import transitions_of
from mtpd_jax.decoding.strategies import is_lossless
from mtpd_jax.evaluation.acceptance import Acceptance, acceptance_of, tokens_per_pass
from mtpd_jax.evaluation.comparison import Divergence, first_divergence
from mtpd_jax.evaluation.decoding import PADDED_PLAIN, decode_prompts, ways_of

# The way of decoding that was asked for, beside its baselines.
_OWN = "own"


@dataclasses.dataclass(frozen=True)
class PlainRun:
    """The same prompt decoded plainly; ``seconds`` include prefill, as everywhere here."""

    tokens: tuple[int, ...]
    seconds: float
    tokens_per_second: float

    @classmethod
    def of(cls, continuation: Continuation) -> "PlainRun":
        """What is kept of a continuation."""
        return cls(continuation.tokens, continuation.seconds, len(continuation.tokens) / continuation.seconds)


@dataclasses.dataclass(frozen=True)
class Generation:
    """One continuation.

    Attributes:
      text: the continuation only, up to a stop string.
      tokens: its ids, those of the end token or stop string included if one was written.
      proposers: for each token, 0 for the main head, k for an accepted draft of head k, -1 for one out of the text.
      passes: verification passes, without prefill.
      tokens_per_pass: (tokens - the one from prefill) / passes; None without a pass.
      seconds, tokens_per_second: wall time with prefill, without compilation.
      acceptance: per draft of a round; with heads, draft k is that of head k.
      lossless: whether the text is plain decoding's, or distributed as it.
      strategy: that wrote it.
      plain: the same, decoded plainly, one token per pass; None unless it was asked for.
      speedup: tokens per second over plain's.
      padded_plain, speedup_over_padded_plain: the same at the width of the passes; None without ``bit_exact``.
      identical: whether plain decoding, at the width of the passes if that is shared, wrote the same tokens; None under
        sampling.
      divergence: where greedy decoding and that plain one part, if they do.
    """

    text: str
    tokens: tuple[int, ...]
    proposers: tuple[int, ...]
    passes: int
    tokens_per_pass: float | None
    seconds: float
    tokens_per_second: float
    acceptance: Acceptance[float | None]
    lossless: bool
    strategy: str
    plain: PlainRun | None = None
    speedup: float | None = None
    padded_plain: PlainRun | None = None
    speedup_over_padded_plain: float | None = None
    identical: bool | None = None
    divergence: Divergence | None = None

    @property
    def failed(self) -> bool:
        """Whether greedy text that should be plain decoding's differs from it by more than rounding explains."""
        return self.lossless and self.divergence is not None and not self.divergence.tie


def generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    options: Options,
    *,
    stop: Sequence[str] = (),
    batch_size: int = 1,
    seed: int = 0,
    compare: bool = False,
) -> list[Generation]:
    """Continues prompts.

    Args:
      decoder, tokenizer: of the run.
      prompts: token ids.
      options: how to decode.
      stop: strings that end a text, which is cut before them.
      batch_size: prompts that are decoded together.
      seed: of sampling; prompt number n draws from the key (seed, n), whatever the batch.
      compare: decode plainly, too.

    Raises:
      ValueError: bad prompt or option.
    """
    check_seed(seed)
    # What is looked for while writing.
    transitions = transitions_of(tokenizer.token_bytes(), stop) if stop else None
    # The text, and the baselines that were asked for.
    ways: dict[int | str, Options] = {_OWN: options}
    if compare:
        ways |= ways_of(options, [0])
    decoded = decode_prompts(decoder, prompts, ways, batch_size=batch_size, seed=seed, transitions=transitions)
    absent = [None] * len(prompts)
    by_prompt = zip(prompts, decoded[_OWN], *(decoded.get(name, absent) for name in (0, PADDED_PLAIN)), strict=True)
    return [_generation(decoder, tokenizer, options, stop, *of_prompt) for of_prompt in by_prompt]


def stream(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: np.ndarray,
    options: Options,
    *,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> Iterator[Generation]:
    """Continues a prompt, and yields what there is of it every few rounds; for arguments and errors see ``generate``.

    The last one is the whole, with the text that ``generate`` writes. Texts before it end where a stop string may have
    begun.
    """
    check_seed(seed)
    transitions = transitions_of(tokenizer.token_bytes(), stop) if stop else None
    whole: Generation | None = None
    for written in decoder.stream(prompt, options, transitions=transitions, seed=seed):
        whole = _generation(decoder, tokenizer, options, stop, prompt, written, None, None)
        yield dataclasses.replace(whole, text=_before_a_beginning(whole.text, stop))
    if whole is not None and stop:
        yield whole


def _generation(
    decoder: Decoder,
    tokenizer: Tokenizer,
    options: Options,
    stop: Sequence[str],
    prompt: np.ndarray,
    written: Continuation,
    plain: Continuation | None,
    padded: Continuation | None,
) -> Generation:
    """One continuation, beside plain decoding's if there is one."""
    generation = Generation(
        text=cut_before(tokenizer.text_after(prompt)(written.tokens), stop),
        tokens=written.tokens,
        proposers=written.proposers,
        passes=written.passes,
        tokens_per_pass=tokens_per_pass([written]).mean,
        seconds=written.seconds,
        tokens_per_second=len(written.tokens) / written.seconds,
        acceptance=acceptance_of([written]),
        lossless=is_lossless(options),
        strategy=options.strategy,
    )
    if plain is None:
        return generation
    # Greedy text has to be that of plain decoding at the same width of a pass.
    greedy, beside, rate = options.sampling.greedy, PlainRun.of(plain), generation.tokens_per_second
    beside_padded, same = None if padded is None else PlainRun.of(padded), padded or plain
    return dataclasses.replace(
        generation,
        plain=beside,
        speedup=rate / beside.tokens_per_second,
        padded_plain=beside_padded,
        speedup_over_padded_plain=rate / beside_padded.tokens_per_second if beside_padded else None,
        identical=same.tokens == written.tokens if greedy else None,
        divergence=first_divergence(decoder, prompt.tolist(), same, written) if greedy else None,
    )


def cut_before(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop strings in it."""
    return text[: min([place for string in stop if (place := text.find(string)) >= 0], default=len(text))]


def _before_a_beginning(text: str, stop: Sequence[str]) -> str:
    """The text without what at its end may become a stop string."""
    begun = [size for string in stop for size in range(1, len(string)) if text.endswith(string[:size])]
    return text[: len(text) - max(begun, default=0)]


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Checks that prompts are texts or conversations.

    Raises:
      ValueError: naming the prompt, and what in it is neither.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts = {prompts!r:.80}: expected a list of texts")
    for number, prompt in enumerate(prompts, 1):
        check_prompt(prompt, f"prompt {number}")


def check_texts(texts: Sequence[str]) -> None:
    """Checks that texts are some.

    Raises:
      ValueError: naming what is none.
    """
    check_prompts(texts)
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise ValueError(f"text {number} = {text!r:.80}: expected a text")
