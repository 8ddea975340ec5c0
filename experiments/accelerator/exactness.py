"""Whether what is promised bit for bit, or up to rounding, holds on this device.

A small model is trained on a text made here; what decodes and resumes is that run.
"""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from configs import base
from experiments.accelerator.battery import Case, Piece, Place, Result
from experiments.accelerator.kernels import attention_case, loss_case, selection_case
from experiments.sweep.fingerprint import made_up_text
from experiments.sweep.measure import held_out_texts
from mtpd_jax import train
from mtpd_jax.config import Config
from mtpd_jax.decoding.decoder import Decoder
from mtpd_jax.decoding.options import Options
from mtpd_jax.evaluation.acceptance import tokens_per_pass
from mtpd_jax.evaluation.decoding import compare_ways, decode_prompts, ways_of
from mtpd_jax.evaluation.parity import draft_parity
from mtpd_jax.model.attention import KERNELS
from mtpd_jax.model.backbone import LanguageModel
from mtpd_jax.platform import platform_of
from mtpd_jax.run import Run, open_run
from mtpd_jax.runs.choice import NEWEST
from mtpd_jax.runs.opening import load_run

# Draft logits may differ from the training path's by this share of the largest logit, by dtype of the products.
_PARITY = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Of the run, and of what is decoded with it: numbers of heads beside none, some of them looped."""

    documents: int
    model: dict[str, Any]
    training: dict[str, Any]
    prompts: int
    prompt_tokens: int
    new_tokens: int
    heads: int
    numbers: Sequence[int]


_TINY = _Sizes(
    60, {"vocabulary_size": 300, "width": 32, "layers": 2, "query_heads": 4, "kv_heads": 2, "head_size": 8,
         "mlp_width": 48},
    {"steps": 8, "batch_size": 4, "sequence_length": 64}, prompts=3, prompt_tokens=8, new_tokens=12, heads=2,
    numbers=(0, 2, 4),
)  # fmt: skip
_FULL = _Sizes(
    2000, {"vocabulary_size": 512, "width": 256, "layers": 6, "query_heads": 4, "kv_heads": 2, "head_size": 64,
           "mlp_width": 768},
    {"steps": 200, "batch_size": 16, "sequence_length": 256}, prompts=32, prompt_tokens=24, new_tokens=96, heads=4,
    numbers=(0, 1, 2, 4, 8),
)  # fmt: skip


def _sizes(place: Place) -> _Sizes:
    return _TINY if place.tiny else _FULL


def _config(place: Place) -> Config:
    sizes, tree = _sizes(place), base.get_config()
    text_file = place.work / "exactness.txt"
    text_file.parent.mkdir(parents=True, exist_ok=True)
    text_file.write_text(made_up_text(sizes.documents))
    tree.data.update(source="text", paths=(str(text_file),), validation_fraction=0.2, shuffle_window=8)
    tree.model.update(sizes.model)
    tree.heads.num_heads = sizes.heads
    tree.objective.top_n = 64
    tree.optimizer.update(learning_rate=0.01, warmup_steps=4)
    tree.training.update(sizes.training)
    tree.mesh.data = 1
    tree.checkpoint.update(every_steps=sizes.training["steps"] // 2, keep=2)
    tree.logging.update(every_steps=sizes.training["steps"], tensorboard=False)
    tree.evaluation.update(every_steps=sizes.training["steps"], documents=2)
    return Config.build(tree.to_dict())


def _train(config: Config, workdir: pathlib.Path, checkpoint: int | str = NEWEST) -> str:
    """Trains a run, if it is not finished; returns its workdir."""
    result = train.run(config, str(workdir), checkpoint=checkpoint)
    if result.signal is not None:  # whoever asked this process to stop asked for more than this run
        raise SystemExit(128 + result.signal)
    return str(workdir)


def _trained(place: Place) -> str:
    """The workdir of the run."""
    return _train(_config(place), place.work / "exactness")


def resume(place: Place) -> Result:
    """A run that goes on from the middle ends with the bits of one that was never stopped."""
    config, whole = _config(place), _trained(place)
    resumed = place.work / "exactness_resumed"
    shutil.rmtree(resumed, ignore_errors=True)
    shutil.copytree(whole, resumed)
    _train(config, resumed, config.training.steps // 2)
    one, other = (jax.device_get(load_run(folder).parameters) for folder in (whole, str(resumed)))
    middle = jax.device_get(load_run(whole, config.training.steps // 2).parameters)
    differing = [not np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (one, other)), strict=True)]
    moved = [not np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (one, middle)), strict=True)]
    return {"ok": not any(differing) and all(moved), "arrays": len(differing), "differing": sum(differing)}


def _with_dtype(opened: Run, dtype: str) -> LanguageModel:
    """The run's model in another dtype; in float32 without kernels of this device, which round products their way."""
    model = opened.trained.model
    attention = "dense" if dtype == "float32" else model.config.attention
    return LanguageModel(dataclasses.replace(model.config, dtype=dtype, attention=attention), model.heads_config)


def _prompts(opened: Run, place: Place) -> list[np.ndarray]:
    sizes = _sizes(place)
    return held_out_texts(opened, sizes.prompts, sizes.prompt_tokens)


def decoding(place: Place, dtype: str, bit_exact: bool) -> Result:
    """Greedy speculative text against plain decoding's, for several numbers of heads, looped ones too."""
    opened, sizes = open_run(_trained(place)), _sizes(place)
    decoder = Decoder(_with_dtype(opened, dtype), opened.parameters, opened.tokenizer.end_ids)
    prompts, numbers = _prompts(opened, place), sizes.numbers
    options = Options(0, sizes.new_tokens)
    ways = ways_of(options.sharing_width(max(numbers)) if bit_exact else options, numbers)
    decoded = decode_prompts(decoder, prompts, ways, batch_size=len(prompts), seed=0)
    compared = compare_ways(decoder, prompts, ways, decoded)
    parted = [one for number in numbers[1:] for one in compared[number].divergences if one is not None]
    ties = sum(one.tie for one in parted)
    return {
        "ok": not parted if bit_exact else ties == len(parted),
        "texts": len(prompts) * (len(numbers) - 1),
        "ties": ties,
        "different": len(parted) - ties,
        "tokens_per_pass": tokens_per_pass(compared[sizes.heads].continuations).mean,
    }


def parity(place: Place, dtype: str) -> Result:
    """Draft logits of the decoder against those of the training path, at every depth."""
    opened, sizes = open_run(_trained(place)), _sizes(place)
    model, options = _with_dtype(opened, dtype), Options(sizes.heads, sizes.new_tokens)
    prompts, platform = _prompts(opened, place)[:4], platform_of(jax.devices()[0])
    found = draft_parity(model, opened.parameters, prompts, options, platform)
    largest = max(depth.difference for depth in found)
    return {
        "ok": largest < _PARITY[dtype],
        "difference": largest,
        "same_choice": min(depth.same_choice for depth in found),
        "compared": found[0].compared,
    }


def cases(place: Place) -> Sequence[Case]:
    """Of the run, and of kernels by themselves."""
    of_run: dict[str, Callable[[], Result]] = {
        "resume": functools.partial(resume, place),
        "decoding float32": functools.partial(decoding, place, "float32", bit_exact=False),
        "decoding bfloat16 bit-exact": functools.partial(decoding, place, "bfloat16", bit_exact=True),
        "parity float32": functools.partial(parity, place, "float32"),
        "parity bfloat16": functools.partial(parity, place, "bfloat16"),
        "selection": functools.partial(selection_case, place.tiny),
        "loss": functools.partial(loss_case, place.tiny),
    }
    kernels = {f"attention {name}": functools.partial(attention_case, name, place.tiny) for name in KERNELS}
    # Reductions on a GPU add in any order unless they are told not to, which resuming with the same bits needs.
    flags = {"resume": "--xla_gpu_deterministic_ops=true"}
    return [Case(name, 60, run, flags=flags.get(name, "")) for name, run in {**of_run, **kernels}.items()]


def summary(result: Result) -> str:
    """A result in a line."""
    if "skipped" in result:
        return result["skipped"]
    numbers = {name: value for name, value in result.items() if name != "ok"}
    shown = ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
        for name, value in numbers.items()
    )
    return f"{'holds' if result['ok'] else 'DOES NOT HOLD'}: {shown}"


PIECE = Piece("exactness", "what holds bit for bit", cases, summary)
