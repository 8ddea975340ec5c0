"""A training step compiled for TPUs that are not here, by attention kernel: its memory, and an estimate of its time.

``python -m experiments.bench.attention_tpu --json=FILE``: the 2B model of ``configs/mtpd_2b.py`` on 16 v5p chips, four
rows of 4,096 tokens each. The compiler estimates no time for kernels written in Pallas: theirs is counted from their
products at the chip's peak, which is a lower bound. Neither has it one for the dense form's scores in the forward pass;
these count as nothing, so that the dense step's time is a lower bound, too.
"""

import sys
import time
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

from configs import mtpd_2b
from experiments.bench.loss_tpu import search_passes
from experiments.bench.tpu import WITHOUT_SPARSECORE, estimated_seconds, topology_mesh
from experiments.environment import environment
from mtpd_jax import frontdoor
from mtpd_jax.config import Config
from mtpd_jax.data.pipeline import Batch
from mtpd_jax.editing import change
from mtpd_jax.evaluation.report import new_table, number, write_json
from mtpd_jax.losses.fused import choose_tiling
from mtpd_jax.losses.objective import HeadsObjectiveConfig
from mtpd_jax.methods.method import Method, method_of
from mtpd_jax.sharding import batch_sharding, parts_of
from mtpd_jax.training.optimizer import make_optimizer
from mtpd_jax.training.state import abstract_state, state_shardings
from mtpd_jax.training.step import make_step

# Products over all scores that splash attention makes of a block: two forward, again when the block is recomputed, and
# three and four in its two backward kernels.
_SPLASH_PRODUCTS = 2 + 2 + 3 + 4


def method_for(attention: str, topology: str, fsdp: int, rows: int, heads: int) -> Method:
    """The 2B config's method on a topology, for so many rows per chip."""
    tree = mtpd_2b.get_config()
    changes = {"model.attention": attention, "training.batch_size": rows * fsdp, "heads.num_heads": heads}
    change(tree, changes)
    return method_of(Config.build(tree.to_dict()), topology_mesh(topology, fsdp))


def compile_step(method: Method) -> jax.stages.Compiled:
    """The training step for abstract arguments."""
    training, optimizer = method.config.training, make_optimizer(method.config)
    state, sharding = abstract_state(method, optimizer), batch_sharding(method.mesh)
    shape = (training.micro_batches, training.batch_size // training.micro_batches, training.sequence_length)
    batch = Batch(*[jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding) for _ in range(3)])
    step: Any = make_step(method, optimizer, state_shardings(state))
    return step.lower(state, batch).compile(compiler_options=WITHOUT_SPARSECORE)


def _top_n(method: Method) -> int:
    objective = method.config.objective
    assert isinstance(objective, HeadsObjectiveConfig)  # as the 2B config's is
    return objective.top_n


def kernel_seconds(method: Method) -> float:
    """What the products of the splash kernels take a chip at least, for all blocks of a step."""
    config, model = method.config, method.model.config
    if model.attention != "splash":
        return 0.0
    rows = config.training.batch_size // parts_of(method.mesh, "batch")
    scores = model.query_heads * config.training.sequence_length**2 / 2  # below the diagonal
    flops = 2 * rows * scores * model.head_size * _SPLASH_PRODUCTS * (model.layers + config.heads.num_heads)
    assert method.platform.peak_flops is not None  # a chip of a topology is known
    return flops / method.platform.peak_flops


def measure(method: Method) -> dict[str, Any]:
    """One row."""
    begin = time.perf_counter()
    compiled = compile_step(method)
    config, model = method.config, method.config.model
    rows = config.training.batch_size * config.training.sequence_length // parts_of(method.mesh, "batch")
    tiling = choose_tiling(rows, config.heads.num_heads + 1, model.vocabulary_size, model.width, None, on_cpu=False)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text and memory  # a TPU's compiler gives both
    passes = search_passes(model.vocabulary_size, _top_n(method))
    estimate = estimated_seconds(text, (-(-rows // tiling.chunk_rows), passes))
    kernels = kernel_seconds(method)
    return {
        "attention": method.model.config.attention,
        "dtype": method.model.config.dtype,
        "temp_bytes": memory.temp_size_in_bytes,
        "state_bytes": memory.argument_size_in_bytes,
        "estimated_seconds": estimate + kernels,
        "kernel_seconds": kernels,
        "needed_seconds": method.costs().flops_per_token * rows / (method.platform.peak_flops or 1),
        "compile_seconds": time.perf_counter() - begin,
    }


def main(arguments: list[str]) -> int:
    """Parses flags, compiles, prints the table and writes JSON."""
    parser = frontdoor.Parser(prog="python -m experiments.bench.attention_tpu", description=__doc__)
    parser.add_argument("--topology", default="v5p:2x2x4", help="default: v5p:2x2x4, sixteen chips")
    parser.add_argument("--fsdp", type=int, default=16, help="chips that share the parameters (default: 16)")
    parser.add_argument("--rows", type=int, default=4, help="of 4,096 tokens, per chip (default: 4)")
    parser.add_argument("--heads", type=int, default=4, help="multi-token-prediction heads (default: 4)")
    parser.add_argument("--json", help="write the rows here")
    flags = parser.parse_args(arguments)
    frontdoor.check_output_path(flags.json)
    rows = [
        measure(method_for(attention, flags.topology, flags.fsdp, flags.rows, flags.heads))
        for attention in ("dense", "splash")
    ]
    columns = ("attention", "temp GiB", "state GiB", "estimate s", "of it kernels s", "needed s", "compile s")
    title = f"2B training step, {flags.heads} heads, {flags.topology}, {flags.rows} rows per chip"
    table = new_table(title, columns, left=("attention",))
    for row in rows:
        table.add_row(
            row["attention"], number(row["temp_bytes"] / 2**30), number(row["state_bytes"] / 2**30),
            number(row["estimated_seconds"]), number(row["kernel_seconds"]), number(row["needed_seconds"]),
            number(row["compile_seconds"], 0),
        )  # fmt: skip
    rich.console.Console().print(table)
    if flags.json:
        write_json(flags.json, {"environment": environment(), "topology": flags.topology, "rows": rows})
    return 0


if __name__ == "__main__":
    frontdoor.guarded(lambda: main(sys.argv[1:]))
