"""What a config needs at least, against what there is: before anything is created, and before anything is compiled.

All sizes are lower bounds, in whole numbers that do not overflow: what is refused cannot run, whatever the compiler
does; what is not refused may still run out of memory.
"""

import contextlib
import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtpd_jax.config import Config, ModelConfig
from mtpd_jax.fields import require
from mtpd_jax.methods.method import Method, method_of
from mtpd_jax.model.attention import knows_documents, lacking
from mtpd_jax.model.layers import compute_dtype
from mtpd_jax.sharding import copies_of, data_mesh, make_mesh, parameter_parts, parts_of
from mtpd_jax.training.state import abstract_parameters

# No device computes faster than this, in FLOP/s; where the device is known, its own peak counts.
_ANY_DEVICE_FLOPS = 1e16
# A core of a CPU: two fused multiply-adds on 16 numbers per cycle, at 4 GHz.
_CORE_FLOPS = 2.56e11
# Where Linux says how much memory a container has.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_YEAR = 365.25 * 24 * 3600
# Batches that exist at once on the host: grain reads so many ahead (see ``data.pipeline``).
_HOST_BATCHES = 4


def check_training(method: Method) -> str:
    """Checks that a run can fit into memory at all.

    Returns:
      What has to be said of the time that it takes; nothing where there is nothing to say.

    Raises:
      ValueError: it needs more memory than a device or the host has, with both numbers; or what is trained is not kept
        in float32.
    """
    config, mesh, costs = method.config, method.mesh, method.costs()
    training, model = config.training, config.model
    numbers = 3 + (config.optimizer.ema_decay is not None)  # a parameter, two moments, and the average
    state = (4 * numbers * costs.trained + _stored_bytes(config) * costs.frozen) // parameter_parts(mesh)
    rows = training.batch_size // training.micro_batches // parts_of(mesh, "batch")
    # With rematerialisation a block keeps its input for the backward pass, and without it more than that.
    activations = 2 * max(rows, 1) * training.sequence_length * model.width * costs.differentiated_blocks
    # A process can ask its own devices only; where it has none, as for a program to compile, the host's memory counts.
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    device, per_host = (own or list(mesh.devices.flat))[0], max(1, len(own))
    limit = device_memory(device, per_host)
    _require(state + activations, limit, f"training on {device.device_kind}", "model, batch_size or sequence_length")
    batches = _HOST_BATCHES * training.batch_size + config.data.shuffle_window
    host = 3 * 4 * batches * training.sequence_length
    _require(host, host_memory(), "reading its batches on the host", "batch_size, sequence_length or shuffle_window")
    _check_weights(method)  # last, for it traces the model
    return _time(method)


def _check_weights(method: Method) -> None:
    """Steps are smaller than what shorter numbers can tell apart."""
    trained, _ = abstract_parameters(method)
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        section = "heads" if jax.tree_util.keystr(path, simple=True, separator="/").startswith("heads/") else "model"
        require(leaf.dtype == jnp.float32, f"{section}.weights", str(leaf.dtype), "float32, for it is trained")


def _stored_bytes(config: Config) -> int:
    """Of a parameter, at least."""
    return min(jnp.dtype(weights).itemsize for weights in (config.model.weights, config.heads.weights))


def _time(method: Method) -> str:
    training, peak, devices = method.config.training, method.platform.peak_flops or _ANY_DEVICE_FLOPS, method.mesh.size
    if method.platform.on_cpu:
        peak, devices = _CORE_FLOPS, os.cpu_count() or 1
    # At the peak of the devices: a bound that no run can be faster than.
    tokens = training.steps * training.batch_size * training.sequence_length
    years = tokens * method.costs().flops_per_token / (peak * devices) / _YEAR
    if years < 1:
        return ""
    return f"{training.steps:,} steps take these devices at least {years:,.1f} years"


def check_attention(method: Method) -> str:
    """Checks that the attention kernel that a config asks for can be used.

    Returns:
      What has to be said where ``auto`` stands for a kernel that cannot; nothing where there is nothing to say.

    Raises:
      ValueError: the devices have no such kernel, or it needs another model or other rows.
    """
    wanted, model = method.config.model.attention, method.model.config
    kernels, length = method.platform.attention_kernels, method.config.training.sequence_length
    missing = lacking(model.attention, model, length)
    if method.draws_attention and knows_documents(model.attention):
        missing = "rows that attend within documents alone, not by a mask of the method's own"
    # Whoever left the choice to us is told what it came to.
    if wanted == "auto":
        return missing and f"attention is dense, for {model.attention} attention needs {missing}"
    allowed = f"{' or '.join(('auto', *kernels))} on {method.platform.kind}"
    require(wanted in kernels, "model.attention", wanted, allowed)
    require(not missing, "model.attention", wanted, f"a kernel that can do it: it needs {missing}")
    return ""


def check_decoding(model: ModelConfig, num_drafts: int, heads: int, rows: int, tokens: int, mesh: Mesh) -> None:
    """Checks that decoding can fit into memory at all.

    Args:
      model: that decodes.
      num_drafts: drafts per round.
      heads: of them, those that have a cache.
      rows: that a copy of the model decodes together.
      tokens: of a row, prompt and continuation.
      mesh: that decodes.

    Raises:
      ValueError: it needs more memory than a device has, with both numbers.
    """
    window = num_drafts + 1
    cache = 2 * 2 * tokens * model.kv_heads * model.head_size * (model.layers + heads)
    logits = 4 * window * model.vocabulary_size
    scores = 4 * window * (tokens + window) * model.query_heads
    needed = rows * (cache + logits + scores) // parameter_parts(mesh)
    _require(needed, device_memory(mesh.devices.flat[0], 1), "decoding", "heads, batch_size or max_new_tokens")


def devices_per_copy(config: Config, devices: Sequence[jax.Device]) -> int:
    """How many devices have to share one copy of a model, to read it and decode with it: as few as it fits on.

    The parameters lie there as they were stored, and once more as decoding lays them out.

    Args:
      config: of the run.
      devices: that there are.

    Raises:
      ValueError: it does not fit on all of them, with both numbers.
    """
    method = method_of(config, data_mesh(list(devices[:1])))
    costs, itemsize = method.costs(), compute_dtype(method.model.config).itemsize
    # As stored, and as laid out; caches come on top, and are checked when it is known what is decoded.
    needed = (_stored_bytes(config) + itemsize) * (costs.trained + costs.frozen)
    limit = device_memory(devices[0], 1)
    fitting = [number for number in _divisors(len(devices)) if needed <= limit * number]
    for number in fitting:
        with contextlib.suppress(ValueError):  # an axis of it that so many devices cannot share evenly
            abstract_parameters(method_of(config, make_mesh(copies_of(number), list(devices))))
            return number
    _require(needed, limit * len(devices), f"reading the model on {len(devices)} devices", "model")
    raise ValueError(f"{fitting} devices could hold the model, but cannot share config.model.kv_heads evenly")


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def check_scoring(batch_size: int, length: int) -> None:
    """Checks that the host can hold a batch of text to score.

    Raises:
      ValueError: it needs more memory than there is, with both numbers.
    """
    _require(3 * 4 * batch_size * length, host_memory(), "a batch of text", "batch_size")


def host_memory() -> int:
    """Bytes that this process may use: those of the machine, or of the container that it runs in."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # A container may have less than its machine.
    for file in _LIMITS:
        path = pathlib.Path(file)
        text = path.read_text().strip() if path.exists() else ""
        if text.isdigit():
            return min(machine, int(text))
    return machine


def device_memory(device: jax.Device, per_host: int) -> int:
    """Bytes that a device has; devices that are the host's own processor share its memory."""
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # a device that is only compiled for has no statistics
        limit = None
    return int(limit) if limit else host_memory() // per_host


def _require(needed: int, there: int, what: str, fields: str) -> None:
    if needed > there:
        raise ValueError(
            f"{what} needs more than {_gib(needed)} GiB of memory, and there are {_gib(there)} GiB; "
            f"take a smaller {fields}"
        )


def _gib(size: int) -> str:
    """Tenths are whole numbers, too: there are sizes that no float can hold."""
    return f"{size // 2**30:,}.{size % 2**30 * 10 // 2**30}"
