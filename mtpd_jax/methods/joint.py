"""Joint training (MTP-D §3.2): backbone and heads together, with a top-N KL from the main head to the heads."""

import dataclasses

from jax.sharding import Mesh

from mtpd_jax.config import Config
from mtpd_jax.data.pipeline import Batch
from mtpd_jax.fields import field, require
from mtpd_jax.losses.objective import HeadsObjectiveConfig, Objective, objective_of
from mtpd_jax.losses.terms import LossSums
from mtpd_jax.methods.method import HeadsMethod, StepContext
from mtpd_jax.model import costs
from mtpd_jax.model.backbone import unembedding_of
from mtpd_jax.model.layers import apply
from mtpd_jax.shapes import Array, Float, Parameters


@dataclasses.dataclass(frozen=True)
class JointConfig(HeadsObjectiveConfig, case="joint"):
    """Backbone and heads together."""

    detach_teacher: bool = field(True)  # no gradient from the KL into the main head's logits
    detach_trunk: bool = field(False)  # no gradient from the heads' losses into backbone, embedding and unembedding

    def check(self, config: Config) -> None:
        super().check(config)
        expected = "True with detach_trunk: the teacher's logits are the trunk's"
        valid = self.detach_teacher or not self.detach_trunk
        require(valid, "objective.detach_teacher", self.detach_teacher, expected)


class Joint(HeadsMethod, section=JointConfig):
    """Everything is trained from random parameters."""

    def __init__(self, config: Config, mesh: Mesh):
        super().__init__(config, mesh)
        assert isinstance(config.objective, JointConfig)
        self._detached, self._detach_teacher = config.objective.detach_trunk, config.objective.detach_teacher

    def make_objective(self) -> Objective:
        heads = tuple(range(1, self.config.heads.num_heads + 1))
        trunk = "detached" if self._detached else "trained"
        return objective_of(self.config, heads, trunk, self._detach_teacher)

    def loss(
        self,
        trained: Parameters,
        frozen: Parameters | None,
        rows: Batch,
        weights: Float[Array, " J"],
        context: StepContext,
    ) -> tuple[Float[Array, ""], LossSums]:
        inputs = rows.tokens, rows.segment_ids, rows.positions
        hidden = apply(self.model, trained, *inputs, detach_trunk=self._detached)
        return self.loss_of(hidden, unembedding_of(trained), rows, weights)

    def costs(self) -> costs.Costs:
        model, length, number = self.config.model, self.config.training.sequence_length, self.config.heads.num_heads
        trunk = costs.trunk(model, length)
        heads = costs.heads(model, self.config.heads, number, length)
        # An unembedding has no gradient from heads that are cut off from it.
        per_logits = 4 if self._detached else 6
        flops = 6 * (trunk.multiplications + heads.multiplications) + number * per_logits * costs.unembedding(model)
        return costs.Costs(trunk.weights + heads.weights, 0, model.layers + number, flops)
