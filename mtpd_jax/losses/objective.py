"""The objective of heads beside a main head: alignment by target, weights counted first, then the fused loss."""

import dataclasses

import jax.numpy as jnp
from jax.sharding import Mesh

from mtpd_jax.config import Config, HeadsConfig, ObjectiveConfig
from mtpd_jax.fields import POSITIVE, ZERO_OR_MORE, field, one_of, require
from mtpd_jax.losses.align import align, supervision_mask
from mtpd_jax.losses.divergences import DIVERGENCES
from mtpd_jax.losses.fused import Trunk, fused_loss
from mtpd_jax.losses.terms import Distillation, LossSums
from mtpd_jax.model.backbone import HiddenStates
from mtpd_jax.model.heads import HEAD_KINDS
from mtpd_jax.shapes import AnyArray, Array, Bool, Float, Int, SegmentIds, Tokens

PerHead = float | tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class HeadsObjectiveConfig(ObjectiveConfig):
    """The part of a method's section that says how heads learn, from the text and from the main head."""

    # CE weight, a number for each trained head or one per head; None: 0.3 over the number of trained heads, and 0 with
    # mode=posthoc.
    alpha: PerHead = field(None, ZERO_OR_MORE)
    # KL weight, likewise; 0: plain MTP; None: 1 with one trained head, 0.5 with more, and one over their number with
    # mode=posthoc.
    beta: PerHead = field(None, ZERO_OR_MORE)
    top_n: int = field(10_000, POSITIVE)  # tokens of the teacher's distribution that the KL compares; >= V: all
    temperature: float = field(1.0, POSITIVE)  # divides both sides' logits in the KL
    # forward: KL(main head || head); tv: 1 - acceptance rate; lk: -log of the acceptance rate; lk_hybrid: KL while
    # little is accepted, then tv (arXiv 2602.23881).
    kl: str = field("forward", one_of(DIVERGENCES))

    def default_coefficients(self, num_heads: int) -> tuple[float, float]:
        """What None stands for: alpha = 0.3 / heads being trained (DeepSeek-V3's lambda spread over the heads; our
        choice), beta = 1 with one head and 0.5 with more (MTP-D §4)."""
        return 0.3 / max(num_heads, 1), 1.0 if num_heads == 1 else 0.5

    def coefficients(self, num_heads: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns (alpha, beta), one number per head that is trained."""
        defaults = self.default_coefficients(num_heads)
        alpha, beta = (
            default if value is None else value
            for value, default in zip((self.alpha, self.beta), defaults, strict=True)
        )

        def per_head(value: float | tuple[float, ...]) -> tuple[float, ...]:
            return value if isinstance(value, tuple) else (float(value),) * num_heads

        return per_head(alpha), per_head(beta)

    def trained_heads(self, heads: HeadsConfig) -> int | None:
        """How many heads are trained; None where that is not known yet."""
        return heads.num_heads

    def check(self, config: Config) -> None:
        kind = config.heads.kind
        require(kind in HEAD_KINDS, "heads.kind", kind, f"one of {', '.join(HEAD_KINDS)}")
        shareable = config.heads.cache == "per_depth" or HEAD_KINDS[kind].shared
        require(
            shareable, "heads.cache", config.heads.cache, f"per_depth: with heads.kind = {kind!r} each head has its own"
        )
        number = self.trained_heads(config.heads)
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if isinstance(value, tuple) and number is not None:
                expected = f"one number or {number} (the heads that are trained)"
                require(len(value) == number, f"objective.{name}", value, expected)


@dataclasses.dataclass(frozen=True)
class LossTerm:
    """A sum over supervised tokens and the number of them; the mean is taken once, when it is reported."""

    sum: float
    weight: float

    def mean(self) -> float | None:
        """The mean, or None where nothing was supervised."""
        return self.sum / self.weight if self.weight else None


@dataclasses.dataclass(frozen=True)
class Objective:
    """CE_main + sum_k (alpha_k CE_k + beta_k KL_k), each term a mean over its own supervised tokens (MTP-D §3.2).

    Attributes:
      heads: the numbers of the heads that it is about, from 1.
      alpha, beta: one coefficient per head.
      distillation: None if every beta is zero: then neither selection nor divergence is compiled.
      trunk: what backbone, embedding and unembedding get a gradient from. With a frozen one CE_main, which nothing
        can change, is reported and not part of the total.
      chunk_rows: see ``fused_loss``.
    """

    heads: tuple[int, ...]
    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    distillation: Distillation | None
    trunk: Trunk = "trained"
    chunk_rows: int | None = None

    def count(self, segment_ids: Int[Array, "B T"], supervised: Bool[Array, "B T"] | None = None) -> Float[Array, " J"]:
        """Supervised tokens per head; it depends on the masks alone, so a whole step is counted before its loss."""
        return jnp.sum(supervision_mask(segment_ids, self.heads, supervised), axis=(1, 2), dtype=jnp.float32)

    def loss(
        self,
        hidden: HiddenStates,
        unembedding: Float[Array, "V D"],
        tokens: Tokens,
        segment_ids: SegmentIds,
        weights: Float[Array, " J"],
        mesh: Mesh,
        supervised: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, ""], LossSums]:
        """The share of these rows in the step's loss.

        Args:
          hidden, unembedding, tokens, segment_ids: the model's states for these rows, and what they were made from.
          weights: [J]; supervised tokens of the whole step, from ``count``.
          mesh: see ``fused_loss``.
          supervised: see ``supervision_mask``.

        Returns:
          The differentiable share of the total, and the sums per term, without gradient.
        """
        inverse = jnp.where(weights > 0, 1 / jnp.maximum(weights, 1), 0)
        rows = align(hidden, tokens, segment_ids, self.heads, supervised)
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

    def terms(self, sums: LossSums, weights: Float[AnyArray, " J"]) -> dict[str, LossTerm]:
        """Names the terms as ``metrics.jsonl`` does: ``main/ce``, ``head_1/ce``, ``head_1/kl``, ``head_1/agreement``, …

        A KL that is no part of the objective, because the head's beta is zero, has weight 0, and so no mean.
        """
        ce, kl, agreement, weight = (array.tolist() for array in (sums.ce, sums.kl, sums.agreement, weights))
        terms = {"main/ce": LossTerm(ce[0], weight[0])}
        for row, number in enumerate(self.heads, 1):
            head = f"head_{number}"
            terms[f"{head}/ce"] = LossTerm(ce[row], weight[row])
            terms[f"{head}/kl"] = LossTerm(kl[row - 1], weight[row] if self.beta[row - 1] else 0.0)
            terms[f"{head}/agreement"] = LossTerm(agreement[row - 1], weight[row])
        return terms


def objective_of(config: Config, heads: tuple[int, ...], trunk: Trunk, detach_teacher: bool = True) -> Objective:
    """The objective of training some heads, from what the config says of every method.

    Args:
      config: of the run.
      heads: those that are trained.
      trunk: see ``Objective``.
      detach_teacher: whether the main head's logits get no gradient from the KL.
    """
    section = config.objective
    assert isinstance(section, HeadsObjectiveConfig)  # of a method that trains heads
    alpha, beta = section.coefficients(len(heads))
    distillation = Distillation(section.top_n, section.temperature, section.kl, detach_teacher)
    return Objective(heads, alpha, beta, distillation if any(beta) else None, trunk, section.chunk_rows)
