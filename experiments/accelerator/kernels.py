"""Kernels of this device against references: attention, the selection of the N largest logits, the loss."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.accelerator.battery import Result
from experiments.bench.loss_forms import distillation_of, inputs
from mtpd_jax.losses.dense import dense_loss
from mtpd_jax.losses.fused import fused_loss
from mtpd_jax.losses.select import nth_largest
from mtpd_jax.model.attention import KERNELS, Documents
from mtpd_jax.platform import platform_of
from mtpd_jax.shapes import Array
from mtpd_jax.sharding import LastAxis, data_mesh

# How far attention may be from the reference, by dtype: accelerators round the operands of float32 products, too.
_ATTENTION = {"bfloat16": 2e-2, "float32": 5e-3}
# And what adds up in float32, at highest precision.
_ROUNDING = 1e-5


def _error(found: Array, expected: Array) -> float:
    """The distance of two arrays, as a share of the second's norm, in float64."""
    left, right = (np.asarray(array, np.float64) for array in (found, expected))
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


def attention_case(name: str, tiny: bool) -> Result:
    """Values and gradients of an attention kernel on packed documents, against the dense form in float32."""
    known = platform_of(jax.devices()[0]).attention_kernels
    if name not in known:
        return {"skipped": f"this device has {', '.join(known)}"}
    rows, length, heads, size = (2, 128, 4, 16) if tiny else (4, 2048, 16, 128)
    rng = np.random.default_rng(0)
    ends = np.sort(rng.integers(1, length, (rows, 5)), axis=1)
    segments = jnp.asarray(1 + np.sum(np.arange(length)[None, :, None] >= ends[:, None], axis=2), jnp.int32)
    keys = jax.random.split(jax.random.key(0), 4)
    counts = (heads, heads // 2, heads // 2, heads)
    arrays = [jax.random.normal(key, (rows, length, n, size)) for key, n in zip(keys, counts, strict=True)]

    def run(kernel: str, arrays: list[Array], precision: str) -> list[Array]:
        *qkv, cotangent = arrays
        with jax.default_matmul_precision(precision):
            out, back = jax.vjp(lambda *qkv: KERNELS[kernel](*qkv, Documents(segments)), *qkv)
            return [out, *back(cotangent)]

    found: dict[str, float] = {}
    # cuDNN's takes floats of 16 bits only; models are trained in these.
    dtypes = ("bfloat16",) if name == "cudnn" else ("bfloat16", "float32")
    for dtype in dtypes:
        given = [array.astype(dtype) for array in arrays]
        exact = run("dense", [array.astype(jnp.float32) for array in given], "highest")
        try:
            errors = [_error(*pair) for pair in zip(run(name, given, "default"), exact, strict=True)]
        except Exception as error:
            if dtype == "bfloat16":
                raise
            return {"ok": False, **found, dtype: f"{type(error).__name__}: {error}"[:300]}
        found |= {f"{dtype} values": errors[0], f"{dtype} gradients": max(errors[1:])}
    return {"ok": all(error <= _ATTENTION[what.split()[0]] for what, error in found.items()), **found}


def rows_of_logits(size: int) -> np.ndarray:
    """Bell curves, heavy tails, a lone peak, few distinct values, equal values, a long tail: [6, V] in float32."""
    rng = np.random.default_rng(0)
    rows = [
        rng.normal(size=size) * 3,
        rng.standard_t(2, size=size) * 1e3,
        np.append(rng.normal(size=size - 1) * 0.1, 40.0),
        np.round(rng.normal(size=size) * 2),
        np.full(size, 0.7),
        rng.lognormal(size=size) ** 3,
    ]
    return np.asarray(rows, np.float32)


def selection_case(tiny: bool) -> Result:
    """The N largest of rows of many kinds, all ties included, against sorting: exactly the same entries."""
    size, n = (2_000, 100) if tiny else (122_880, 10_000)
    values = rows_of_logits(size)
    on_cpu = platform_of(jax.devices()[0]).on_cpu
    threshold = jax.jit(lambda values: nth_largest(values, n, LastAxis(None, on_cpu)))(values)
    marked, expected = values >= np.asarray(threshold)[:, None], values >= np.sort(values, axis=1)[:, -n, None]
    return {"ok": bool(np.array_equal(marked, expected)), "rows": len(values), "marked": int(marked.sum())}


def loss_case(tiny: bool) -> Result:
    """The chunked loss and its gradients against the dense form, in float32."""
    rows, width, vocabulary, top_n = (48, 32, 300, 20) if tiny else (512, 512, 32_768, 4_096)
    arguments, distillation = inputs(4, rows, width, vocabulary, jnp.float32), distillation_of("mtp_d", top_n)
    mesh = data_mesh(jax.devices()[:1])

    def fused(hidden: Array, unembedding: Array, *rest: Array) -> Array:
        return fused_loss(hidden, unembedding, *rest, distillation=distillation, mesh=mesh)[0]

    def dense(hidden: Array, unembedding: Array, *rest: Array) -> Array:
        return dense_loss(hidden, unembedding, *rest, distillation=distillation, selection="top_k")

    with jax.default_matmul_precision("highest"):
        (value, gradients), (reference, expected) = (
            jax.jit(jax.value_and_grad(form, (0, 1)))(*arguments) for form in (fused, dense)
        )
    errors = [_error(*pair) for pair in zip(gradients, expected, strict=True)]
    largest = max(*errors, abs(float(value) / float(reference) - 1))
    return {"ok": largest < _ROUNDING, "difference": largest}
