"""What the device can do at best: products, copies, and how long it takes to be told.

The other pieces hold what they measure against these figures.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.accelerator.battery import Case, Piece, Place, Result, Results
from experiments.bench.timing import interleaved
from mtpd_jax.platform import platform_of

_REPEATS = 7


def seconds_of(step: Callable[[Any, Any], Any], start: Any, other: Any, times: int) -> list[float]:
    """Seconds of one ``state = step(state, other)``, from calls that make ``times`` of them on the device.

    ``other`` is an argument, whose value the compiler does not know: it can make no shorter way of several steps.
    """
    run = jax.jit(lambda state, other: jax.lax.fori_loop(0, times, lambda _, now: step(now, other), state))
    taken = interleaved({"": lambda: run(start, other)}, _REPEATS, "measuring")[""]
    return [seconds / times for seconds in taken]


def product(size: int, times: int) -> Result:
    """Square bfloat16 products: FLOP/s, on data that is not zero, which some devices multiply faster.

    Two to a step of the loop, which may copy what it carries once.
    """
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    right = right * size**-0.5  # so that products keep their size
    taken = [seconds / 2 for seconds in seconds_of(lambda left, right: left @ right @ right, left, right, times)]
    peak = platform_of(jax.devices()[0]).peak_flops
    flops = 2 * size**3 / statistics.median(taken)
    return {
        "size": size,
        "flops_per_second": flops,
        "fastest": 2 * size**3 / min(taken),
        "data_sheet": peak,
        "of_data_sheet": flops / peak if peak else None,
    }


def copy(size: int, times: int) -> Result:
    """Reading and writing an array: bytes per second, both counted."""
    values = jax.random.normal(jax.random.key(0), (size,), jnp.float32)
    taken = seconds_of(jnp.multiply, values, jnp.float32(0.999), times)
    moved = 2 * values.nbytes
    return {"bytes": moved, "bytes_per_second": moved / statistics.median(taken), "fastest": moved / min(taken)}


def launch(times: int) -> Result:
    """How long nothing takes: a call from Python that is waited for, and a step of a loop on the device."""
    call, one = jax.jit(lambda value: value + 1), jnp.float32(0)
    jax.block_until_ready(call(one))
    calls = []
    for _ in range(times):
        begin = time.perf_counter()
        jax.block_until_ready(call(one))
        calls.append(time.perf_counter() - begin)
    steps = seconds_of(jnp.add, one, one, times)
    return {"seconds_per_call": statistics.median(calls), "seconds_per_loop_step": statistics.median(steps)}


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What was measured of the device: FLOP/s of a bfloat16 product, bytes per second of a copy."""

    flops: float
    bandwidth: float

    @classmethod
    def of(cls, place: Place) -> "Ceilings | None":
        """Those of a place, if they were measured."""
        found = Results(place.out, place.tiny).of("device")
        if not {"product", "copy"} <= found.keys():
            return None
        return cls(found["product"]["flops_per_second"], found["copy"]["bytes_per_second"])

    def seconds(self, flops: float, moved: float) -> float:
        """The floor of work that needs so many FLOPs, and to move so many bytes: the longer of the two."""
        return max(flops / self.flops, moved / self.bandwidth)


def cases(place: Place) -> Sequence[Case]:
    """Products, copies, and calls."""
    if place.tiny:
        return [
            Case("product", 1, lambda: product(256, 4)),
            Case("copy", 1, lambda: copy(1 << 20, 4)),
            Case("launch", 1, lambda: launch(16)),
        ]
    return [
        Case("product", 10, lambda: product(8192, 25)),
        Case("copy", 10, lambda: copy(1 << 28, 50)),
        Case("launch", 10, lambda: launch(500)),
    ]


def summary(result: Result) -> str:
    """A result in a line."""
    if "flops_per_second" in result:
        share = f", {100 * result['of_data_sheet']:.0f} % of the data sheet" if result["of_data_sheet"] else ""
        return f"{result['flops_per_second'] / 1e12:.3g} TFLOP/s{share}"
    if "bytes_per_second" in result:
        return f"{result['bytes_per_second'] / 1e9:,.3g} GB/s"
    call, step = (1e6 * result[name] for name in ("seconds_per_call", "seconds_per_loop_step"))
    return f"a call {call:.0f} us, a step of a loop {step:.1f} us"


PIECE = Piece("device", "what the device can do", cases, summary)
