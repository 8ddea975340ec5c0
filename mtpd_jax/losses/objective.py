"""The training objective: alignment by target, weights counted first, then the fused loss."""

import dataclasses

import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from mtpd_jax.config import Config
from mtpd_jax.losses.fused import fused_loss
from mtpd_jax.losses.terms import Distillation, LossSums
from mtpd_jax.model.backbone import HiddenStates
from mtpd_jax.model.shift import shift
from mtpd_jax.shapes import AnyArray, Array, Bool, Float, Int, SegmentIds, Tokens


@struct.dataclass
class AlignedRows:
    """All heads' states side by side at the token that they predict.

    Attributes:
      hidden: [K+1, B, T, D]; at [k, b, t], head k's state at position t-k, which predicts token t+1.
      targets: [B, T]; token t+1.
      mask: [K+1, B, T]; whether both t-k and t+1 lie in the document of t.
    """

    hidden: Float[Array, "J B T D"]
    targets: Int[Array, "B T"]
    mask: Bool[Array, "J B T"]


def supervision_mask(segment_ids: SegmentIds, num_heads: int) -> Bool[Array, "J B T"]:
    """Which heads have both a source position and a target, per aligned row."""
    _, has_target_BxT = shift(segment_ids, segment_ids, 1)
    sources = [shift(segment_ids, segment_ids, -k)[1] for k in range(num_heads + 1)]
    return jnp.stack(sources) & has_target_BxT[None]


def align(hidden: HiddenStates, tokens: Tokens, segment_ids: SegmentIds) -> AlignedRows:
    """Shifts head k's states by k, so that every row has one target and one teacher for all heads."""
    num_heads = hidden.heads.shape[0]
    rows = [hidden.main] + [shift(hidden.heads[k - 1], segment_ids, -k)[0] for k in range(1, num_heads + 1)]
    return AlignedRows(jnp.stack(rows), shift(tokens, segment_ids, 1)[0], supervision_mask(segment_ids, num_heads))


@dataclasses.dataclass(frozen=True)
class Objective:
    """CE_main + sum_k (alpha_k CE_k + beta_k KL_k), each term a mean over its own supervised tokens (MTP-D §3.2).

    Attributes:
      alpha, beta: one coefficient per head.
      distillation: None if every beta is zero: then neither selection nor divergence is compiled.
      detach_trunk: the heads' losses leave backbone, embedding and unembedding alone.
      chunk_rows: see ``fused_loss``.
    """

    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    distillation: Distillation | None
    detach_trunk: bool = False
    chunk_rows: int | None = None

    @property
    def num_heads(self) -> int:
        return len(self.alpha)

    def count(self, segment_ids: Int[Array, "*axes T"]) -> Float[Array, " J"]:
        """Supervised tokens per head; it depends on the masks alone, so a whole step is counted before its loss."""
        flat = segment_ids.reshape(-1, segment_ids.shape[-1])
        return jnp.sum(supervision_mask(flat, self.num_heads), axis=(1, 2), dtype=jnp.float32)

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
          weights: [K+1]; supervised tokens of the whole step, from ``count``.
          mesh: see ``fused_loss``.

        Returns:
          The differentiable share of the total, and the sums per term, without gradient.
        """
        inverse = jnp.where(weights > 0, 1 / jnp.maximum(weights, 1), 0)
        rows = align(hidden, tokens, segment_ids)
        return fused_loss(
            rows.hidden,
            unembedding,
            rows.targets,
            rows.mask,
            jnp.array((1.0, *self.alpha)) * inverse,
            jnp.array(self.beta, jnp.float32) * inverse[1:],
            distillation=self.distillation,
            detach_trunk=self.detach_trunk,
            chunk_rows=self.chunk_rows,
            mesh=mesh,
        )


def training_objective(config: Config) -> Objective:
    """The objective that a config asks for."""
    objective = config.objective
    alpha, beta = objective.coefficients(config.heads.num_heads)
    distillation = Distillation(objective.top_n, objective.temperature, objective.kl, objective.detach_teacher)
    return Objective(alpha, beta, distillation if any(beta) else None, objective.detach_trunk, objective.chunk_rows)


def scoring_objective(config: Config) -> Objective:
    """The objective of evaluation: its KL is forward, over the full vocabulary, at temperature 1, for every run."""
    ones = (1.0,) * config.heads.num_heads
    distillation = Distillation(config.model.vocabulary_size, 1.0, "forward", True)
    return Objective(ones, ones, distillation if ones else None, chunk_rows=config.objective.chunk_rows)


@dataclasses.dataclass(frozen=True)
class LossTerm:
    """A sum over supervised tokens and the number of them; the mean is taken once, when it is reported."""

    sum: float
    weight: float

    def mean(self) -> float | None:
        """The mean, or None where nothing was supervised."""
        return self.sum / self.weight if self.weight else None


def loss_terms(sums: LossSums, weights: Float[AnyArray, " J"], with_kl: bool) -> dict[str, LossTerm]:
    """Names the terms as ``metrics.jsonl`` does: ``main/ce``, ``head_1/ce``, ``head_1/kl``, ``head_1/agreement``, …

    Without a KL in the objective its terms have weight 0, and so no mean.
    """
    ce, kl, agreement, weight = (array.tolist() for array in (sums.ce, sums.kl, sums.agreement, weights))
    terms = {"main/ce": LossTerm(ce[0], weight[0])}
    for k in range(1, len(weight)):
        terms[f"head_{k}/ce"] = LossTerm(ce[k], weight[k])
        terms[f"head_{k}/kl"] = LossTerm(kl[k - 1], weight[k] if with_kl else 0.0)
        terms[f"head_{k}/agreement"] = LossTerm(agreement[k - 1], weight[k])
    return terms
