"""What a training step costs: joint training by number of heads, looped extension, a recurrent head, standalone MTP.

``python -m experiments.bench.training --scale=cpu --json=FILE``: seconds, memory and FLOPs of the compiled step, and
the FLOPs that the model needs, for the model of an experiments' scale.
"""

import statistics
import sys
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from experiments.bench.timing import interleaved, median_ratio
from experiments.environment import environment
from experiments.sweep.scale import SCALES, Scale
from mtpd_jax import frontdoor
from mtpd_jax.config import Config
from mtpd_jax.data.pipeline import Batch, put_on_devices
from mtpd_jax.evaluation.report import new_table, number, write_json
from mtpd_jax.methods.method import method_of
from mtpd_jax.sharding import batch_sharding, make_mesh
from mtpd_jax.training.optimizer import make_optimizer
from mtpd_jax.training.state import TrainState, abstract_state, state_shardings
from mtpd_jax.training.step import make_step


def cases(scale: Scale, heads: list[int]) -> dict[str, Config]:
    """Configs by name: joint training with each number of heads, each doubled in a loop, the largest recurrent; with
    no heads among them, standalone MTP, too."""
    changes: dict[str, dict[str, Any]] = {f"joint {count}": {"heads.num_heads": count} for count in heads}
    for count in heads:
        if count and 2 * count in heads:
            changes[f"loop {count} to {2 * count}"] = {
                "heads.num_heads": 2 * count, "objective.mode": "extension",
                "objective.source": "-", "objective.frozen_heads": count,
            }  # fmt: skip
    if max(heads) > 1:
        changes[f"recurrent {max(heads)}"] = {"heads.num_heads": max(heads), "heads.kind": "recurrent"}
    if 0 in heads:
        student = {
            "heads.num_heads": 0, "objective.mode": "standalone", "objective.source": "-",
            "model.mask_embedding": True,
        }  # fmt: skip
        changes["standalone, hard"] = student
        changes["standalone, soft"] = {**student, "objective.labels": "distribution"}
        changes["standalone, ground truth"] = {**student, "objective.labels": "data"}
    return {name: scale.changed(change) for name, change in changes.items()}


class CompiledStep:
    """A step for random data, run again and again on its own state."""

    def __init__(self, config: Config):
        self.method = method_of(config, make_mesh(config.mesh))
        optimizer, mesh = make_optimizer(config), self.method.mesh
        abstract = abstract_state(self.method, optimizer)
        training = config.training
        shape = (training.micro_batches, training.batch_size // training.micro_batches, training.sequence_length)
        tokens = np.random.default_rng(0).integers(1, config.model.vocabulary_size, shape).astype(np.int32)
        positions = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
        self._batch = put_on_devices(Batch(tokens, np.ones(shape, np.int32), positions), batch_sharding(mesh))
        step: Any = make_step(self.method, optimizer, state_shardings(abstract))
        self.compiled = step.lower(abstract, self._batch).compile()
        self._abstract: TrainState = abstract
        self._state: TrainState | None = None
        self.tokens = tokens.size

    @property
    def parameters(self) -> Any:
        """Shapes of all that it trains."""
        return self._abstract.parameters

    @property
    def model_flops(self) -> int:
        """What the model needs for a step."""
        return self.method.costs().flops_per_token * self.tokens

    def __call__(self) -> Any:
        if self._state is None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, self._abstract)
            self._state = jax.jit(self._drawn, out_shardings=shardings)()
        self._state, result = self.compiled(self._state, self._batch)
        return result

    def _drawn(self) -> TrainState:
        """Random parameters: of equal ones all logits would be the same, and the search for the largest N at its end.

        Whatever the method starts from; its own initial parameters may be those of a run.
        """

        def draw(path: tuple[Any, ...], leaf: Any) -> jax.Array:
            name = jax.tree_util.keystr(path)
            if not jnp.issubdtype(leaf.dtype, jnp.floating) or name.startswith(".optimizer"):
                return jnp.zeros(leaf.shape, leaf.dtype)
            if "scale" in name:
                return jnp.ones(leaf.shape, leaf.dtype)
            key = jax.random.fold_in(jax.random.key(0), zlib.crc32(name.encode()))
            return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

        return jax.tree_util.tree_map_with_path(draw, self._abstract)


def measure(scale: Scale, heads: list[int], repeats: int) -> list[dict[str, Any]]:
    """One flat row per case."""
    configs = cases(scale, heads)
    steps = {name: CompiledStep(config) for name, config in configs.items()}
    seconds = interleaved(dict(steps), repeats, "training steps")
    base = next(iter(steps))
    rows = []
    for name, step in steps.items():
        memory = step.compiled.memory_analysis()
        rows.append({
            "case": name,
            "heads": configs[name].heads.num_heads,
            "frozen_heads": getattr(configs[name].objective, "frozen_heads", None),
            "tokens": step.tokens,
            "seconds": statistics.median(seconds[name]),
            "seconds_min": min(seconds[name]),
            "seconds_max": max(seconds[name]),
            "over_first": median_ratio(seconds[name], seconds[base]),
            "temp_bytes": memory.temp_size_in_bytes,
            "state_bytes": memory.argument_size_in_bytes,
            "model_flops": step.model_flops,
        })  # fmt: skip
    return rows


def table_of(rows: list[dict[str, Any]]) -> rich.table.Table:
    """One line per case."""
    title = f"a training step of {rows[0]['tokens']:,} tokens; time and FLOPs in those of {rows[0]['case']}"
    figures = ("ms", "tokens/s", "time", "FLOPs", "temp MB", "state MB")
    table = new_table(title, ("case", *figures), left=("case",), whole=figures)
    for row in rows:
        table.add_row(
            row["case"], number(1e3 * row["seconds"], 0), number(row["tokens"] / row["seconds"], 0),
            number(row["over_first"]), number(row["model_flops"] / rows[0]["model_flops"]),
            number(row["temp_bytes"] / 1e6, 0), number(row["state_bytes"] / 1e6, 0),
        )  # fmt: skip
    return table


def main(arguments: list[str]) -> int:
    """Parses flags, measures, prints the table, and writes JSON."""
    parser = frontdoor.Parser(prog="python -m experiments.bench.training", description=__doc__)
    parser.add_argument("--scale", required=True, choices=SCALES, help="whose model, batch and length")
    parser.add_argument("--heads", type=frontdoor.integers, default=[0, 1, 2, 4, 8, 16], help="(default: 0 to 16)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of measuring (default: 9)")
    parser.add_argument("--json", help="write the rows here")
    flags = parser.parse_args(arguments)
    if min(flags.heads) < 0 or flags.repeats < 1:
        raise ValueError(f"--heads={flags.heads} --repeats={flags.repeats}: expected heads from 0, repeats from 1 up")
    frontdoor.check_output_path(flags.json)
    rows = measure(SCALES[flags.scale], sorted(flags.heads), flags.repeats)
    rich.console.Console().print(table_of(rows))
    if flags.json:
        write_json(flags.json, {"environment": environment(), "rows": rows})
    return 0


if __name__ == "__main__":
    frontdoor.guarded(lambda: main(sys.argv[1:]))
