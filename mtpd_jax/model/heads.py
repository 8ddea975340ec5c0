"""The kinds of heads, and K of them in a row."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn

from mtpd_jax.config import HeadsConfig, ModelConfig
from mtpd_jax.model.block import rematerialised, scanned
from mtpd_jax.model.chains import run_chain
from mtpd_jax.model.head import Head, HeadOutput
from mtpd_jax.model.views import PackedRows, View
from mtpd_jax.shapes import Array, Float, Hidden


@dataclasses.dataclass(frozen=True)
class HeadKind:
    """A kind of head, for ``heads.kind``.

    Attributes:
      module: one head; called as ``Head`` is, with a ``Block`` of the backbone's kind in it, whose cache it returns.
      shared: whether there is one module, which is applied at every depth.
      weights: of its matrices, beside those of its block.
    """

    module: type[nn.Module]
    shared: bool
    weights: Callable[[ModelConfig], int]


def _projection(model: ModelConfig) -> int:
    return 2 * model.width**2


HEAD_KINDS = {
    "cascade": HeadKind(Head, shared=False, weights=_projection),
    "recurrent": HeadKind(Head, shared=True, weights=_projection),
}


class Heads(nn.Module):
    """K heads one after the other.

    Parameters of several modules are stacked along a leading axis of K; those of a shared one have no such axis.
    """

    config: ModelConfig
    heads: HeadsConfig

    @nn.compact
    def __call__(self, state: Hidden, embedded: Float[Array, "K B T D"], view: View) -> tuple[Hidden, HeadOutput]:
        """Returns the state for a head K+1, and the heads' outputs, stacked.

        With one cache for all depths the view has to be ``PackedRows``.
        """
        kind = HEAD_KINDS[self.heads.kind]
        config = dataclasses.replace(self.config, weights=self.heads.weights)  # its own block's, too
        if self.heads.cache == "shared":
            assert isinstance(view, PackedRows)  # chains begin at every position of whole rows
            head = rematerialised(kind.module, config)(config, self.heads.pass_normed, name="head")
            return run_chain(head, config, state, embedded, view)
        # One module's parameters for all depths, or a stack of modules.
        shared = {"variable_axes": {}, "variable_broadcast": "params", "split_rngs": {"params": False}}
        stacked = {"metadata_params": {nn.PARTITION_NAME: "heads"}}
        options = shared if kind.shared else stacked
        head = scanned(kind.module, config, self.heads.num_heads, (0, nn.broadcast), **options)
        return head(config, self.heads.pass_normed, name="head")(state, embedded, view)
