"""The device mesh, the one table that says which logical axis lies on which axis of it, and sums over a split axis."""

import contextvars
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mtpd_jax.config import MeshConfig, TrainingConfig
from mtpd_jax.shapes import Array, Bool, Float, Int, Num


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axes. Parameters and activations name logical axes only; change the layout here."""

    batch: tuple[str, ...] = ("data", "fsdp")
    # Parameters: the width is split over fsdp and gathered where it is used; activations keep it whole.
    width: tuple[str, ...] = ("fsdp",)
    mlp_width: tuple[str, ...] = ("tensor",)
    query_heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    head_size: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ("tensor",)
    layers: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """The axes of the mesh that split a logical axis; none for None, an axis that every device holds whole.

        Raises:
          ValueError: there is no such logical axis.
        """
        if axis is None:
            return ()
        if axis not in dataclasses.asdict(self):
            raise ValueError(f"axis {axis!r}: expected one of {', '.join(dataclasses.asdict(self))}")
        return getattr(self, axis)

    def spec(self, *axes: str | None) -> PartitionSpec:
        """Where an array lies, from a logical axis per dimension (None for one that every device holds whole).

        Raises:
          ValueError: two of them would be split over the same axis of the mesh.
        """
        # An array can be split over an axis of the mesh once.
        taken: dict[str, str | None] = {}
        for axis in axes:
            for mesh_axis in self.mesh_axes(axis):
                if mesh_axis in taken:
                    raise ValueError(f"axes {taken[mesh_axis]!r} and {axis!r} both lie on mesh axis {mesh_axis!r}")
                taken[mesh_axis] = axis
        mesh_axes = [self.mesh_axes(axis) for axis in axes]
        return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in mesh_axes))


RULES = ShardingRules()
# The fields of the config that logical axes of parameters have their size from, where these have another name.
_FIELDS = {"vocabulary": "model.vocabulary_size", "heads": "heads.num_heads"}

# The mesh that the function being traced runs on: see ``within``.
_traced_on: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Builds the mesh (data, fsdp, tensor, expert); an axis of -1 takes the devices that are left.

    Without a -1, one process may leave devices unused.

    Raises:
      ValueError: the axes' sizes do not multiply to the number of devices.
    """
    # The axis of -1 takes what the others leave.
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shape = tuple(len(devices) // fixed if size == -1 else size for size in sizes.values())
    used = math.prod(shape)
    too_few = -1 in sizes.values() or jax.process_count() > 1
    if used > len(devices) or used == 0 or (used < len(devices) and too_few):
        raise ValueError(
            f"config.mesh = {sizes}: the axes must multiply to the number of devices, which is {len(devices)}"
        )
    return _mesh(tuple(sizes), shape, devices[:used])


def _mesh(names: tuple[str, ...], shape: tuple[int, ...], devices: list[Any]) -> Mesh:
    # Auto, because Linen's logical constraints cannot be placed on the Explicit axes that make_mesh now defaults to.
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def copies_of(devices: int) -> MeshConfig:
    """The mesh for reading a model: so many devices share each copy of it, and the copies share the rows."""
    return MeshConfig(data=-1, fsdp=1, tensor=devices, expert=1)


def data_mesh(devices: list[Any] | None = None) -> Mesh:
    """A mesh that has all devices (None: all that there are) along ``data``: each holds a whole copy of the model."""
    return make_mesh(copies_of(1), devices)


def holds_whole_copies(mesh: Mesh) -> bool:
    """Whether devices that share rows have all parameters between them and those that they share a copy with."""
    return mesh.shape["fsdp"] == 1


def parts_of(mesh: Mesh, axis: str) -> int:
    """How many parts a logical axis is split into."""
    return math.prod(mesh.shape[name] for name in RULES.mesh_axes(axis))


def parameter_parts(mesh: Mesh) -> int:
    """Into how many parts parameters are split at most."""
    axes = [axis for axis in dataclasses.asdict(RULES) if axis != "batch"]
    return math.prod(mesh.shape[name] for name in {name for axis in axes for name in RULES.mesh_axes(axis)})


def check_batch(mesh: Mesh, training: TrainingConfig) -> None:
    """Checks that the rows of a micro-batch can be shared out evenly.

    Raises:
      ValueError: naming their number and the mesh axes that do not divide it.
    """
    rows, parts = training.batch_size // training.micro_batches, parts_of(mesh, "batch")
    if rows % parts:
        names = " x ".join(RULES.batch)
        raise ValueError(
            f"config.training.batch_size / training.micro_batches = {rows}: expected a multiple of mesh {names} = "
            f"{parts}"
        )


def batch_sharding(mesh: Mesh, leading: int = 1) -> NamedSharding:
    """The sharding of a batch [B, T], behind so many axes that are whole: of a step's [micro-batch, B, T] one."""
    return NamedSharding(mesh, RULES.spec(*(None,) * leading, "batch", None))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def shardings_of(boxed: Any, mesh: Mesh) -> Any:
    """Turns Linen's logical axis metadata into NamedShardings, one per leaf.

    Args:
      boxed: the tree of (abstract) variables with their metadata, as ``jax.eval_shape(model.init, …)`` returns it.
      mesh: the device mesh.

    Raises:
      ValueError: an axis cannot be shared out evenly; the message names it, its size and the mesh axes.
    """

    def sharding(path: Any, leaf: Any, axes: PartitionSpec) -> NamedSharding:
        for axis, size in zip(axes, leaf.shape, strict=False):
            parts = parts_of(mesh, axis) if axis else 1
            if size % parts:
                # Named as the config names what has to be changed.
                names, field = " x ".join(RULES.mesh_axes(axis)), _FIELDS.get(axis, f"model.{axis}")
                raise ValueError(
                    f"config.{field} = {size} (of {jax.tree_util.keystr(path, simple=True, separator='/')}): "
                    f"expected a multiple of mesh {names} = {parts}"
                )
        return NamedSharding(mesh, RULES.spec(*axes))

    return jax.tree_util.tree_map_with_path(sharding, nn.meta.unbox(boxed), nn.get_partition_spec(boxed))


def within(mesh: Mesh | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function so that what is traced in it (see ``constrain``, ``traced_mesh``) is for this mesh, or for none.

    jit does not know of it: a function that jit keeps the trace of, wherever it is called, has to be within one itself.
    """

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        token = _traced_on.set(mesh)
        try:
            return function(*args, **kwargs)
        finally:
            _traced_on.reset(token)

    return wrapped


def traced_mesh() -> Mesh | None:
    """The mesh of what is being traced; None outside ``within``, and on one device, where nothing is split."""
    mesh = _traced_on.get()
    return None if mesh is None or mesh.size == 1 else mesh


def constrain(values: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the partitioner where an activation lies; outside ``within``, and on one device, there is nothing to tell.

    Without it, XLA may split the model's width over the devices that hold parts of the parameters, and sum whole
    batches of activations over all of them. ``nn.with_logical_constraint`` is not used: it looks for the mesh where
    neither ``with mesh:`` nor jit puts it, and does nothing where it finds none.

    Args:
      values: one logical axis per dimension.
      axes: their names in ``ShardingRules``; None for an axis that is whole on every device.
    """
    mesh, spec = traced_mesh(), RULES.spec(*axes)
    if mesh is None:
        return values
    by_hand = set(jax.sharding.get_abstract_mesh().manual_axes)
    if not by_hand:
        return jax.lax.with_sharding_constraint(values, NamedSharding(mesh, spec))
    # Within ``shard_map`` over some of the axes, of which there is nothing to say.
    parts = zip(axes, spec, strict=True)
    left = [None if by_hand.intersection(RULES.mesh_axes(axis)) else part for axis, part in parts]
    return jax.lax.with_sharding_constraint(values, PartitionSpec(*left))


def sum_over(values: Any, axis: str) -> Any:
    """Within ``shard_map``: sums a tree of arrays over the devices that hold other parts of a logical axis."""
    return jax.lax.psum(values, RULES.mesh_axes(axis))


@dataclasses.dataclass(frozen=True)
class LastAxis:
    """The last axis of an array, such as the tokens of a row of logits: whole, or one device's part of it.

    Attributes:
      mesh_axis: what splits it, bound by ``shard_map``; None where each device holds all of it.
      on_cpu: a CPU looks up single values where an accelerator joins a sum over all of them to a pass that it makes
        anyway.
    """

    mesh_axis: str | None
    on_cpu: bool

    @classmethod
    def of(cls, axis: str, mesh: Mesh, on_cpu: bool) -> "LastAxis":
        """A logical axis as a mesh splits it, over one of its axes at most."""
        (name,) = RULES.mesh_axes(axis)
        return cls(name if mesh.shape[name] > 1 else None, on_cpu)

    def size(self, values: Num[Array, "*rows V"]) -> int:
        """Its length, over all parts."""
        return values.shape[-1] * (jax.lax.axis_size(self.mesh_axis) if self.mesh_axis else 1)

    def ids(self, values: Num[Array, "*rows V"]) -> Int[Array, "*rows V"]:
        """The place on the whole axis of each value."""
        return jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1) + self._first(values)

    def _first(self, values: Array) -> Array | int:
        return jax.lax.axis_index(self.mesh_axis) * values.shape[-1] if self.mesh_axis else 0

    def sum(self, values: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
        """The sum."""
        return self.sum_parts(jnp.sum(values, axis=-1))

    def sum_parts(self, values: Array) -> Array:
        """Sums what the devices made of their parts."""
        return jax.lax.psum(values, self.mesh_axis) if self.mesh_axis else values

    def max(self, values: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
        """The maximum."""
        largest = jnp.max(values, axis=-1)
        return jax.lax.pmax(largest, self.mesh_axis) if self.mesh_axis else largest

    def min(self, values: Num[Array, "*rows V"]) -> Num[Array, "*rows"]:
        """The minimum."""
        smallest = jnp.min(values, axis=-1)
        return jax.lax.pmin(smallest, self.mesh_axis) if self.mesh_axis else smallest

    def count(self, values: Bool[Array, "*rows V"]) -> Float[Array, "*rows"]:
        """How many are true, exact up to 2^24; float32 because XLA's CPU backend does not vectorise integer sums."""
        return self.sum(values.astype(jnp.float32))

    def argmax(self, values: Float[Array, "*rows V"]) -> Int[Array, "*rows"]:
        """The first place of the largest value; on XLA's CPU backend many times faster than ``jnp.argmax``."""
        last = self.size(values) - 1  # for rows with NaN
        return self.min(jnp.where(values == self.max(values)[..., None], self.ids(values), last))

    def at(self, values: Float[Array, "J P V"], places: Int[Array, " P"]) -> Float[Array, "J P"]:
        """The value at one place per row, the same for all heads."""
        if not self.on_cpu:
            return self.sum(jnp.where(self.ids(values) == places[None, :, None], values, 0))
        own = places - self._first(values)
        here = (own >= 0) & (own < values.shape[-1])
        looked_up = jnp.take_along_axis(values, jnp.where(here, own, 0)[None, :, None], axis=-1)[..., 0]
        return self.sum(jnp.where(here[None], looked_up, 0)[..., None])


# Not split, on the CPU.
WHOLE = LastAxis(None, on_cpu=True)


def describe_mesh(mesh: Mesh) -> str:
    """How many devices, and how they are arranged if they are more than one."""
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    used = f"{mesh.devices.size} of {jax.device_count()} {mesh.devices.flat[0].platform} devices"
    return f"{used} ({axes})" if axes else used
