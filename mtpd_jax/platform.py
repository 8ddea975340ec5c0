"""What follows from the kind of device that a program is for, asked of its mesh.

That device need not be one of the machine at hand: programs for a pod are compiled on a laptop.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtpd_jax.config import ModelConfig

# Dense bfloat16 peak per JAX device, in FLOP/s, from the vendors' data sheets; keyed by jax.Device.device_kind.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
# The attention kernels that each kind of device has, the one that ``auto`` stands for first; see ``model.attention``.
_ATTENTION = {"cpu": ("dense",), "gpu": ("triton", "cudnn", "dense"), "tpu": ("splash", "dense")}
# On CPUs, layers with more bytes than this are scanned when decoding. Weights that stay in the processor's cache are
# multiplied fastest where they lie; from memory they come fastest as a stream, and a scan copies each layer's weights
# in one. By measurement (experiments/bench/decode.py --layout).
_CACHED_BYTES = 16e6


@dataclasses.dataclass(frozen=True)
class Platform:
    """The kind of device that a program is for.

    Attributes:
      kind: cpu, gpu or tpu.
      device_kind: the model of the device, as JAX names it.
    """

    kind: str
    device_kind: str

    @property
    def on_cpu(self) -> bool:
        """Whether the host's processor computes: caches decide there, and products of few rows are expensive."""
        return self.kind == "cpu"

    @property
    def peak_flops(self) -> float | None:
        """Dense bfloat16 FLOP/s of a device; None where it is not known."""
        return PEAK_FLOPS.get(self.device_kind)

    @property
    def attention_kernels(self) -> tuple[str, ...]:
        """Those that this kind of device has, the one that ``auto`` stands for first."""
        return _ATTENTION.get(self.kind, ("dense",))

    def resolve(self, model: ModelConfig) -> ModelConfig:
        """The model as it is computed here: every ``auto`` replaced by what it stands for.

        So is a kernel that this kind of device has not: a run is read on other devices than it was trained on.
        """
        dtype = ("float32" if self.on_cpu else "bfloat16") if model.dtype == "auto" else model.dtype
        kernels = self.attention_kernels
        attention = model.attention if model.attention in kernels else kernels[0]
        return dataclasses.replace(model, dtype=dtype, attention=attention)

    def scans_layers(self, layer_weights: int, dtype: jnp.dtype) -> bool:
        """Whether decoding had better scan its layers than have them written out, from all their weights."""
        return self.on_cpu and layer_weights * dtype.itemsize > _CACHED_BYTES


def platform_of(devices: Mesh | jax.Device) -> Platform:
    """The platform of a mesh, whose devices are all of one kind, or of a device."""
    device = devices.devices.flat[0] if isinstance(devices, Mesh) else devices
    return Platform(device.platform, device.device_kind)
