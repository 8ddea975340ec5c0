"""What experiments on a pretrained model share: what they are given on the command line, and how rows know it.

The model is a workdir (``mtpd_jax.convert`` makes one of a pretrained model). Rows are known by digests of the model,
the text and the held-out stories, wherever they lie; without ``--workdir`` a page is written anew, from the rows that
there are.
"""

import argparse
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from experiments.sweep.runner import RESULTS
from experiments.sweep.scale import Scale
from mtpd_jax import frontdoor
from mtpd_jax.data.files import File, read_json
from mtpd_jax.editing import change
from mtpd_jax.evaluation.report import write_json
from mtpd_jax.run import open_run
from mtpd_jax.runs.models import backbone_digest

# Beside rows: digests of what they were made from, by experiment.
INPUTS = "inputs.json"
_NAMED = {"backbone": "a workdir", "text": "stories to train on", "held_out": "other stories"}


@dataclasses.dataclass(frozen=True)
class Given:
    """What runs read, and where they lie.

    Attributes:
      backbone, text, held_out: see the flags.
      root: the folder of the runs.
      digests: of the first three.
    """

    backbone: str
    text: str
    held_out: str
    root: pathlib.Path | None
    digests: Mapping[str, str]


def flags_of(name: str, description: str | None, scales: Collection[str]) -> argparse.Namespace:
    """Parses the command line of ``experiments.<name>``.

    Raises:
      ValueError: some of what runs read is named, and not all of it.
    """
    parser = frontdoor.Parser(prog=f"python -m experiments.{name}", description=description)
    parser.add_argument("--scale", required=True, choices=tuple(scales))
    for flag, what in _NAMED.items():
        parser.add_argument(f"--{flag}", help=what)
    parser.add_argument("--workdir", help="the folder that runs are trained in; without it, only the page is written")
    parser.add_argument("--only", type=frontdoor.names, default=[], help="arms to run, separated by commas")
    parser.add_argument("--seeds", type=frontdoor.integers, default=[], help="to run, separated by commas")
    parser.set_defaults(experiment=name)
    flags = parser.parse_args()
    given = {flag: getattr(flags, flag) for flag in (*_NAMED, "workdir")}
    missing = [flag for flag, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(f"--{missing[0]} is missing: expected all of {', '.join(f'--{flag}' for flag in given)}")
    if missing and (flags.only or flags.seeds):
        raise ValueError("--only and --seeds choose what is run: they need --workdir")
    return flags


def given_of(flags: argparse.Namespace, results: pathlib.Path = RESULTS) -> Given:
    """What the flags name, with digests, which are recorded; or, without ``--workdir``, what was recorded.

    Raises:
      ValueError: nothing was.
    """
    file = results / flags.scale / INPUTS
    recorded = read_json(file) if file.exists() else {}
    if flags.workdir is None:
        if flags.experiment not in recorded:
            raise ValueError(f"{file} has no {flags.experiment}: there are no rows; run it with --workdir")
        return Given("-", "-", "-", None, recorded[flags.experiment])
    backbone, text, held_out, root = (
        str(pathlib.Path(path).resolve()) for path in (flags.backbone, flags.text, flags.held_out, flags.workdir)
    )
    pathlib.Path(root).mkdir(parents=True, exist_ok=True)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # runs share most of their programs
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(root) / "compiled"))
    files = {"text": text, "held_out": held_out}
    digests = {
        "backbone": backbone_digest(open_run(backbone).parameters),
        **{name: File(pathlib.Path(path)).digest() for name, path in files.items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(str(file), {**recorded, flags.experiment: digests})
    return Given(backbone, text, held_out, pathlib.Path(root), digests)


def scale_of(name: str, given: Given, config: Callable[[], Any], diff: Mapping[str, Any], **inputs: str) -> Scale:
    """The scale of a name.

    Args:
      name: see above.
      given: what runs read.
      config: makes the base config's tree.
      diff: over that.
      inputs: what else rows are known by.
    """

    def base() -> Any:
        tree = config()
        change(tree, {
            "objective.source": given.backbone, "data.paths": (given.text,), "checkpoint.keep": 1,
            "logging.tensorboard": False, "evaluation.documents": 8, **diff,
        })  # fmt: skip
        return tree

    return Scale(
        name, base, loop_steps=0, texts=32, prompt_tokens=32, new_tokens=96, turns=1, held_out=given.held_out,
        inputs=(*given.digests.items(), *inputs.items()),
    )  # fmt: skip


def write_beginnings(stories: str, path: pathlib.Path, characters: int, number: int) -> None:
    """Writes the first words of a file's stories as prompts, each once."""
    found = (story.strip() for story in pathlib.Path(stories).read_text().split("<|endoftext|>"))
    beginnings = dict.fromkeys(story[:characters].rpartition(" ")[0] for story in found)
    chosen = [beginning for beginning in beginnings if beginning][:number]
    path.write_text("".join(json.dumps({"prompt": beginning}) + "\n" for beginning in chosen))
