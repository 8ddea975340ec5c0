"""What is asked of held-out documents while a run trains: their scores, and what its heads are worth in decoding.

The loss of heads may go on falling while fewer of their drafts are accepted (deepseek-ai/DeepSpec #84), so that a
checkpoint is rated by decoding. The prompts that rate are others than those whose figures are reported: the best of
many readings on the same prompts would flatter it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from mtpd_jax.config import Config
from mtpd_jax.data.documents import Document, selects
from mtpd_jax.data.sources import Source, holds_out, split
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.decoding.decoder import Continuation, Decoder
from mtpd_jax.decoding.options import MASKS, Options
from mtpd_jax.evaluation.acceptance import acceptance_of, tokens_per_pass, tokens_per_pass_without_bonus
from mtpd_jax.evaluation.scoring import Scorer, TextScore
from mtpd_jax.methods.method import Method, method_of
from mtpd_jax.runs.choice import RATING
from mtpd_jax.shapes import Parameters
from mtpd_jax.sharding import copies_of, holds_whole_copies, make_mesh
from mtpd_jax.training.feasibility import devices_per_copy
from mtpd_jax.training.state import abstract_parameters

# Prompts of a run whose method has them decoded, and those that are decoded together. Our choice.
_PROMPTS, _ROWS = 32, 8

Metrics = dict[str, float | None]
# Asked again and again; nobody is told metrics that were not waited for.
KeepGoing = Callable[[], bool]


class HeldOut:
    """The evaluation of a run while it trains.

    Attributes:
      rates: whether checkpoints are rated by decoding.
      note: what has to be said of it; nothing where there is nothing to say.
    """

    def __init__(self, method: Method, documents: Callable[[], Iterator[Document]], tokenizer: Tokenizer):
        """See ``of``."""
        config = method.config
        rows = config.training.batch_size // config.training.micro_batches
        self._documents, self._most = documents, config.evaluation.documents
        self._scorer = Scorer(method.model, tokenizer, method.mesh, config.training.sequence_length, rows)
        # As many prompts as there are, up to those that are wanted.
        wanted = config.evaluation.prompts
        number = (_PROMPTS if method.rehearses_decoding else 0) if wanted is None else wanted
        way = way_of(config)
        prompts = HeldOutPrompts.of(config, number, documents, tokenizer) if number and way else None
        self._decoding = HeldOutDecoding(method, tokenizer, prompts, way) if prompts and way else None
        self.rates, self.note = prompts is not None, ""
        if number and way and not prompts:
            self.note = "too little is held out for prompts: nothing is decoded while training, and no checkpoint rated"

    @classmethod
    def of(cls, method: Method, source: Source, tokenizer: Tokenizer) -> "HeldOut | None":
        """The evaluation of a method's run; None where nothing of its documents is held out."""
        fraction = method.config.data.validation_fraction
        if not holds_out(source, fraction):
            return None
        return cls(method, lambda: split(source, fraction, validation=True), tokenizer)

    def __call__(self, parameters: Parameters, keep_going: KeepGoing) -> Metrics | None:
        """The first held-out documents, scored as ``evaluate`` scores them, and then the prompts."""
        documents = itertools.islice(self._documents(), self._most)
        sums = self._scorer.sum_documents(parameters, documents, keep_going)
        if sums is None:
            return None
        score = TextScore.of(sums)
        values: Metrics = {f"eval/main/{name}": value for name, value in dataclasses.asdict(score.main).items()}
        for k, head in enumerate(score.heads, 1):
            values |= {f"eval/head_{k}/{name}": value for name, value in dataclasses.asdict(head).items()}
        if self._decoding is None:
            return values
        decoded = self._decoding(parameters, keep_going)
        return None if decoded is None else {**values, **decoded}


@dataclasses.dataclass(frozen=True)
class HeldOutPrompts:
    """Beginnings of held-out documents.

    Attributes:
      rating, reporting: token ids, of different documents.
      new_tokens: that each is continued by, at most.
    """

    rating: list[np.ndarray]
    reporting: list[np.ndarray]
    new_tokens: int

    @classmethod
    def of(
        cls, config: Config, number: int, documents: Callable[[], Iterator[Document]], tokenizer: Tokenizer
    ) -> "HeldOutPrompts | None":
        """The prompts of a run; None without two held-out documents that are long enough.

        Args:
          config: of the run.
          number: of prompts, at most; half of them rate, the others report.
          documents: yields the held-out documents from the first on.
          tokenizer: of the run.
        """
        wanted, length = config.evaluation, config.training.sequence_length
        # No longer than what the heads are trained on, prompt and continuation together.
        prompt_tokens = min(wanted.prompt_tokens, length // 4)
        new_tokens = min(wanted.new_tokens, length - prompt_tokens)

        def prompts(rating: bool) -> list[np.ndarray]:
            of_kind = (document for document in documents() if selects(document) == rating)
            most = prompt_tokens, length - new_tokens
            begun = filter(len, (prompt_of(document, tokenizer, *most) for document in of_kind))
            return list(itertools.islice(begun, (number + rating) // 2))

        found = cls(prompts(rating=True), prompts(rating=False), new_tokens)
        return found if found.rating and found.reporting else None


def prompt_of(document: Document, tokenizer: Tokenizer, tokens: int, room: int) -> np.ndarray:
    """The first half of a text, of so many tokens at most; the prompt that a model was given, if there is room for it.

    Empty where there is none.
    """
    if not isinstance(document, str):
        return document.prompt if len(document.prompt) <= room else document.prompt[:0]
    ids = tokenizer.encode_prompt(document)
    return ids[: min(tokens, len(ids) // 2)]


def decoding_method(method: Method) -> tuple[Method, Any]:
    """A method on a mesh that can decode, of the same devices, and where parameters lie there.

    Decoding has copies of the model, which few devices share; training may have split it otherwise.
    """
    if not holds_whole_copies(method.mesh):
        devices = list(method.mesh.devices.flat)
        method = method_of(method.config, make_mesh(copies_of(devices_per_copy(method.config, devices)), devices))
    abstract = method.merge(*abstract_parameters(method))
    return method, jax.tree.map(lambda leaf: leaf.sharding, abstract)


def way_of(config: Config) -> Options | None:
    """How a run decodes while it trains, losing nothing: all its heads, or its longest spans; None: it has neither."""
    if config.heads.num_heads:
        return Options(config.heads.num_heads, 1)
    longest = config.objective.longest_span
    return Options(longest - 1, 1, drafter=MASKS, strategy="verified") if longest > 1 else None


class HeldOutDecoding:
    """Decodes the prompts with whatever parameters a run has come to, greedily."""

    def __init__(self, method: Method, tokenizer: Tokenizer, prompts: HeldOutPrompts, way: Options):
        """For ``way`` see ``way_of``."""
        self._options, self._prompts = dataclasses.replace(way, max_new_tokens=prompts.new_tokens), prompts
        self._method, self._shardings = decoding_method(method)
        self._end_ids = tokenizer.end_ids
        self._decoder: Decoder | None = None

    def __call__(self, parameters: Parameters, keep_going: KeepGoing) -> Metrics | None:
        """Metrics: ``decoded/…``, and what a checkpoint is rated by."""
        parameters = jax.device_put(parameters, self._shardings)
        decoder = self._decoder or Decoder(self._method.model, parameters, self._end_ids, self._method.mesh)
        decoder = decoder.with_parameters(parameters)
        self._decoder = decoder.with_parameters({})  # what is compiled; parameters are the run's, and change
        # A few at a time, for somebody may want to stop.
        found: list[Continuation] = []
        prompts = self._prompts.rating + self._prompts.reporting
        for begin in range(0, len(prompts), _ROWS):
            if not keep_going():
                return None
            found += decoder.run(prompts[begin : begin + _ROWS], self._options)
        rating, reported = found[: len(self._prompts.rating)], found[len(self._prompts.rating) :]
        acceptance = acceptance_of(reported)
        values: Metrics = {
            RATING: tokens_per_pass(rating).mean,
            "decoded/tokens_per_pass": tokens_per_pass(reported).mean,
            "decoded/tokens_per_pass_without_bonus": tokens_per_pass_without_bonus(reported).mean,
        }
        masks = self._options.drafter == MASKS
        for k, rates in enumerate(zip(acceptance.conditional, acceptance.cumulative, strict=True), 1):
            name = f"decoded/slot_{k + 1}" if masks else f"decoded/head_{k}"
            values |= {f"{name}/conditional": rates[0], f"{name}/cumulative": rates[1]}
        return values
