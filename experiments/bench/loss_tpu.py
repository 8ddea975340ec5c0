"""The loss compiled for a TPU topology that need not be here: memory, FLOPs, collectives and estimated time.

Programs: MTP-D and plain MTP on one chip; MTP-D with rows sharded over fsdp and with the vocabulary over tensor; and
the dense form with ``lax.top_k``, which is refused. The compiler counts the body of a loop once, its estimate and its
FLOPs alike. Both are multiplied here by how often the loops run: chunks by the shapes, the search for the N-th largest
logit by running it on normal logits (the slowest row of a chunk decides).
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.table
from jax.sharding import Mesh, NamedSharding

from experiments.bench.loss_forms import compile_form, distillation_of, inputs
from experiments.bench.tpu import estimated_seconds, largest_collective, shapes_of, topology_mesh
from mtpd_jax import frontdoor
from mtpd_jax.evaluation.report import new_table, number, write_json
from mtpd_jax.losses.fused import choose_tiling
from mtpd_jax.losses.select import search
from mtpd_jax.sharding import RULES, LastAxis, parts_of

# Rows of the chunk on which passes are counted here; every row is searched alike.
COUNTED_ROWS = 256


def search_passes(vocabulary: int, top_n: int) -> int:
    """Passes over the logits that the search makes for the slowest of ``COUNTED_ROWS`` normal rows."""
    logits = 3 * jax.random.normal(jax.random.key(0), (COUNTED_ROWS, vocabulary))
    return int(jax.jit(lambda logits: search(logits, top_n, LastAxis(None, on_cpu=False))[1])(logits))


def compile_on(
    mesh: Mesh, rows: int, heads: int, width: int, vocabulary: int, top_n: int, objective: str, form: str = "fused"
) -> jax.stages.Compiled:
    """The loss and its gradients for ``rows`` rows per group of chips that share rows, in bfloat16."""
    distillation = distillation_of(objective, top_n)
    groups = parts_of(mesh, "batch")
    arguments = jax.eval_shape(lambda: inputs(heads, rows, width, vocabulary, jnp.bfloat16))
    with_rows = [
        jax.ShapeDtypeStruct((*a.shape[:axis], groups, *a.shape[axis + 1 :]), a.dtype)
        for a, axis in zip((arguments[0], arguments[2], arguments[3]), (1, 0, 1), strict=True)
    ]
    arguments = with_rows[0], arguments[1], with_rows[1], with_rows[2], *arguments[4:]
    axes = (None, "batch"), ("vocabulary", "width"), ("batch",), (None, "batch"), (), ()
    specs = (RULES.spec(*one) for one in axes)
    shapes = shapes_of(arguments, tuple(NamedSharding(mesh, spec) for spec in specs))
    return compile_form(form, shapes, distillation, mesh=mesh)


def report(topology: str, rows: int, heads: int, width: int, vocabulary: int, top_n: int) -> list[dict[str, Any]]:
    """One entry per program."""
    passes = search_passes(vocabulary, top_n)
    programs = [
        ("one chip", "fused", "mtp_d", 1, 1),
        ("one chip", "fused", "mtp", 1, 1),
        ("rows over 4", "fused", "mtp_d", 4, 1),
        ("tokens over 4", "fused", "mtp_d", 1, 4),
        ("one chip", "dense_top_k", "mtp_d", 1, 1),
    ]
    found = []
    for name, form, objective, fsdp, tensor in programs:
        mesh = topology_mesh(topology, fsdp, tensor)
        entry: dict[str, Any] = {"program": name, "form": form, "objective": objective, "passes": passes}
        try:
            compiled = compile_on(mesh, rows, heads, width, vocabulary, top_n, objective, form)
        except jax.errors.JaxRuntimeError as error:
            found.append({**entry, "refused": str(error).splitlines()[0][:300]})
            continue
        local = vocabulary // tensor
        chunks = -(-rows // choose_tiling(rows, heads + 1, local, width, None, on_cpu=False).chunk_rows)
        text, costs, memory = compiled.as_text(), compiled.cost_analysis(), compiled.memory_analysis()
        assert text and costs and memory  # a TPU's compiler gives all three
        share = 3 * 2 * (heads + 1) * rows * local * width
        found.append(
            {
                **entry,
                "chunks": chunks,
                "temp_bytes": memory.temp_size_in_bytes,
                "flops": costs["flops"] * chunks,
                "flops_over_share": costs["flops"] * chunks / share,
                "largest_collective": largest_collective(text),
                "hidden_gradient": (heads + 1) * rows * width,
                "estimated_seconds": estimated_seconds(text, (chunks, passes)),
            }
        )
    return found


def main(arguments: list[str]) -> int:
    """Parses flags, compiles, prints the table and writes JSON."""
    parser = frontdoor.Parser(prog="python -m experiments.bench.loss_tpu", description=__doc__)
    parser.add_argument("--topology", default="v5p:2x2x1", help="default: v5p:2x2x1, four chips")
    for name, default in (("rows", 8192), ("heads", 4), ("width", 2048), ("vocabulary", 122_880), ("top_n", 10_000)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--json", help="write the rows here")
    flags = parser.parse_args(arguments)
    frontdoor.check_output_path(flags.json)
    found = report(flags.topology, flags.rows, flags.heads, flags.width, flags.vocabulary, flags.top_n)
    plain = next(entry["estimated_seconds"] for entry in found if entry["objective"] == "mtp")
    table = new_table(
        f"{flags.topology}, {flags.rows} rows per chip, bfloat16, {found[0]['passes']} passes of the search",
        ("program", "loss", "temp GiB", "FLOPs / share", "largest collective", "estimate ms", "x mtp"),
    )
    for entry in found:
        if "refused" in entry:
            table.add_row(f"{entry['program']}, {entry['form']}", entry["objective"], "refused", "", "", "", "")
            continue
        table.add_row(
            entry["program"], entry["objective"],
            number(entry["temp_bytes"] / 2**30), number(entry["flops_over_share"]),
            f"{entry['largest_collective']:,}", number(1e3 * entry["estimated_seconds"], 1),
            number(entry["estimated_seconds"] / plain),
        )  # fmt: skip
    console = rich.console.Console()
    console.print(table)
    for entry in found:
        if "refused" in entry:
            console.print(f"{entry['form']}: {entry['refused']}", highlight=False)
    if flags.json:
        write_json(flags.json, {"topology": flags.topology, "jax": jax.__version__, "rows": found})
    return 0


if __name__ == "__main__":
    frontdoor.guarded(lambda: main(sys.argv[1:]))
