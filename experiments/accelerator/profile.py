"""Where the time of a training step and of a decoding round goes, kernel by kernel, by the profiler's own clock."""

import collections
import functools
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from configs import gpu
from experiments.accelerator.battery import Case, Piece, Place, Result
from experiments.accelerator.decoding import subject_of
from experiments.accelerator.training import config_of, tiny_config
from experiments.bench.decode_programs import Parts
from experiments.bench.training import CompiledStep
from mtpd_jax.decoding.network import Network
from mtpd_jax.platform import platform_of

# A trace that is larger is not kept: only what is said of it.
_MOST_BYTES = 6 << 20
_SHOWN = 25
_ROUNDS = 16
# Kernels that are launched together, as a graph, do not say in a trace which operation they are of.
_ONE_BY_ONE = "--xla_gpu_enable_command_buffer="
# Kernels that others run in.
_AROUND = ("while", "call", "conditional")
# What of a name says where in the model a kernel belongs; the first that is found counts, part by part.
_PHASES = ("draft", "verify", "accept", "optimizer", "loss")
_PLACES = {"heads": ("heads", "head"), "backbone": ("backbone", "blocks")}
_PARTS = ("attention", "mlp", "projection")


def place_of(name: str) -> str:
    """Where in the model a kernel belongs, from the name that JAX gives its operation: ``verify backbone mlp``."""
    words = set(re.split(r"[/().]", name))
    phase = next((phase for phase in _PHASES if phase in words), None)
    place = next((place for place, any_of in _PLACES.items() if words & set(any_of)), None)
    part = next((part for part in _PARTS if part in words), None)
    backward = "backward" if "transpose(" in name else None  # of a function; the operation has no bracket
    return " ".join(filter(None, (phase, place, part, backward))) or "other"


def kernels_of(trace: pathlib.Path) -> Iterator[tuple[str, float, float]]:
    """Every kernel of a trace that ran on the device: the name of its operation, and when it began and ended, in ns."""
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and "CUSTOM" not in plane.name]
    for plane in devices or (planes if jax.default_backend() == "cpu" else []):
        lines = list(plane.lines)
        if devices:
            # A GPU's kernels lie on its streams, a TPU's operations in one line of their own.
            streams = [line for line in lines if line.name.startswith("Stream")]
            lines = streams or [line for line in lines if line.name == "XLA Ops"]
        for line in lines:
            for event in line.events:
                name = str(dict(event.stats).get("hlo_op", event.name if devices else ""))
                if name and not name.startswith(_AROUND):
                    yield name, event.start_ns, event.end_ns


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """How much of the time lies in at least one of the spans."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def profiled(run: Callable[[], Any], text: str, name: str, place: Place, steps: int) -> Result:
    """Runs something under the profiler.

    Args:
      run: makes one call.
      text: of its compiled module, which says where in the model each operation belongs.
      name: of the trace's file.
      place: where it goes.
      steps: what a call makes so many of.

    Returns:
      Seconds of a step by the clock, the share of the time in which the device did nothing, and seconds of a step by
      place in the model and by kernel.

    Raises:
      ValueError: the profiler saw no kernel.
    """
    jax.block_until_ready(run())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds = (time.perf_counter() - start) / steps
        kernels = list(kernels_of(next(pathlib.Path(folder).rglob("*.xplane.pb"))))
        if not kernels:
            raise ValueError("the profiler saw no kernel of the device: may it be that this user may not profile?")
        trace = next(pathlib.Path(folder).rglob("*.trace.json.gz"))
        kept = trace.stat().st_size <= _MOST_BYTES
        if kept:
            shutil.copy(trace, place.out / f"profile-{name}.trace.json.gz")
    named = dict(re.findall(r'%?([\w.\-]+) = .*metadata={[^}]*op_name="([^"]*)"', text))
    by_place: dict[str, float] = collections.defaultdict(float)
    by_kernel: dict[str, float] = collections.defaultdict(float)
    for kernel, begin, end in kernels:
        by_place[place_of(named.get(kernel, ""))] += (end - begin) / steps / 1e9
        by_kernel[kernel] += (end - begin) / steps / 1e9
    largest = sorted(by_kernel, key=by_kernel.__getitem__, reverse=True)[:_SHOWN]
    return {
        "seconds": seconds,
        "idle": 1 - covered([(begin, end) for _, begin, end in kernels]) / steps / 1e9 / seconds,
        "kernels": len(kernels) // steps,
        "trace": f"profile-{name}.trace.json.gz" if kept else None,
        "by_place": dict(sorted(by_place.items(), key=lambda item: -item[1])),
        "by_kernel": [{"kernel": k, "operation": named.get(k, ""), "seconds": by_kernel[k]} for k in largest],
    }


def training_step(place: Place) -> Result:
    """A step of a hundred million parameters with four heads."""
    tree, heads, rows = (tiny_config(), 1, 2) if place.tiny else (gpu.get_config(), 4, 64)
    step = CompiledStep(config_of(tree, heads, rows))
    return profiled(step, step.compiled.as_text() or "", "training", place, steps=1)


def decoding_round(place: Place) -> Result:
    """A round of one prompt with four heads, of several in a row."""
    heads = 1 if place.tiny else 4
    subject = subject_of("130m", place, heads)
    network = Network(subject.model, platform_of(jax.devices()[0]))
    parts = Parts(network, jax.jit(network.parameters)(subject.parameters), 1, 64, 128)
    program = parts.round(heads)
    return profiled(lambda: program(_ROUNDS), program.compiled.as_text() or "", "decoding", place, steps=_ROUNDS)


def cases(place: Place) -> Sequence[Case]:
    """Both."""
    return [
        Case("training step", 90, functools.partial(training_step, place), flags=_ONE_BY_ONE),
        Case("decoding round", 90, functools.partial(decoding_round, place), flags=_ONE_BY_ONE),
    ]


def summary(result: Result) -> str:
    """A result in a line."""
    total = sum(result["by_place"].values()) or 1.0
    shown = [f"{name} {100 * seconds / total:.0f} %" for name, seconds in list(result["by_place"].items())[:6]]
    return f"{1e3 * result['seconds']:.3g} ms, idle {100 * result['idle']:.0f} %; " + ", ".join(shown)


PIECE = Piece("profile", "where the time goes", cases, summary)
