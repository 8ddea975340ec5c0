"""How likely a model holds continuations of contexts: what benchmarks that choose among answers ask for."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mtpd_jax.evaluation.scoring import Scorer
from mtpd_jax.shapes import Parameters


@dataclasses.dataclass(frozen=True)
class LogLikelihood:
    """A continuation of a context, by the main head.

    Attributes:
      nats: log-probability, the sum over its tokens.
      greedy: whether every one of its tokens is the likeliest there.
      tokens: how many.
    """

    nats: float
    greedy: bool
    tokens: int


def loglikelihoods(
    scorer: Scorer, parameters: Parameters, contexts: Sequence[str], continuations: Sequence[str]
) -> list[LogLikelihood]:
    """Log-likelihoods of continuations, each after the context at the same place.

    Context and continuation are tokenized together, and split where the context's own tokens end; white space at the
    end of a context belongs to the continuation (the convention of the Language Model Evaluation Harness). A context
    that is too long loses its beginning; an empty one is what begins a text, or an end token.

    Args:
      scorer, parameters: of the model; the scorer's windows hold context and continuation.
      contexts, continuations: as many of each.

    Raises:
      ValueError: not as many, an empty continuation, or one that does not fit into a window.
    """
    if len(contexts) != len(continuations):
        raise ValueError(f"{len(contexts)} contexts and {len(continuations)} continuations: expected as many of each")
    # Context and continuation as one text, as much of it as fits into a window.
    texts, counts = [], []
    for number, pair in enumerate(zip(contexts, continuations, strict=True), 1):
        ids, count = _together(scorer, *pair)
        if not 0 < count < scorer.length:
            raise ValueError(
                f"continuation {number} has {count} tokens: expected at least one, and fewer than {scorer.length}"
            )
        ids = ids[-scorer.length :]
        texts.append((ids, np.zeros_like(ids)))
        counts.append(count)
    # What the last tokens of each text were given.
    found = []
    for scored, count in zip(scorer.score(parameters, texts), counts, strict=True):
        ce, greedy = scored.ce[0, -count:], scored.greedy[-count:]
        found.append(LogLikelihood(-float(ce.sum(dtype=np.float64)), bool(greedy.all()), count))
    return found


def _together(scorer: Scorer, context: str, continuation: str) -> tuple[np.ndarray, int]:
    """The ids of both, and how many of them are the continuation's."""
    # Where the context's own tokens end.
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    before, whole = (scorer.tokenizer.encode_prompt(text) for text in (stripped, stripped + continuation))
    if not len(before):
        before, whole = (np.concatenate([[scorer.tokenizer.end_id], ids]).astype(np.int32) for ids in (before, whole))
    return whole, len(whole) - len(before)
