"""Post-hoc heads on a frozen backbone (Electronics 15(7):1533): what they learn from, on what, in how many stages.

``python -m experiments.posthoc --scale=stories_656k --backbone=DIR --text=FILE --generations=DIR --held_out=FILE
--workdir=DIR``: KL on the backbone's distribution against LM loss on the data; text against the backbone's own
generations; a long first stage alone, a short one alone, or both; a cascade, a recurrent head, and one with a shared
cache. ``--scale=stories_19m`` varies one thing at a time around a main arm, on a larger backbone.

The backbone is a workdir or a folder of a Hugging Face model, ``--generations`` what ``mtpd_jax.corpus`` wrote with it
after beginnings of the text. Figures are of other stories, ``--held_out``.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from configs import posthoc as config_file
from configs import stories
from experiments.posthoc_report import FROZEN, JOINT, report
from experiments.sweep.experiment import Experiment, run
from experiments.sweep.fingerprint import code_version
from experiments.sweep.runner import Code
from experiments.sweep.runs import Variant
from experiments.sweep.scale import Scale
from mtpd_jax import frontdoor
from mtpd_jax.data.files import File
from mtpd_jax.data.generations import MANIFEST
from mtpd_jax.editing import change
from mtpd_jax.fields import flat
from mtpd_jax.runs.models import backbone_digest, open_model
from mtpd_jax.sharding import data_mesh

KINDS = {
    "recurrent": {"heads.kind": "recurrent", "heads.cache": "per_depth"},
    "shared": {"heads.kind": "recurrent", "heads.cache": "shared"},
    "cascade": {"heads.kind": "cascade", "heads.cache": "per_depth"},
}
LOSSES = {"kl": {}, "lm": {"objective.alpha": 1 / 3, "objective.beta": 0.0}}
# The other seeds are of what is compared; these of what is only shown.
_ONCE = (0,)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is trained at a scale.

    Attributes:
      pre, fine: optimizer steps of a first, and of a short stage.
      learning_rate: at the peak; a tenth of it in a second stage.
      batch: rows per step.
      texts, new_tokens, turns: see ``Scale``.
    """

    pre: int
    fine: int
    learning_rate: float
    batch: int
    texts: int
    new_tokens: int
    turns: int


SIZES = {
    "stories_656k": Sizes(pre=400, fine=100, learning_rate=1e-2, batch=4, texts=32, new_tokens=96, turns=1),
    "stories_19m": Sizes(pre=800, fine=200, learning_rate=4e-3, batch=4, texts=32, new_tokens=96, turns=3),
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the arms read: backbone, text, and the backbone's own generations."""

    backbone: str
    text: str
    generations: str

    def of(self, data: str) -> dict[str, Any]:
        """The fields of a config that name the data of an arm."""
        if data == "text":
            return {"data.source": "text", "data.paths": (self.text,)}
        return {"data.source": "generations", "data.path": self.generations}

    def digests(self) -> tuple[tuple[str, str], ...]:
        """What they hold, wherever they lie."""
        parameters = open_model(self.backbone).read(data_mesh(jax.devices()[:1])).parameters
        files = {"text": pathlib.Path(self.text), "generations": pathlib.Path(self.generations) / MANIFEST}
        return (
            ("backbone", backbone_digest(parameters)),
            *((name, File(path).digest()) for name, path in files.items()),
        )


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
        make("shared", "kl", "fine", "text", _ONCE),
        make("shared", "kl", "both", "text", _ONCE),
        make("shared", "kl", "both", "own", _ONCE),
        make("recurrent", "kl", "pre", "text", _ONCE),
        make("cascade", "kl", "pre", "text", _ONCE),
        *joint_and_frozen(inputs, sizes),
    ]


def joint_and_frozen(inputs: Inputs, sizes: Sizes) -> list[Variant]:
    """Four heads trained with their backbone (``configs/stories.py``, which the frozen one is of, too), and four on it.

    The heads of both see as many tokens; the frozen backbone saw as many before.
    """
    tree = stories.get_config().to_dict()
    decided = ("model", "heads", "objective", "optimizer", "training")
    joint = dict(flat({section: tree[section] for section in decided}))
    frozen = arm(inputs, sizes, "cascade", "kl", "pre", "text")
    more = {"heads.num_heads": tree["heads"]["num_heads"], "training.steps": tree["training"]["steps"]}
    return [
        Variant(JOINT, {**joint, "data.shuffle_window": tree["data"]["shuffle_window"]}, decode=(3,), seeds=_ONCE),
        Variant(FROZEN, {**frozen.diff, **more}, decode=(3,), seeds=_ONCE),
    ]


MATRICES: dict[str, Callable[[Inputs, Sizes], list[Variant]]] = {
    "stories_656k": whole_matrix,
    "stories_19m": one_at_a_time,
}


def scale_of(name: str, inputs: Inputs, held_out: str) -> Scale:
    """The scale of a name, with its base config and what runs read."""
    sizes = SIZES[name]

    def base() -> Any:
        tree = config_file.get_config()
        change(tree, {
            "objective.source": inputs.backbone, "data.paths": (inputs.text,), "training.batch_size": sizes.batch,
            "training.steps": sizes.pre, "checkpoint.keep": 1, "checkpoint.every_steps": sizes.pre,
            "logging.tensorboard": False, "evaluation.every_steps": sizes.pre // 4, "evaluation.documents": 8,
        })  # fmt: skip
        return tree

    return Scale(
        name, base, loop_steps=0, texts=sizes.texts, prompt_tokens=32, new_tokens=sizes.new_tokens, turns=sizes.turns,
        held_out=held_out, inputs=inputs.digests(),
    )  # fmt: skip


def main() -> int:
    """Parses the flags, runs."""
    parser = frontdoor.Parser(prog="python -m experiments.posthoc", description=__doc__)
    parser.add_argument("--scale", required=True, choices=tuple(SIZES))
    for name, what in (
        ("backbone", "a workdir, or a folder of a Hugging Face model"), ("text", "stories to train on"),
        ("generations", "what mtpd_jax.corpus wrote with the backbone"), ("held_out", "other stories"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", required=True, help=what)
    parser.add_argument("--workdir", help="the folder that runs are trained in; without it, only the report is written")
    parser.add_argument("--only", type=frontdoor.names, default=[], help="arms to run, separated by commas")
    parser.add_argument("--seeds", type=frontdoor.integers, default=[], help="to run, separated by commas")
    flags = parser.parse_args()
    root = pathlib.Path(flags.workdir).resolve() if flags.workdir else None
    if root is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # runs share most of their programs
        jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))
    files = [
        str(pathlib.Path(path).resolve()) for path in (flags.backbone, flags.text, flags.generations, flags.held_out)
    ]
    inputs = Inputs(*files[:3])
    scale, sizes = scale_of(flags.scale, inputs, files[3]), SIZES[flags.scale]

    def variants(_: Scale) -> list[Variant]:
        return MATRICES[flags.scale](inputs, sizes)

    experiment = Experiment("posthoc", variants, functools.partial(report, scale_name=flags.scale))
    run(experiment, scale, root, flags.only, flags.seeds, code=Code(code_version("posthoc")))
    return 0


if __name__ == "__main__":
    frontdoor.guarded(main)
