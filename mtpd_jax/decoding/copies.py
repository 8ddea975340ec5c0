"""Copies of the model, each on devices of its own: which prompts each of them decodes, and where its parameters lie."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtpd_jax.shapes import Array
from mtpd_jax.sharding import parts_of


@dataclasses.dataclass(frozen=True)
class Shares:
    """Prompts as they are shared out: each copy of the model has its part, padded to whole batches.

    Attributes:
      prompts, lengths: [Q, T] and [Q]; filled up with texts of one token.
      counts: [copies]; prompts in each part.
      places: of the prompts, in their order.
    """

    prompts: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, prompts: Sequence[np.ndarray], copies: int, rows: int, padded: int) -> "Shares":
        """Shares prompts out, ``rows`` at a time in each part; few different sizes are ever compiled."""
        number = len(prompts)
        # Even parts, with room for a power of two times the rows.
        own = -(-number // copies)
        room = rows * (1 << (-(-own // rows) - 1).bit_length())
        counts = np.clip(number - own * np.arange(copies), 0, own).astype(np.int32)
        places = np.arange(number) // own * room + np.arange(number) % own
        texts, lengths = np.zeros((copies * room, padded), np.int32), np.ones(copies * room, np.int32)
        for place, prompt in zip(places, prompts, strict=True):
            texts[place, : len(prompt)], lengths[place] = prompt, len(prompt)
        return cls(texts, lengths, counts, places)


def of_copies(mesh: Mesh, copies: int) -> Mesh:
    """The part of a mesh that holds so many copies of the model."""
    return mesh if copies == parts_of(mesh, "batch") else _with(mesh, list(_by_copy(mesh)[:copies]))


def of_this_process(mesh: Mesh) -> Mesh:
    """The copies of the model that lie on this process' own devices: each process decodes by itself.

    Raises:
      ValueError: none does as a whole.
    """
    own = [copy for copy in _by_copy(mesh) if all(one.process_index == jax.process_index() for one in copy.flat)]
    if not own:
        raise ValueError("no process holds a whole copy of the model: decoding needs one, so take a smaller model")
    return mesh if len(own) == parts_of(mesh, "batch") else _with(mesh, own)


def _by_copy(mesh: Mesh) -> np.ndarray:
    """The devices of a mesh, those that hold one copy of the model after the other."""
    return mesh.devices.reshape(parts_of(mesh, "batch"), 1, *mesh.devices.shape[2:])


def _with(mesh: Mesh, copies: list[np.ndarray]) -> Mesh:
    return Mesh(np.stack(copies), mesh.axis_names, axis_types=mesh.axis_types)


def on_mesh(mesh: Mesh, parameters: Any) -> Any:
    """The parts of the parameters that the mesh's devices hold already, as arrays of these devices."""
    devices = set(mesh.devices.flat)

    def moved(leaf: Array) -> Array:
        old = leaf.sharding
        sharding = NamedSharding(mesh, old.spec if isinstance(old, NamedSharding) else PartitionSpec())
        # What lies there already is not copied.
        parts = [shard.data for shard in leaf.addressable_shards if shard.device in devices]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)

    return jax.tree.map(moved, parameters)
