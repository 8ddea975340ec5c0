"""What a training method is: all that the step, the state, the trainer and the metrics ask of it."""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from mtpd_jax.config import Config, ObjectiveConfig
from mtpd_jax.data.pipeline import Batch
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.losses.objective import LossTerm, Objective
from mtpd_jax.losses.terms import LossSums, zero_sums
from mtpd_jax.model.backbone import HiddenStates, LanguageModel, build_model
from mtpd_jax.model.costs import Costs
from mtpd_jax.platform import Platform, platform_of
from mtpd_jax.shapes import Array, Float, Int, Parameters
from mtpd_jax.sharding import within

METHODS: dict[str, type["Method"]] = {}
# Reads the tokenizer of a run, of which a config names the tokens around a text.
ReadTokenizer = Callable[[Config], Tokenizer]


@struct.dataclass
class StepContext:
    """What a step hands over beside its rows; whatever is random in it depends on these keys alone.

    Attributes:
      step: optimizer steps done before it.
      key: the step's, the same for all its micro-batches, from the seed and the number of the step.
      row_keys: [B]; of these rows, from those and the number of the row in the step's batch, however that is cut.
    """

    step: Int[Array, ""]
    key: Array
    row_keys: Array


class Method(abc.ABC):
    """One way of training, for one run. A subclass names its config section, ``class Joint(Method, section=…)``.

    Attributes:
      config: of the run; complete (see ``complete``).
      mesh, platform: where it is trained.
      model: the whole model, frozen parts included.
      names_backbone: whether what is frozen is not stored with the run, which names where it lies, and its digest.
      keeps_teacher: whether the model to start from teaches the run, and is stored once, beside the checkpoints. What
        is frozen is made of it (``frozen_of``), and is no part of the model that is trained.
      draws_attention: whether its rows attend by a mask of its own, and not causally within documents alone.
      freezes_text: whether what the model writes stays what it was, so that checkpoints differ in their drafts alone.
      rehearses_decoding: whether its parity with training is proved before the first step, and held-out prompts are
        decoded on the way, unless the config says otherwise.
    """

    section: ClassVar[type[ObjectiveConfig]]
    names_backbone: ClassVar[bool] = False
    keeps_teacher: ClassVar[bool] = False
    draws_attention: ClassVar[bool] = False
    freezes_text: ClassVar[bool] = False
    rehearses_decoding: ClassVar[bool] = False

    def __init_subclass__(cls, section: type[ObjectiveConfig] | None = None) -> None:
        if section is not None:  # a class without one is what several methods share
            if section.case in METHODS:
                raise TypeError(f"{cls.__name__}: {section.case!r} is the mode of {METHODS[section.case].__name__}")
            cls.section = section
            METHODS[section.case] = cls

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.platform: Platform = platform_of(mesh)
        self.model: LanguageModel = build_model(config, self.platform)

    @classmethod
    def stores_frozen(cls) -> bool:
        """Whether what is frozen is stored with every checkpoint."""
        return not (cls.names_backbone or cls.keeps_teacher)

    @classmethod
    def complete(cls, config: Config, source: Config, tokenizer: ReadTokenizer) -> Config:
        """Fills in what a config leaves to the run that it starts from.

        Args:
          config: whose ``objective.source_run`` names a run.
          source: the config of that run.
          tokenizer: reads its tokenizer.

        Raises:
          ValueError: nothing of this kind can start from that run; the message names the field.
        """
        return config

    def initial_parameters(self, key: Array, source: Parameters | None) -> Parameters:
        """Parameters of the whole model before the first step, with Linen's metadata or without.

        Args:
          key: for random ones.
          source: the parameters of the run to start from; None without one, and where only shapes are asked for.
        """
        return _random_parameters(self.model, key)

    def split(self, parameters: Parameters) -> tuple[Parameters, Parameters | None]:
        """Cuts the whole model's parameters into those that are trained and those that are frozen (None: none are)."""
        return parameters, None

    def merge(self, trained: Parameters, frozen: Parameters | None) -> Parameters:
        """Puts the whole model's parameters together again."""
        return trained

    def frozen_of(self, teacher: Parameters) -> Parameters | None:
        """What is frozen, of the teacher that the run keeps; see ``keeps_teacher``."""
        raise NotImplementedError

    @abc.abstractmethod
    def count(self, rows: Batch, context: StepContext) -> Float[Array, " J"]:
        """What each term of the loss is a mean over, in these rows. A step counts all its rows before any loss.

        So it depends on no parameters.

        Args:
          rows: [B, T].
          context: what ``loss`` is given for the same rows.
        """

    @abc.abstractmethod
    def loss(
        self,
        trained: Parameters,
        frozen: Parameters | None,
        rows: Batch,
        weights: Float[Array, " J"],
        context: StepContext,
    ) -> tuple[Float[Array, ""], Any]:
        """The share of these rows in the step's loss, differentiable by ``trained``, and the sums that are reported.

        Args:
          trained, frozen: from ``split``.
          rows: [B, T].
          weights: of the whole step, from ``count``.
          context: of the step and of these rows.
        """

    @abc.abstractmethod
    def zero_sums(self) -> Any:
        """The sums that ``loss`` reports, over no rows."""

    @abc.abstractmethod
    def terms(self, sums: Any, weights: Float[Array, " J"]) -> dict[str, LossTerm]:
        """What a step reports, by the names of ``metrics.jsonl``; ``main/ce`` is among them."""

    @abc.abstractmethod
    def costs(self) -> Costs:
        """What training costs."""

    def describe(self) -> str:
        """What is trained, for people: nothing where it is the whole model."""
        return ""


class HeadsMethod(Method):
    """What methods share whose loss is that of heads beside a main head."""

    @functools.cached_property
    def objective(self) -> Objective:
        """The objective of the heads that are trained; made when it is first asked for, which costs never do."""
        return self.make_objective()

    @abc.abstractmethod
    def make_objective(self) -> Objective:
        """Makes the objective, from the config."""

    def count(self, rows: Batch, context: StepContext) -> Float[Array, " J"]:
        return self.objective.count(rows.segment_ids, rows.supervised)

    def loss_of(
        self, hidden: HiddenStates, unembedding: Array, rows: Batch, weights: Float[Array, " J"]
    ) -> tuple[Float[Array, ""], LossSums]:
        """The objective's share of these rows, from the states of the main head and of the heads that are trained."""
        inputs = rows.tokens, rows.segment_ids
        return self.objective.loss(hidden, unembedding, *inputs, weights, self.mesh, rows.supervised)

    def zero_sums(self) -> LossSums:
        return zero_sums(len(self.objective.heads))

    def terms(self, sums: LossSums, weights: Float[Array, " J"]) -> dict[str, LossTerm]:
        return self.objective.terms(sums, weights)


@functools.partial(jax.jit, static_argnums=0)
def _random_parameters(model: LanguageModel, key: Array) -> Parameters:
    """Random parameters with Linen's metadata; a function of its own, so that a model is traced once for them."""
    dummy = jnp.ones((1, model.heads_config.num_heads + 2), jnp.int32)
    # A row that no other kernel takes; parameters do not depend on it.
    model = LanguageModel(dataclasses.replace(model.config, attention="dense"), model.heads_config)
    return within(None, model.init)(key, dummy, dummy, dummy)["params"]


def method_of(config: Config, mesh: Mesh) -> Method:
    """The method that a config names, on a mesh."""
    return METHODS[config.objective.mode](config, mesh)
