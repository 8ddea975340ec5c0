"""Heads that are trained on top of a part of the model that is frozen."""

import dataclasses
from typing import ClassVar

from jax.sharding import Mesh

from mtpd_jax.config import Config
from mtpd_jax.data.pipeline import Batch
from mtpd_jax.losses.objective import Objective, objective_of
from mtpd_jax.losses.terms import LossSums
from mtpd_jax.methods.method import HeadsMethod, StepContext
from mtpd_jax.model import costs
from mtpd_jax.model.backbone import LanguageModel, unembedding_of
from mtpd_jax.model.layers import apply
from mtpd_jax.model.views import PackedRows
from mtpd_jax.shapes import Array, Float, Parameters


class HeadsOnFrozen(HeadsMethod):
    """The heads after the first ``frozen_heads`` are trained; those, and the backbone, are not differentiated at all.

    Args:
      config, mesh: see ``Method``.
      frozen_heads: that are trained already.
    """

    freezes_text: ClassVar[bool] = True

    def __init__(self, config: Config, mesh: Mesh, frozen_heads: int):
        super().__init__(config, mesh)
        self._frozen_heads, number = frozen_heads, config.heads.num_heads

        def with_heads(count: int) -> LanguageModel:
            return LanguageModel(self.model.config, dataclasses.replace(config.heads, num_heads=count))

        # The frozen part, and what is trained on its states.
        self._below, self._above = with_heads(frozen_heads), with_heads(number - frozen_heads)

    def make_objective(self) -> Objective:
        heads = tuple(range(self._frozen_heads + 1, self.config.heads.num_heads + 1))
        return objective_of(self.config, heads, "frozen")

    def loss(
        self,
        trained: Parameters,
        frozen: Parameters | None,
        rows: Batch,
        weights: Float[Array, " J"],
        context: StepContext,
    ) -> tuple[Float[Array, ""], LossSums]:
        assert frozen is not None  # see ``split``
        # Differentiated by ``trained``, the first part has no backward pass at all: nothing in it depends on that.
        inputs = rows.tokens, rows.segment_ids, rows.positions
        view = PackedRows.of(rows.segment_ids, rows.positions, self.model.config)
        below = apply(self._below, frozen, *inputs, view=view)
        first = self._frozen_heads + 1
        hidden = apply(self._above, {**frozen, **trained}, below, first, *inputs[:2], view=view, method="further_heads")
        return self.loss_of(hidden, unembedding_of(frozen), rows, weights)

    def costs(self) -> costs.Costs:
        model, length, heads = self.config.model, self.config.training.sequence_length, self.config.heads
        number = heads.num_heads - self._frozen_heads
        # Frozen weights are used forward; trained ones backward, too, by weight and by input.
        frozen = costs.trunk(model, length) + costs.heads(model, heads, self._frozen_heads, length)
        trained = costs.heads(model, heads, number, length)
        logits = number * costs.unembedding(model)  # which get no gradient by the unembedding
        flops = 2 * frozen.multiplications + 6 * trained.multiplications + 4 * logits
        return costs.Costs(trained.weights, frozen.weights, number, flops)
