"""Compiling for TPUs that are not here, and reading the compiler's estimate of time.

``libtpu`` compiles for a described topology on any x86-64 Linux machine. It is kept outside the environment's packages
(``make .cache/libtpu``), because where JAX finds it, it looks for a TPU at every start.
"""

import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from mtpd_jax.config import MeshConfig
from mtpd_jax.sharding import make_mesh

LIBRARY = pathlib.Path(__file__).parents[2] / ".cache" / "libtpu" / "libtpu" / "libtpu.so"
# Compile options: libtpu would write gathers and scatters in a form whose text jaxlib cannot read back.
WITHOUT_SPARSECORE = {
    "xla_tpu_offload_gather_to_sparsecore": "false",
    "xla_tpu_enable_offloading_scatter_to_sparsecore": "false",
}
V5P_HERTZ = 1.75e9  # of the clock whose cycles the compiler estimates
_NO_ESTIMATE = 2**63 - 1  # what the compiler writes where it has none


def topology_mesh(name: str = "v5p:2x2x1", fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh (1, fsdp, tensor, 1) over the first devices of a topology, to compile for.

    Raises:
      FileNotFoundError: libtpu is not installed.
    """
    if not LIBRARY.exists():
        raise FileNotFoundError(f"{LIBRARY}: not there; `make .cache/libtpu` installs it")
    described = {
        "TPU_LIBRARY_PATH": str(LIBRARY), "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": name.split(":")[0] + "-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    os.environ.update(described)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    return make_mesh(MeshConfig(data=1, fsdp=fsdp, tensor=tensor, expert=1), list(devices))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of each computation of an HLO module, and the entry's name."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        header = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header:
            name = header.group(2)
            computations[name] = []
            entry = name if header.group(1) else entry
        elif name:
            computations[name].append(line)
    return computations, entry


def estimated_seconds(text: str, trips: tuple[float, ...], hertz: float = V5P_HERTZ) -> float:
    """The compiler's estimate of a module's time, loops counted as often as they run.

    The compiler writes estimated cycles beside each instruction, those of a loop's body once. This walks the module
    from its entry and multiplies a body by its number of trips; of a conditional's branches it takes the cheapest,
    since the loss branches only for what all but never happens. What the compiler has no estimate for, such as a Pallas
    kernel, takes no time.

    Args:
      text: of a compiled TPU module.
      trips: how often a loop at the first, second, … level of nesting runs, where its count is not in the text.
      hertz: of the clock.
    """
    computations, entry = _computations(text)
    word = r"%?([\w.\-]+)"

    def counted(condition: str) -> float | None:
        """How often a loop runs that counts up to a constant."""
        limit = re.search(rf"ROOT .* compare\(.*, {word}\), direction=LT", "\n".join(computations[condition]))
        lines = [line for line in computations[condition] if limit and f"%{limit.group(1)} = " in line]
        number = re.search(r" constant\((\d+)\)", lines[0]) if lines else None
        return float(number.group(1)) if number else None

    def cycles(name: str, depth: int) -> float:
        total = 0.0
        for line in computations[name]:
            estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
            loop = re.search(rf" while\(.*condition={word}, body={word}", line)
            branches = re.search(
                rf"branch_computations={{([^}}]*)}}|true_computation={word}, false_computation={word}", line
            )
            if loop:
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                runs = float(known.group(1)) if known else counted(loop.group(1)) or trips[depth]
                total += runs * cycles(loop.group(2), depth + 1)
            elif branches:
                names = branches.group(1).split(",") if branches.group(1) else branches.groups()[1:]
                total += min(cycles(branch.strip().lstrip("%"), depth) for branch in names)
            elif estimate and int(estimate.group(1)) < _NO_ESTIMATE:
                total += int(estimate.group(1))
        return total

    return cycles(entry, 0) / hertz


def collectives(text: str, in_elements: bool = False) -> list[tuple[str, int]]:
    """Every array that a collective of an HLO module yields: the operation, and the array's bytes.

    Args:
      text: of the module; what is in the body of a loop is listed once.
      in_elements: elements instead of bytes.
    """
    operations = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = []
    # Of an operation in two halves the second yields the result; the first one's also holds its operands.
    for result, operation in re.findall(rf"= (\S.*?) ({operations})(?:-done)?\(", text):
        for bits, shape in re.findall(r"\b[a-z]+(\d*)[a-z\d]*\[([\d,]*)\]", result):
            size = int(np.prod([int(n) for n in shape.split(",") if n]))
            found.append((operation, size if in_elements else size * int(bits or 8) // 8))
    return found


def largest_collective(text: str) -> int:
    """Elements of the largest array that a collective yields; 0 without collectives."""
    return max((size for _, size in collectives(text, in_elements=True)), default=0)


def shapes_of(arguments: tuple[Any, ...], shardings: tuple[Any, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract arguments with shardings, for ``lower``."""
    return tuple(jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s) for a, s in zip(arguments, shardings, strict=True))
