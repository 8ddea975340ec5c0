"""The engine that walks the tables, both ways: which tensors a model is, array by array."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from mtpd_jax.config import HeadsConfig, ModelConfig
from mtpd_jax.interop.families import Family
from mtpd_jax.interop.names import TRUNK, Entry, Shape
from mtpd_jax.model.heads import HEAD_KINDS


@dataclasses.dataclass(frozen=True)
class Place:
    """An array of ours, or one layer of a stack, and the tensors that it is made of.

    Attributes:
      entry: how.
      path: of the array in the tree of parameters; empty for tensors that are nothing of ours.
      index: of the layer, and the number of layers in the stack; None: all of the array.
      names: of the tensors.
      of_heads: whether it is part of a head.
    """

    entry: Entry
    path: str
    index: tuple[int, int] | None
    names: tuple[str, ...]
    of_heads: bool

    def shapes(self, model: ModelConfig) -> dict[str, Shape]:
        """The shapes of the tensors, by name."""
        return dict(zip(self.names, self.entry.form.shapes(model), strict=True))

    def get(self, model: ModelConfig, tree: Any) -> dict[str, np.ndarray]:
        """The tensors that this part of a model's parameters becomes, by name."""
        array = None
        if self.path:
            array = np.asarray(_leaf(tree, self.path))
            array = array if self.index is None else array[self.index[0]]
        return dict(zip(self.names, self.entry.form.split(model, array), strict=True))


def places_of(model: ModelConfig, heads: HeadsConfig, family: Family) -> Iterator[Place]:
    """All of a model, layer by layer, so that tensors are read about as they lie.

    The order of the places of one array is that of its layers. A shared head has a place per depth, all of them alike.
    """

    def below(prefix: str, entries: tuple[Entry, ...], path: str, index: tuple[int, int] | None) -> Iterator[Place]:
        for entry in entries:
            if entry.present(model):
                ours = f"{path}{entry.ours}" if entry.ours else ""
                names = tuple(prefix + name for name in entry.theirs)
                yield Place(entry, ours, index, names, path.startswith("heads/"))

    yield from below("", TRUNK, "", None)
    for layer in range(model.layers):
        yield from below(f"model.layers.{layer}.", family.block, "backbone/blocks/", (layer, model.layers))
    # Heads: one after the other, each with its block.
    number, shared = heads.num_heads, HEAD_KINDS[heads.kind].shared
    names = family.heads(number)
    for k in range(number):
        index, layer = None if shared else (k, number), model.layers + k
        yield from below(names.prefix.format(layer=layer), names.entries, "heads/head/", index)
        yield from below(names.block_prefix.format(layer=layer), family.head_block, "heads/head/block/", index)


class Assembly:
    """Parameters that are put together place by place; nothing is held but them."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}

    def put(self, place: Place, model: ModelConfig, tensors: list[np.ndarray], dtype: np.dtype) -> None:
        """Puts a place's tensors where they belong.

        Raises:
          ValueError: they are not what they have to be; naming them.
        """
        try:
            array = place.entry.form.join(model, tensors)
        except ValueError as error:
            raise ValueError(f"{', '.join(place.names)}: {error}") from None
        if not place.path:
            return
        *folders, name = place.path.split("/")
        folder = self.tree
        for part in folders:
            folder = folder.setdefault(part, {})
        # A whole array; or a layer, whose stack is made with the first.
        stack = () if place.index is None else place.index[1:]
        fresh = name not in folder
        if fresh:
            folder[name] = aligned((*stack, *array.shape), dtype)
        target = folder[name] if place.index is None else folder[name][place.index[0]]
        if fresh or place.index is not None:
            target[...] = array
        elif not np.array_equal(target, array.astype(dtype)):
            raise ValueError(f"{', '.join(place.names)}: expected the same as of the head before, for one is shared")


def aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An array that JAX on a CPU takes over as it lies: at a multiple of 64 bytes."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size].view(dtype).reshape(shape)


def _leaf(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree
