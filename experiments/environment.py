"""The machine that figures belong to."""

import importlib.metadata
import os
import platform
from typing import Any

import jax


def environment() -> dict[str, Any]:
    """The device and the versions that figures belong to."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")
    return {
        "backend": jax.devices()[0].platform,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in names},
    }
