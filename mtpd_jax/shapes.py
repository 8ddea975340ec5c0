"""The axis letters, and the array aliases built from them: the one place where letters are defined.

    B  sequences in a batch (rows of a decoding batch)
    T  tokens of one sequence
    D  model width
    F  width of the gated feed-forward layer
    N  query heads
    G  key/value heads (N is a multiple of G; R = N/G query heads share one)
    H  size of one query head, and of one key/value head
    L  Transformer layers of the backbone
    K  multi-token-prediction heads (depths): what `heads` alone means
    J  all heads, J = K+1: the main head is row 0
    P  rows of the loss whose softmaxes are formed together; Q groups of P rows in a chunk; M rows, all in a line
    S  keys that queries may see: slots of a cache, or the tokens of the row
    V  vocabulary
    W  newest positions of a text, over which heads are run when they draft

Bodies carry the letters as suffixes (``hidden_BxTxD``); signatures carry them in jaxtyping annotations, which the
tests check at run time; einsum strings use the same letters in lower case.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, UInt32

# Fields of structures that also live on the host, as NumPy arrays. (To the type checker they are one thing.)
AnyArray = Array if TYPE_CHECKING else Array | np.ndarray

# A model's parameters, or what goes with each of them: nested dictionaries with an array, a shape or a sharding at
# every leaf, by the names of Linen's modules.
Parameters: TypeAlias = Mapping[str, Any]

Tokens = Int[Array, "B T"]
SegmentIds = Int[Array, "B T"]
Positions = Int[Array, "B T"]
Hidden = Float[Array, "B T D"]
HeadsHidden = Float[Array, "K B T D"]
AttentionMask = Bool[Array, "B T S"]

__all__ = [
    "AnyArray",
    "Array",
    "AttentionMask",
    "Bool",
    "Float",
    "HeadsHidden",
    "Hidden",
    "Int",
    "Num",
    "Parameters",
    "Positions",
    "SegmentIds",
    "Tokens",
    "UInt32",
]
