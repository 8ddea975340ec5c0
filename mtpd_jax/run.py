"""A trained run, open: what a notebook needs in one line."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from mtpd_jax.config import Config
from mtpd_jax.data.chat import ChatTemplate, Prompt, encode_prompt, read_chat_template
from mtpd_jax.data.sources import UnknownData
from mtpd_jax.data.tokenizer import Decode, Tokenizer
from mtpd_jax.decoding.decoder import Decoder
from mtpd_jax.decoding.drafters.drafter import heads_that_draft
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.sampling import GREEDY, Sampling
from mtpd_jax.evaluation.agreement import fit
from mtpd_jax.evaluation.generation import Generation, check_prompts, check_texts, generate, stream
from mtpd_jax.evaluation.likelihood import LogLikelihood, loglikelihoods
from mtpd_jax.evaluation.scoring import ScoredText, Scorer
from mtpd_jax.evaluation.ways import who_drafts
from mtpd_jax.runs.checkpoint import read_record
from mtpd_jax.runs.choice import Choice
from mtpd_jax.runs.opening import TrainedRun, load_run
from mtpd_jax.runs.progress import say
from mtpd_jax.runs.teacher import check_teacher, teacher_folder
from mtpd_jax.shapes import Parameters
from mtpd_jax.sharding import parameter_parts
from mtpd_jax.training.feasibility import check_scoring
from mtpd_jax.validation import check_count, check_flag


class Run:
    """A run that is open. What it compiles it keeps, so that a second call is fast; see ``open_run``."""

    def __init__(self, trained: TrainedRun):
        self.trained = trained
        self._scorers: dict[tuple[int, int], Scorer] = {}

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.trained.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return self.trained.tokenizer

    @property
    def parameters(self) -> Parameters:
        """The model's parameters; the averaged ones if the run keeps an average."""
        return self.trained.parameters

    @property
    def mesh(self) -> Mesh:
        """The devices, and how they share parameters and rows."""
        return self.trained.mesh

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.trained.step

    @functools.cached_property
    def decoder(self) -> Decoder:
        """Decodes token ids."""
        trained = self.trained
        return Decoder(trained.model, trained.parameters, trained.tokenizer.end_ids, trained.mesh)

    def scorer(self, batch_size: int, length: int | None = None) -> Scorer:
        """Scores token ids, so many windows at a time, of ``length`` tokens; None: of a training sequence.

        Raises:
          ValueError: a batch needs more memory than there is.
        """
        check_count("batch_size", batch_size)
        length = self.config.training.sequence_length if length is None else length
        check_scoring(batch_size, length)
        if (batch_size, length) not in self._scorers:
            trained = self.trained
            found = Scorer(trained.model, trained.tokenizer, trained.mesh, length, batch_size)
            self._scorers[batch_size, length] = found
        return self._scorers[batch_size, length]

    def options(
        self,
        heads: int | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        min_confidence: float = 0.0,
        bit_exact: bool = False,
        drafter: str = "heads",
        strategy: str | None = None,
        past_trained_length: bool = False,
        slots: int | None = None,
    ) -> Options:
        """How to decode; for the arguments see ``generate``.

        Raises:
          ValueError: an option is out of range.
        """
        check_flag("bit_exact", bit_exact)
        where = str(self.trained.folder.path)
        heads, drafter, strategy = who_drafts(self.config, where, heads, drafter, strategy, slots)
        sampling = GREEDY if sampling is None else sampling
        until = self.draft_until(past_trained_length)
        options = Options(
            heads, max_new_tokens, sampling, min_confidence, drafter=drafter, strategy=strategy, draft_until=until
        )
        options.validate()
        return options.sharing_width(heads) if bit_exact else options

    @functools.cached_property
    def teacher(self) -> "Run | None":
        """The model that taught this one, if the run keeps it, on the same devices.

        Raises:
          ValueError: another model lies there, or one that cannot be read.
        """
        kept = teacher_folder(self.trained.folder)
        if not kept.config_file.exists():
            return None
        found = Run(load_run(str(kept.path), devices_per_model=parameter_parts(self.mesh)))
        check_teacher(kept, found.parameters, read_record(self.trained.folder)["origin"])
        return found

    def draft_until(self, past_trained_length: bool = False) -> int | None:
        """Tokens of text that heads draft up to: of the texts that they were trained on; None: as many as there are."""
        check_flag("past_trained_length", past_trained_length)
        data, trained = self.config.data, self.config.training.sequence_length
        if isinstance(data, UnknownData):  # an imported model's, whose sequences are our own
            trained = data.heads_length
        return None if past_trained_length or trained is None or self.config.context <= trained else trained

    def note_of(self, prompts: Sequence[np.ndarray], options: Options) -> str:
        """What has to be said of texts that may come to where heads do not draft; nothing where none does."""
        until = options.draft_until
        longer = sum(until is not None and len(prompt) + options.max_new_tokens > until for prompt in prompts)
        if not longer or not heads_that_draft(options):
            return ""
        return (
            f"the heads were trained on texts of {until:,} tokens: beyond that, {longer} of {len(prompts)} texts are "
            "decoded plainly (--past_trained_length drafts there, too)"
        )

    def encode(self, prompt: Prompt) -> np.ndarray:
        """Token ids of a prompt, [T] int32; see ``data.chat.encode_prompt``.

        Raises:
          ValueError: as there; or the tokenizer has more tokens than the model, and the prompt one of those.
        """
        ids = encode_prompt(prompt, self.tokenizer, None if isinstance(prompt, str) else self.template)
        if ids.max(initial=0) >= self.config.model.vocabulary_size:
            raise ValueError(f"the prompt has the token {ids.max()}, and the model {self.config.model.vocabulary_size}")
        return ids

    def text_after(self, prompt: Prompt) -> Decode:
        """What turns token ids that were written after a prompt into text; see ``Tokenizer.text_after``."""
        return self.tokenizer.text_after(self.encode(prompt))

    @functools.cached_property
    def template(self) -> ChatTemplate | None:
        """The model's template for conversations; None without any."""
        return read_chat_template(self.trained.folder.path)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        heads: int | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        seed: int = 0,
        min_confidence: float = 0.0,
        bit_exact: bool = False,
        drafter: str = "heads",
        strategy: str | None = None,
        past_trained_length: bool = False,
        slots: int | None = None,
        stop: Sequence[str] = (),
        batch_size: int = 1,
        compare: bool = False,
    ) -> list[Generation]:
        """Continues prompts.

        Args:
          prompts: texts to continue, none of them empty; or conversations to answer, lists of messages
            ``{"role": "user", "content": …}``, for a model with a chat template.
          heads: drafts per round; 0 for plain decoding, None for as many as the model has heads; more loop them.
          max_new_tokens: per prompt.
          sampling: None is greedy.
          seed: of sampling; prompt number n draws from the key (seed, n), whatever the batch.
          min_confidence: see ``Options``.
          bit_exact: run plain and speculative passes at one width, see ``Options.pass_width``.
          drafter: who drafts: the model's heads, prompt lookup, or the better of both; see ``decoding.drafters``.
          strategy: see ``decoding.strategies``; None: that of the model, ``verified`` if it fills in masks.
          past_trained_length: draft where a text is longer than a training sequence, too; else it is decoded plainly
            there, and a line on standard error says so.
          slots: k, the tokens of a span, for strategies that fill in masks; None: as many as in training.
          stop: strings that end a text, which is cut before them.
          batch_size: prompts that are decoded together.
          compare: decode plainly, too.

        Raises:
          ValueError: bad prompt or option.
        """
        check_prompts(prompts)
        check_flag("compare", compare)
        check_stop(stop)
        check_count("batch_size", batch_size)
        options = self.options(
            heads, max_new_tokens, sampling, min_confidence, bit_exact, drafter, strategy, past_trained_length, slots
        )
        return generate(
            self.decoder, self.tokenizer, self._encoded(prompts, options), options,
            stop=stop, batch_size=batch_size, seed=seed, compare=compare,
        )  # fmt: skip

    def stream(
        self,
        prompt: Prompt,
        *,
        heads: int | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        seed: int = 0,
        min_confidence: float = 0.0,
        bit_exact: bool = False,
        drafter: str = "heads",
        strategy: str | None = None,
        past_trained_length: bool = False,
        slots: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[Generation]:
        """Continues one prompt, and yields what there is of it every few rounds; the last one is the whole.

        For arguments and errors see ``generate``, whose text it writes.
        """
        check_prompts([prompt])
        check_stop(stop)
        options = self.options(
            heads, max_new_tokens, sampling, min_confidence, bit_exact, drafter, strategy, past_trained_length, slots
        )
        (encoded,) = self._encoded([prompt], options)
        return stream(self.decoder, self.tokenizer, encoded, options, stop=stop, seed=seed)

    def _encoded(self, prompts: Sequence[Prompt], options: Options) -> list[np.ndarray]:
        """Prompts as token ids; what has to be said of them is said on standard error."""
        encoded = [self.encode(prompt) for prompt in prompts]
        if note := self.note_of(encoded, options):
            say(note)
        return encoded

    def score(self, texts: Sequence[str], batch_size: int = 1) -> list[ScoredText]:
        """Scores texts, teacher-forced, token by token: each is a document, with an end token after it.

        ``TextScore.of(sum((text.sums() for text in scored), TextSums.nothing(heads)))`` is the mean over all.

        Args:
          texts: documents.
          batch_size: windows that are scored together, at least.

        Raises:
          ValueError: something is no text, or a batch needs more memory than there is.
        """
        check_texts(texts)
        # Encoded as they are asked for.
        encoded = map(self.tokenizer.encode_document_and_bytes, texts)
        return list(self.scorer(batch_size).score(self.parameters, encoded))

    def loglikelihoods(
        self, contexts: Sequence[str], continuations: Sequence[str], batch_size: int = 1
    ) -> list[LogLikelihood]:
        """Log-likelihoods of continuations, each after the context at the same place; see ``evaluation.likelihood``."""
        for texts in (contexts, continuations):
            check_texts(texts)
        return loglikelihoods(self.scorer(batch_size), self.parameters, contexts, continuations)


def check_stop(stop: Sequence[str]) -> None:
    """Checks that stop strings are a list of texts.

    Raises:
      ValueError: naming what is none.
    """
    if isinstance(stop, str) or not isinstance(stop, Sequence):
        raise ValueError(f"stop = {stop!r:.80}: expected a list of texts")
    for string in stop:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop = {string!r:.80}: expected a text that is not empty")


def open_run(
    workdir: str,
    checkpoint: Choice = None,
    devices_per_model: int | None = None,
    backbone: str | None = None,
    other_backbone: bool = False,
) -> Run:
    """Opens a trained run, to generate and score with; for arguments and errors see ``runs.opening.load_run``.

    Of heads on another backbone than theirs a line on standard error says how well they fit.
    """
    run = Run(load_run(workdir, checkpoint, devices_per_model, backbone, other_backbone))
    if run.trained.other_backbone:
        say(fit(run.decoder, run.tokenizer, run.config.heads.num_heads))
    return run
