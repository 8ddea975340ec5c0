"""The experiments for a pod: a config file per variant, and the commands in their order."""

import pathlib
import shlex
from collections.abc import Sequence

import rich.console

from experiments.sweep.runs import Run, Variant
from experiments.sweep.scale import Scale


def write_configs(name: str, variants: Sequence[Variant], scale: Scale, root: pathlib.Path) -> None:
    """Writes ``root/<name>/<variant>.py`` for every variant, and ``launch.sh``, which trains them one after the other.

    Raises:
      ValueError: a variant's config cannot be run.
    """
    folder = root / name
    base = scale.base.__module__.rpartition(".")[2]
    commands = []
    for variant in variants:
        run = Run(variant, 0, scale)
        seed = run.config().training.seed
        diff = {"objective.mode": "extension", **variant.diff, "training.seed": seed} if variant.start else variant.diff
        lines = "".join(f"    config.{field} = {value!r}\n" for field, value in diff.items())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{variant.name}.py").write_text(
            f'"""{name}: {variant.name}."""\n\nfrom configs import {base}\n\n\n'
            f"def get_config():\n    config = {base}.get_config()\n{lines}    return config\n"
        )
        flags = [shlex.quote(f"--config={folder / variant.name}.py"), f'--workdir="$RUNS/{variant.name}"']
        flags += [f'--config.objective.source="$RUNS/{variant.start.name}"'] if variant.start else []
        commands.append("python -m mtpd_jax.train " + " ".join(flags))
    script = folder / "launch.sh"
    script.write_text("set -e\n: ${RUNS:?a folder or a bucket (gs://...) for the runs}\n" + "\n".join(commands) + "\n")
    rich.console.Console().print(f"{len(variants)} configs and {script}", soft_wrap=True)
