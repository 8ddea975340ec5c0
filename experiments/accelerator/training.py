"""Training steps of three sizes in bfloat16: tokens per second, MFU, memory, and the largest batch that fits."""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from configs import base, gpu, mtpd_2b
from experiments.accelerator.battery import Case, Piece, Place, Result
from experiments.accelerator.device import Ceilings
from experiments.bench.loss import within_memory
from experiments.bench.timing import interleaved
from experiments.bench.training import CompiledStep
from mtpd_jax.config import Config
from mtpd_jax.editing import change
from mtpd_jax.model.backbone import count_parameters
from mtpd_jax.platform import platform_of
from mtpd_jax.training.feasibility import device_memory

# Of a device's memory that a step may ask for, by the compiler's figures. With more XLA begins to compute things twice.
_SHARE = 0.9
_TRIES = 4
_STEPS = 6


def _one_billion() -> Any:
    """A billion parameters in the 2B config's proportions, with a vocabulary of its own."""
    config = mtpd_2b.get_config()
    config.model.update(vocabulary_size=65_536, width=1536, layers=28, query_heads=12, kv_heads=6, mlp_width=5120)
    config.training.sequence_length = 2048
    return config


def tiny_config() -> Any:
    """A model for a CPU."""
    config = base.get_config()
    config.model.update(
        vocabulary_size=300, width=32, layers=2, query_heads=4, kv_heads=2, head_size=8, mlp_width=48, remat=True
    )
    config.objective.top_n = 20
    config.training.sequence_length = 128
    return config


# By name, and the most rows to look for.
_SIZES: Mapping[str, tuple[Callable[[], Any], int]] = {
    "2b": (mtpd_2b.get_config, 64),
    "1b": (_one_billion, 128),
    "100m": (gpu.get_config, 512),
}
_TINY_SIZES: Mapping[str, tuple[Callable[[], Any], int]] = {"tiny": (tiny_config, 2)}


def config_of(tree: Any, heads: int, rows: int, **changes: Any) -> Config:
    """A size's config with so many heads and rows, on one device."""
    change(tree, {"heads.num_heads": heads, "training.batch_size": rows, "mesh.data": 1, "mesh.fsdp": 1, **changes})
    return Config.build(tree.to_dict())


def memory_of(step: CompiledStep) -> int:
    """Bytes that a step needs on its device: state, batch and what it holds meanwhile."""
    memory = step.compiled.memory_analysis()
    aliased = memory.alias_size_in_bytes  # the state goes out where it came in
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes - aliased


def largest_batch(make: Callable[[int], Config], most: int) -> tuple[int, CompiledStep]:
    """The most rows that fit: as two smaller steps predict it, and as it then compiles and runs.

    Raises:
      ValueError: what was predicted does not fit, nor do several smaller batches.
    """
    few, limit = min(8, most), _SHARE * device_memory(jax.devices()[0], 1)
    small = {rows: CompiledStep(make(rows)) for rows in (1, few)}
    one, more = (memory_of(small[rows]) for rows in (1, few))
    per_row = max(1.0, (more - one) / max(1, few - 1))
    rows = max(1, min(most, int(1 + (limit - one) // per_row)))
    for _ in range(_TRIES):
        step = small[rows] if rows in small else _compiled(make(rows))
        if step is not None and memory_of(step) <= limit and within_memory(functools.partial(_run, step)) is not None:
            return rows, step
        rows = max(1, rows * 4 // 5)
    raise ValueError(f"not even {rows} rows fit into {limit / 2**30:.1f} GiB")


def _compiled(config: Config) -> CompiledStep | None:
    return within_memory(lambda: CompiledStep(config))


def _run(step: CompiledStep) -> Any:
    return jax.block_until_ready(step())


def timed(step: CompiledStep, place: Place) -> dict[str, Any]:
    """Times steps, one after the other as training runs them."""
    taken = interleaved({"": step}, _STEPS, "training steps")[""]
    seconds, ceilings = statistics.median(taken), Ceilings.of(place)
    peak, rate = platform_of(jax.devices()[0]).peak_flops, step.model_flops / seconds
    memory = step.compiled.memory_analysis()
    return {
        "tokens": step.tokens,
        "seconds": seconds,
        "seconds_min": min(taken),
        "seconds_max": max(taken),
        "tokens_per_second": step.tokens / seconds,
        "model_flops": step.model_flops,
        "mfu": rate / peak if peak else None,
        "of_measured_product": ceilings and rate / ceilings.flops,
        "temp_bytes": memory.temp_size_in_bytes,
        "state_bytes": memory.argument_size_in_bytes,
        "bytes": memory_of(step),
    }


def largest(place: Place, size: str, heads: int) -> Result:
    """The step at the largest batch that fits, and at half of it, which may be the faster one."""
    make_tree, most = (_TINY_SIZES if place.tiny else _SIZES)[size]

    def make(rows: int) -> Config:
        return config_of(make_tree(), heads, rows)

    rows, step = largest_batch(make, most)
    found = {
        "size": size,
        "heads": heads,
        "sequence_length": step.method.config.training.sequence_length,
        "parameters": count_parameters(step.parameters),
        "dtype": step.method.model.config.dtype,
        "attention": step.method.model.config.attention,
        "batches": [{"rows": rows, **timed(step, place)}],
    }
    if rows > 1:
        del step  # and its state
        found["batches"].append({"rows": rows // 2, **timed(CompiledStep(make(rows // 2)), place)})
    return found


def attention(place: Place, kernel: str) -> Result:
    """A step of a billion parameters without heads, with one attention kernel or another, at one batch."""
    known = platform_of(jax.devices()[0]).attention_kernels
    if kernel not in known:
        return {"skipped": f"this device has {', '.join(known)}"}
    make_tree, rows = (tiny_config, 2) if place.tiny else (_one_billion, 4)
    step = CompiledStep(config_of(make_tree(), 0, rows, **{"model.attention": kernel}))
    return {"attention": kernel, "rows": rows, "heads": 0, **timed(step, place)}


def cases(place: Place) -> Sequence[Case]:
    """Sizes by heads, the largest first, and the kernels."""
    sizes = _TINY_SIZES if place.tiny else _SIZES
    steps = [
        Case(f"{size}, K={heads}", 300 if size == "2b" else 180, functools.partial(largest, place, size, heads))
        for size in sizes
        for heads in ((1, 0) if place.tiny else (4, 0, 1))
    ]
    kernels = [
        Case(f"attention {kernel}", 90, functools.partial(attention, place, kernel))
        for kernel in ("triton", "cudnn", "splash", "dense")
    ]
    return [*steps[:3], *kernels, *steps[3:]]


def summary(result: Result) -> str:
    """A result in a line."""
    if "skipped" in result:
        return result["skipped"]
    best = max(result.get("batches", [result]), key=lambda row: row["tokens_per_second"])
    mfu = "" if best["mfu"] is None else f", MFU {best['mfu']:.3f}"
    return (
        f"{best['tokens_per_second']:,.0f} tokens/s{mfu}, {best['rows']} rows, {best['bytes'] / 2**30:.2f} GiB, "
        f"attention {result['attention']}"
    )


PIECE = Piece("training", "training steps", cases, summary)
