"""Digests of arrays, taken on the devices that hold them: what a checkpoint is held to when it is read again."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtpd_jax.shapes import AnyArray, Array, Bool, UInt32

# Elements that the host mixes at a time, for it makes copies of them. Our choice.
_AT_ONCE = 1 << 20
_SEEDS = (np.uint32(0x9E3779B9), np.uint32(0x85EBCA6B))


def _mixed(words: UInt32[AnyArray, "..."]) -> UInt32[AnyArray, "..."]:
    """A bijection of 32-bit numbers that spreads every bit over all (the finaliser of MurmurHash3)."""
    words = (words ^ (words >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return words ^ (words >> np.uint32(16))


def _sums(words: UInt32[AnyArray, "..."], index: UInt32[AnyArray, "..."]) -> list[UInt32[AnyArray, ""]]:
    """Two sums over the elements of a mixture of their bits and their places.

    The order of summing does not matter, and so neither does how the array is split over devices. One element that
    changes changes both sums for certain; several escape with a chance of 2^-64.
    """
    return [_mixed(words ^ _mixed(index + seed)).sum(dtype=np.uint32) for seed in _SEEDS]


def _unsigned(leaf: AnyArray) -> np.dtype:
    """The type of numbers that have as many bits as the array's elements."""
    return np.dtype({2: np.uint16, 4: np.uint32}[leaf.dtype.itemsize])


@jax.jit
def _on_devices(leaf: Array) -> tuple[list[UInt32[Array, ""]], Bool[Array, ""]]:
    # The bits of each element, and its place in row-major order.
    words = jax.lax.bitcast_convert_type(leaf, _unsigned(leaf)).astype(jnp.uint32)
    index, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * np.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    return _sums(words, index), jnp.all(jnp.isfinite(leaf))


def _on_host(leaf: Array) -> tuple[list[np.uint32], bool]:
    """The same, where the host holds the array anyway and compiling would take longer than counting."""
    values = np.ascontiguousarray(leaf).reshape(-1)
    total, finite = np.zeros(2, np.uint32), True
    for start in range(0, values.size, _AT_ONCE):
        part = values[start : start + _AT_ONCE]
        # Places count through all parts.
        index = np.arange(part.size, dtype=np.uint32) + np.uint32(start % 2**32)
        total += np.array(_sums(part.view(_unsigned(part)).astype(np.uint32), index))
        finite &= bool(np.isfinite(part.astype(np.float32)).all())
    return list(total), finite


def digests_of(tree: Any) -> tuple[dict[str, str], str | None]:
    """Digests of all arrays of a tree, and the first one that holds a number which is not finite.

    Args:
      tree: of arrays of 16 or 32 bits per element, sharded in any way.

    Returns:
      By the array's path in the tree, 16 hexadecimal digits; and the path of an array with NaN or infinity, or None.
    """
    # Named as the tree names them, and counted wherever they lie.
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    on_host = all(leaf.is_fully_addressable and next(iter(leaf.devices())).platform == "cpu" for leaf in leaves)
    checked = jax.device_get([(_on_host if on_host else _on_devices)(leaf) for leaf in leaves])
    digests = {name: "".join(f"{half:08x}" for half in sums) for name, (sums, _) in zip(names, checked, strict=True)}
    return digests, next((name for name, (_, finite) in zip(names, checked, strict=True) if not finite), None)
