"""The command line of an experiment: run what is missing, then write tables and figure from the rows."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax

from experiments.sweep.arms import Arm
from experiments.sweep.paper import write_configs
from experiments.sweep.report import Report, write
from experiments.sweep.rows import Row, read_rows
from experiments.sweep.runner import RESULTS, Code, Sweep
from experiments.sweep.runs import Run, Variant
from experiments.sweep.scale import SCALES, Scale
from mtpd_jax import frontdoor
from mtpd_jax.training.state import DivergedError


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One module's experiment.

    Attributes:
      name: of the module, and of its files of results.
      variants: its arms at a scale.
      report: from the arms that have rows, by name.
      seeds: of every arm, unless the command line says otherwise.
    """

    name: str
    variants: Callable[[Scale], Sequence[Variant]]
    report: Callable[[Mapping[str, Arm], Scale], Report]
    seeds: Sequence[int] = (0, 1, 2)


def arms_of(rows: Sequence[Row], variants: Sequence[Variant], scale: Scale) -> dict[str, Arm]:
    """The variants' rows, one per seed; of rows of several code versions the newest."""
    arms = {}
    for variant in variants:
        key = Run(variant, 0, scale).key()
        by_seed = {row.seed: row for row in rows if row.config == key}
        if by_seed:
            arms[variant.name] = Arm(variant.name, [by_seed[seed] for seed in sorted(by_seed)])
    return arms


def run(
    experiment: Experiment,
    scale: Scale,
    root: pathlib.Path | None,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    results: pathlib.Path = RESULTS,
    code: Code | None = None,
) -> None:
    """Runs what is missing of an experiment, and writes its report.

    Args:
      experiment, scale: what to run, and how large.
      root: the folder that runs are trained in; None: only write the report.
      only: names of variants to run; none: all.
      seeds: to run; none: the experiment's.
      results: the folder of rows and reports.
      code: that trains; None: this.

    Raises:
      ValueError: an unknown variant, or no row to report.
      DivergedError: runs whose loss became infinite, once all else is done.
    """
    code, variants = code or Code(), experiment.variants(scale)
    unknown = sorted(set(only) - {variant.name for variant in variants})
    if unknown:
        raise ValueError(f"--only={unknown[0]}: expected some of {', '.join(variant.name for variant in variants)}")
    diverged = []
    if root is not None:
        chosen = [variant for variant in variants if not only or variant.name in only]
        # A seed is finished with all variants before the next begins: every comparison grows by whole pairs.
        runs = [
            Run(variant, seed, scale)
            for seed in seeds or experiment.seeds
            for variant in chosen
            if seeds or variant.seeds is None or seed in variant.seeds
        ]
        diverged = Sweep(experiment.name, runs, code, root, results).run()
    path = results / scale.name / f"{experiment.name}.jsonl"
    arms = arms_of(read_rows(path), variants, scale)
    if not arms:
        raise ValueError(f"{path}: holds no row of this experiment; run it with --workdir")
    command = f"python -m experiments.{experiment.name} --scale={scale.name} --workdir=DIR"
    families = sorted({Run(variant, 0, scale).family for variant in variants})
    version = " ".join(map(code.version, families))
    write(experiment.report(arms, scale), arms, path.with_suffix(".md"), command, version)
    if diverged:
        raise DivergedError("; ".join(diverged))


def main(experiment: Experiment, description: str | None) -> int:
    """Parses the flags, runs."""
    parser = frontdoor.Parser(prog=f"python -m experiments.{experiment.name}", description=description)
    parser.add_argument("--workdir", help="the folder that runs are trained in; without it, only the report is written")
    parser.add_argument(
        "--scale", required=True, choices=SCALES, help="cpu: two cores; gpu: one accelerator; paper: writes configs"
    )
    parser.add_argument("--only", type=frontdoor.names, default=[], help="variants to run, separated by commas")
    parser.add_argument("--seeds", type=frontdoor.integers, default=[], help="to run, separated by commas")
    flags = parser.parse_args()
    scale, root = SCALES[flags.scale], pathlib.Path(flags.workdir).resolve() if flags.workdir else None
    if "://" in (flags.workdir or ""):
        raise ValueError(f"--workdir={flags.workdir}: expected a local folder")
    if (flags.only or flags.seeds) and (root is None or scale.name == "paper"):
        raise ValueError("--only and --seeds choose what is run: they need --workdir, and a scale that is run here")
    if scale.name == "paper":
        if root is None:
            raise ValueError("--workdir is missing: where to write the configs")
        write_configs(experiment.name, experiment.variants(scale), scale, root)
        return 0
    if root is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # runs share most of their programs
        jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))
    run(experiment, scale, root, flags.only, flags.seeds)
    return 0
