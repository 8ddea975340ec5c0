"""The training objective: alignment by target, weights counted first, then the fused loss."""

import dataclasses

import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from mtpd_jax.config import Config
from mtpd_jax.losses.fused import Trunk, fused_loss
from mtpd_jax.losses.terms import Distillation, LossSums
from mtpd_jax.model.backbone import HiddenStates
from mtpd_jax.model.shift import shift
from mtpd_jax.shapes import AnyArray, Array, Bool, Float, Int, SegmentIds, Tokens


@struct.dataclass
class AlignedRows:
    """All heads' states side by side at the token that they predict.

    Attributes:
      hidden: [J, B, T, D]; the main head's states, then at [j, b, t], for the head k of row j, its state at position
        t-k, which predicts token t+1.
      targets: [B, T]; token t+1.
      mask: [J, B, T]; whether both t-k and t+1 lie in the document of t.
    """

    hidden: Float[Array, "J B T D"]
    targets: Int[Array, "B T"]
    mask: Bool[Array, "J B T"]


def supervision_mask(segment_ids: SegmentIds, first_head: int, last_head: int) -> Bool[Array, "J B T"]:
    """Which heads, the main head and first…last, have both a source position and a target, per aligned row."""
    _, has_target_BxT = shift(segment_ids, segment_ids, 1)
    sources = [shift(segment_ids, segment_ids, -k)[1] for k in (0, *range(first_head, last_head + 1))]
    return jnp.stack(sources) & has_target_BxT[None]


def align(hidden: HiddenStates, tokens: Tokens, segment_ids: SegmentIds, first_head: int = 1) -> AlignedRows:
    """Shifts head k's states by k, so that every row has one target and one teacher for all heads."""
    last_head = first_head + hidden.heads.shape[0] - 1
    heads = zip(range(first_head, last_head + 1), hidden.heads, strict=True)
    rows = [hidden.main] + [shift(states, segment_ids, -k)[0] for k, states in heads]
    mask = supervision_mask(segment_ids, first_head, last_head)
    return AlignedRows(jnp.stack(rows), shift(tokens, segment_ids, 1)[0], mask)


@dataclasses.dataclass(frozen=True)
class Objective:
    """CE_main + sum_k (alpha_k CE_k + beta_k KL_k), each term a mean over its own supervised tokens (MTP-D §3.2).

    Attributes:
      alpha, beta: one coefficient per head that is trained.
      distillation: None if every beta is zero: then neither selection nor divergence is compiled.
      trunk: what backbone, embedding and unembedding get a gradient from. With a frozen one CE_main, which nothing
        can change, is reported and not part of the total.
      first_head: the first head that is trained; those before it are frozen, and no term knows them.
      chunk_rows: see ``fused_loss``.
    """

    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    distillation: Distillation | None
    trunk: Trunk = "trained"
    first_head: int = 1
    chunk_rows: int | None = None

    @property
    def num_heads(self) -> int:
        """Heads that are trained."""
        return len(self.alpha)

    @property
    def last_head(self) -> int:
        """The last head that is trained."""
        return self.first_head + self.num_heads - 1

    def count(self, segment_ids: Int[Array, "*axes T"]) -> Float[Array, " J"]:
        """Supervised tokens per head; it depends on the masks alone, so a whole step is counted before its loss."""
        flat = segment_ids.reshape(-1, segment_ids.shape[-1])
        mask = supervision_mask(flat, self.first_head, self.last_head)
        return jnp.sum(mask, axis=(1, 2), dtype=jnp.float32)

    def loss(
        self,
        hidden: HiddenStates,
        unembedding: Float[Array, "V D"],
        tokens: Tokens,
        segment_ids: SegmentIds,
        weights: Float[Array, " J"],
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, ""], LossSums]:
        """The share of these rows in the step's loss.

        Args:
          hidden, unembedding, tokens, segment_ids: the model's states for these rows, and what they were made from.
          weights: [J]; supervised tokens of the whole step, from ``count``.
          mesh: see ``fused_loss``.

        Returns:
          The differentiable share of the total, and the sums per term, without gradient.
        """
        inverse = jnp.where(weights > 0, 1 / jnp.maximum(weights, 1), 0)
        rows = align(hidden, tokens, segment_ids, self.first_head)
        main_scale = 0.0 if self.trunk == "frozen" else 1.0
        return fused_loss(
            rows.hidden,
            unembedding,
            rows.targets,
            rows.mask,
            jnp.array((main_scale, *self.alpha)) * inverse,
            jnp.array(self.beta, jnp.float32) * inverse[1:],
            distillation=self.distillation,
            trunk=self.trunk,
            chunk_rows=self.chunk_rows,
            mesh=mesh,
        )

    def terms(self, sums: LossSums, weights: Float[AnyArray, " J"]) -> dict[str, "LossTerm"]:
        """Names the terms as ``metrics.jsonl`` does: ``main/ce``, ``head_1/ce``, ``head_1/kl``, ``head_1/agreement``, …

        Heads that are not trained have none. A KL that is no part of the objective, because the head's beta is zero,
        has weight 0, and so no mean.
        """
        ce, kl, agreement, weight = (array.tolist() for array in (sums.ce, sums.kl, sums.agreement, weights))
        terms = {"main/ce": LossTerm(ce[0], weight[0])}
        for row in range(1, len(weight)):
            head = f"head_{self.first_head + row - 1}"
            terms[f"{head}/ce"] = LossTerm(ce[row], weight[row])
            terms[f"{head}/kl"] = LossTerm(kl[row - 1], weight[row] if self.beta[row - 1] else 0.0)
            terms[f"{head}/agreement"] = LossTerm(agreement[row - 1], weight[row])
        return terms


@dataclasses.dataclass(frozen=True)
class LossTerm:
    """A sum over supervised tokens and the number of them; the mean is taken once, when it is reported."""

    sum: float
    weight: float

    def mean(self) -> float | None:
        """The mean, or None where nothing was supervised."""
        return self.sum / self.weight if self.weight else None


def training_objective(config: Config) -> Objective:
    """The objective that a config asks for."""
    objective = config.objective
    alpha, beta = objective.coefficients(config.trained_heads)
    distillation = Distillation(objective.top_n, objective.temperature, objective.kl, objective.detach_teacher)
    trunk: Trunk = "detached" if objective.detach_trunk else "trained"
    if config.frozen_heads is not None:
        trunk = "frozen"
    first_head = 1 + (config.frozen_heads or 0)
    return Objective(alpha, beta, distillation if any(beta) else None, trunk, first_head, objective.chunk_rows)


def scoring_objective(config: Config) -> Objective:
    """The objective of evaluation: its KL is forward, over the full vocabulary, at temperature 1, for every run."""
    ones = (1.0,) * config.heads.num_heads
    distillation = Distillation(config.model.vocabulary_size, 1.0, "forward", True)
    return Objective(ones, ones, distillation if ones else None, chunk_rows=config.objective.chunk_rows)
