"""The device mesh, and the one table that says which logical axis of an array lies on which axis of the mesh."""

import contextvars
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mtpd_jax.config import MeshConfig, ModelConfig, TrainingConfig

MeshAxes = str | tuple[str, ...] | None

# Mesh axes over which the rows of a batch are split.
BATCH_AXES = ("data", "fsdp")
# The mesh axis over which the unembedding is split by token.
VOCABULARY_AXIS = "tensor"


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axis. Parameters and activations name logical axes only; change the layout here."""

    batch: MeshAxes = BATCH_AXES
    # Parameters: the width is split over fsdp and gathered where it is used; activations keep it whole.
    embed: MeshAxes = "fsdp"
    mlp: MeshAxes = "tensor"
    query_heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    head_size: MeshAxes = None
    vocabulary: MeshAxes = VOCABULARY_AXIS
    layers: MeshAxes = None
    heads: MeshAxes = None

    def table(self) -> tuple[tuple[str, MeshAxes], ...]:
        """The rules in the form that Linen's logical partitioning reads."""
        return tuple(dataclasses.asdict(self).items())


RULES = ShardingRules()

# The mesh that the function being traced runs on, for ``constrain``: see ``within``.
_traced_on: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Builds the mesh (data, fsdp, tensor, expert); an axis of -1 takes the devices that are left.

    Without a -1, one process may leave devices unused.

    Raises:
      ValueError: the axes' sizes do not multiply to the number of devices.
    """
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
    devices = devices[:used]
    # Auto, because Linen's logical constraints cannot be placed on the Explicit axes that make_mesh now defaults to.
    return jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def check_divisible(mesh: Mesh, model: ModelConfig, training: TrainingConfig) -> None:
    """Checks that every split axis divides evenly over the mesh.

    Raises:
      ValueError: naming the field, its value and the mesh axis that does not divide it.
    """
    rows = training.batch_size // training.micro_batches
    checks: tuple[tuple[str, int, MeshAxes], ...] = (
        ("training.batch_size / training.micro_batches", rows, RULES.batch),
        ("model.width", model.width, RULES.embed),
        ("model.mlp_width", model.mlp_width, RULES.mlp),
        ("model.query_heads", model.query_heads, RULES.query_heads),
        ("model.kv_heads", model.kv_heads, RULES.kv_heads),
        ("model.vocabulary_size", model.vocabulary_size, RULES.vocabulary),
    )
    for name, size, axes in checks:
        names = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[axis] for axis in names)
        if size % parts:
            raise ValueError(f"config.{name} = {size}: expected a multiple of mesh {' x '.join(names)} = {parts}")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a step's batch, [micro-batch, B, T]."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, None))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def shardings_of(boxed: Any, mesh: Mesh) -> Any:
    """Turns Linen's logical axis metadata into NamedShardings, one per leaf.

    Args:
      boxed: the tree of (abstract) variables with their metadata, as ``jax.eval_shape(model.init, …)`` returns it.
      mesh: the device mesh.
    """
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES.table())


def within(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function so that the constraints in it (see ``constrain``) are those of this mesh when it is traced."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        token = _traced_on.set(mesh)
        try:
            return function(*args, **kwargs)
        finally:
            _traced_on.reset(token)

    return wrapped


def constrain(values: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the partitioner where an activation lies; outside ``within``, and on one device, there is nothing to tell.

    Without it, XLA may split the model's width over the devices that hold parts of the parameters, and sum whole
    batches of activations over all of them. ``nn.with_logical_constraint`` is not used: it looks for the mesh where
    neither ``with mesh:`` nor jit puts it, and does nothing where it finds none.

    Args:
      values: one logical axis per dimension.
      axes: their names in ``ShardingRules``; None for an axis that is whole on every device.
    """
    mesh = _traced_on.get()
    if mesh is None or mesh.size == 1:
        return values
    spec = nn.logical_to_mesh_axes(axes, RULES.table())
    assert spec is not None  # as it is for no names at all
    return jax.lax.with_sharding_constraint(values, NamedSharding(mesh, spec))
