"""Post-hoc heads on a frozen backbone (Electronics 15(7):1533): what they learn from, on what, in how many stages.

``python -m experiments.posthoc --scale=stories_656k --backbone=DIR --text=FILE --held_out=FILE --workdir=DIR``: KL on
the backbone's distribution against LM loss on the data; text against the backbone's own generations; a long first stage
alone, a short one alone, or both; a cascade, a recurrent head, and one with a shared cache. ``--scale=stories_19m``
varies one thing at a time around a main arm, on a larger backbone.

The backbone is a workdir (``mtpd_jax.convert`` makes one of a pretrained model). Its own generations are written first:
how it goes on after beginnings of stories of the text. Figures are of other stories, those of ``--held_out``. Without
``--workdir`` the page is written anew, from the rows that are there.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from configs import posthoc as config_file
from experiments.posthoc_report import SEEDS, report
from experiments.sweep.experiment import Experiment, run
from experiments.sweep.runner import RESULTS, locked
from experiments.sweep.runs import Variant
from experiments.sweep.scale import Scale
from mtpd_jax import corpus, frontdoor
from mtpd_jax.data.files import File, read_json
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.editing import change
from mtpd_jax.evaluation.report import write_json
from mtpd_jax.run import open_run
from mtpd_jax.runs.models import backbone_digest

KINDS = {
    "recurrent": {"heads.kind": "recurrent", "heads.cache": "per_depth"},
    "shared": {"heads.kind": "recurrent", "heads.cache": "shared"},
    "cascade": {"heads.kind": "cascade", "heads.cache": "per_depth"},
}
LOSSES = {"kl": {}, "lm": {"objective.alpha": 1 / 3, "objective.beta": 0.0}}
# Beginnings of held-out stories that are written for measuring. Our choice.
_HELD_OUT = 64
# The other seeds are of what is compared; these of what is only shown.
_ONCE = (0,)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is trained at a scale.

    Attributes:
      learning_rate: at the peak; a tenth of it in a second stage.
      generations: beginnings of stories that the backbone goes on with.
      pre, fine: optimizer steps of a first, and of a short stage.
      batch: rows per step.
      characters: of a beginning.
      written: tokens that the backbone goes on with, at most, at temperature 1.
    """

    learning_rate: float
    generations: int
    pre: int = 400
    fine: int = 100
    batch: int = 4
    characters: int = 100
    written: int = 192


SIZES = {
    "stories_656k": Sizes(learning_rate=1e-2, generations=3000),
    "stories_19m": Sizes(learning_rate=4e-3, generations=1500),
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the arms read: backbone, text, and the folder of the backbone's own generations."""

    backbone: str
    text: str
    generations: str

    def of(self, data: str) -> dict[str, Any]:
        """The fields of a config that name the data of an arm."""
        if data == "text":
            return {"data.source": "text", "data.paths": (self.text,)}
        return {"data.source": "generations", "data.path": self.generations}


def arm(
    inputs: Inputs, sizes: Sizes, kind: str, loss: str, stage: str, data: str, seeds: Sequence[int] | None = None
) -> Variant:
    """One arm.

    Args:
      inputs, sizes: of the scale.
      kind: of ``KINDS``.
      loss: of ``LOSSES``.
      stage: ``pre``, a long first stage; ``fine``, a short one; ``both``, one on text and then the other.
      data: ``text`` or ``own``: of the only stage, or of the second.
      seeds: see ``Variant``.
    """
    name, of_seeds = f"{kind} {loss} {stage} {data}", None if seeds is None else tuple(seeds)
    diff = {**KINDS[kind], **LOSSES[loss], **inputs.of(data), "heads.num_heads": 3}
    if stage == "pre":
        steps = {"training.steps": sizes.pre, "optimizer.learning_rate": sizes.learning_rate}
        return Variant(name, {**diff, **steps, "objective.source": inputs.backbone}, seeds=of_seeds)
    rate = sizes.learning_rate * (0.1 if stage == "both" else 1.0)
    short = {"training.steps": sizes.fine, "optimizer.learning_rate": rate, "optimizer.warmup_steps": sizes.fine // 10}
    short["evaluation.every_steps"] = sizes.fine
    if stage == "fine":
        return Variant(name, {**diff, **short, "objective.source": inputs.backbone}, seeds=of_seeds)
    first = arm(inputs, sizes, kind, loss, "pre", "text")
    second = {"objective.mode": "posthoc", "objective.initial_heads": "source"}
    return Variant(name, {**diff, **short, **second}, start=first, seeds=of_seeds)


def whole_matrix(inputs: Inputs, sizes: Sizes) -> list[Variant]:
    """Every kind with every loss, stage and kind of data."""
    return [
        arm(inputs, sizes, kind, loss, stage, data)
        for kind in KINDS
        for loss in LOSSES
        for stage in ("pre", "fine", "both")
        for data in ("text", "own")
    ]


def one_at_a_time(inputs: Inputs, sizes: Sizes) -> list[Variant]:
    """The main arm, a shared cache that learns the backbone's distribution on text, and one thing changed at a time."""
    make = functools.partial(arm, inputs, sizes)
    return [
        make("shared", "kl", "pre", "text"),
        make("shared", "lm", "pre", "text"),
        make("shared", "kl", "pre", "own"),
        make("recurrent", "kl", "pre", "text", _ONCE),
        make("cascade", "kl", "pre", "text", _ONCE),
        make("shared", "kl", "fine", "text", _ONCE),
        make("shared", "kl", "both", "text", _ONCE),
        make("shared", "kl", "both", "own", _ONCE),
    ]


MATRICES: dict[str, Callable[[Inputs, Sizes], list[Variant]]] = {
    "stories_656k": whole_matrix,
    "stories_19m": one_at_a_time,
}


def write_beginnings(stories: str, path: pathlib.Path, characters: int, number: int) -> None:
    """Writes the first words of a file's stories as prompts, each once."""
    found = (story.strip() for story in pathlib.Path(stories).read_text().split("<|endoftext|>"))
    beginnings = dict.fromkeys(story[:characters].rpartition(" ")[0] for story in found)
    chosen = [beginning for beginning in beginnings if beginning][:number]
    path.write_text("".join(json.dumps({"prompt": beginning}) + "\n" for beginning in chosen))


def write_generations(backbone: str, text: str, root: pathlib.Path, sizes: Sizes) -> str:
    """Has the backbone go on with beginnings of the text, or with those that it has not yet.

    Returns:
      The folder of what it wrote.
    """
    folder, prompts = root / "generations", root / "beginnings.jsonl"
    with locked(root / "generations.lock"):
        write_beginnings(text, prompts, sizes.characters, sizes.generations)
        corpus.run(
            backbone, str(prompts), str(folder), max_new_tokens=sizes.written, sampling=Sampling(1.0), batch_size=32
        )
    return str(folder)


def scale_of(name: str, inputs: Inputs, held_out: str, digests: dict[str, str]) -> Scale:
    """The scale of a name, with its base config and what runs read.

    Args:
      name: of ``SIZES``.
      inputs: where it lies.
      held_out: the file of the stories that figures are of.
      digests: of backbone, text and held-out stories, by which rows are known.
    """
    sizes = SIZES[name]

    def base() -> Any:
        tree = config_file.get_config()
        change(tree, {
            "objective.source": inputs.backbone, "data.paths": (inputs.text,), "training.batch_size": sizes.batch,
            "training.steps": sizes.pre, "checkpoint.keep": 1, "checkpoint.every_steps": sizes.pre,
            "logging.tensorboard": False, "evaluation.every_steps": sizes.pre // 4, "evaluation.documents": 8,
        })  # fmt: skip
        return tree

    of_generations = f"{sizes.generations} x {sizes.characters} characters, {sizes.written} tokens"
    return Scale(
        name, base, loop_steps=0, texts=32, prompt_tokens=32, new_tokens=96, turns=1, held_out=held_out,
        inputs=(*digests.items(), ("generations", of_generations)),
    )  # fmt: skip


def digests_of(backbone: str, text: str, held_out: str) -> dict[str, str]:
    """Digests of what the arms read, wherever it lies."""
    files = {"text": text, "held_out": held_out}
    parameters = open_run(backbone).parameters
    return {
        "backbone": backbone_digest(parameters),
        **{name: File(pathlib.Path(path)).digest() for name, path in files.items()},
    }


def main() -> int:
    """Parses the flags, runs."""
    parser = frontdoor.Parser(prog="python -m experiments.posthoc", description=__doc__)
    parser.add_argument("--scale", required=True, choices=tuple(SIZES))
    names = ("backbone", "text", "held_out")
    for name, what in zip(names, ("a workdir", "stories to train on", "other stories"), strict=True):
        parser.add_argument(f"--{name}", help=what)
    parser.add_argument("--workdir", help="the folder that runs are trained in; without it, only the page is written")
    parser.add_argument("--only", type=frontdoor.names, default=[], help="arms to run, separated by commas")
    parser.add_argument("--seeds", type=frontdoor.integers, default=[], help="to run, separated by commas")
    flags = parser.parse_args()
    given = {name: getattr(flags, name) for name in (*names, "workdir")}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(f"--{missing[0]} is missing: expected all of {', '.join(f'--{name}' for name in given)}")
    if missing and (flags.only or flags.seeds):
        raise ValueError("--only and --seeds choose what is run: they need --workdir")
    _run(flags.scale, {} if missing else given, flags.only, flags.seeds)
    return 0


def _run(name: str, given: dict[str, str], only: Sequence[str], seeds: Sequence[int]) -> None:
    sizes, recorded = SIZES[name], RESULTS / name / "inputs.json"
    if given:
        backbone, text, held_out, work = (str(pathlib.Path(path).resolve()) for path in given.values())
        root = pathlib.Path(work)
        root.mkdir(parents=True, exist_ok=True)
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # runs share most of their programs
            jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))
        inputs = Inputs(backbone, text, write_generations(backbone, text, root, sizes))
        # For ``mtpd_jax.evaluate``, which measures a run with all the cores that there are.
        write_beginnings(held_out, root / "held_out.jsonl", sizes.characters, _HELD_OUT)
        digests = digests_of(backbone, text, held_out)
        recorded.parent.mkdir(parents=True, exist_ok=True)
        write_json(str(recorded), digests)
    elif not recorded.exists():
        raise ValueError(f"{recorded} is missing: there are no rows; run it with --workdir")
    else:  # rows are known by what was read; where it lay says nothing
        root, inputs, held_out, digests = None, Inputs("-", "-", "-"), "-", read_json(recorded)

    def variants(_: Scale) -> list[Variant]:
        return MATRICES[name](inputs, sizes)

    page = functools.partial(report, sizes=dataclasses.asdict(sizes), wanted=variants)
    scale = scale_of(name, inputs, held_out, digests)
    run(Experiment("posthoc", variants, page, SEEDS), scale, root, only, seeds, RESULTS)


if __name__ == "__main__":
    frontdoor.guarded(main)
