"""The model card: what the folder holds, how it is loaded, and what was measured, with definitions."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from mtpd_jax.config import Config
from mtpd_jax.interop.families import FAMILIES
from mtpd_jax.interop.formats import FORMATS
from mtpd_jax.interop.writing import Plan

_DEFINITIONS = """\
- *pass*: one verification pass of the whole model; reading the prompt is none.
- *tokens per pass*: new tokens but the first, which reading the prompt writes, over passes. *Without bonus*: accepted
  drafts over passes; the bonus is the token that every pass writes by itself.
- *acceptance, conditional*: of the rounds in which drafts 1 to k-1 were accepted, the share in which draft k was, too.
  *Cumulative*: of all rounds, the share in which drafts 1 to k were.
- *speed-up*: tokens per second over the fastest plain decoding of the same prompts by the program that measured,
  mtpd_jax, on the machine of the measurement; other programs and machines differ.
- Intervals are 95 % bootstrap intervals over prompts.
- *agreement*: the share of positions in held-out text at which a head's likeliest token is the main head's for the same
  place, teacher-forced. It is no acceptance, which decoding alone shows."""


@dataclasses.dataclass(frozen=True)
class Measurements:
    """What was measured of a run.

    Attributes:
      held_out: the last evaluation on held-out text while training, by the names of ``metrics.jsonl``; empty: none.
      decoding: reports of ``mtpd_jax.evaluate --json``, by name of the file.
    """

    held_out: Mapping[str, Any]
    decoding: Mapping[str, Mapping[str, Any]]


def card(planned: Plan, config: Config, step: int, measured: Measurements) -> str:
    """The text of README.md in an exported folder.

    Args:
      planned: what is written.
      config, step: of the run.
      measured: of the run.

    Raises:
      ValueError: a report is not one; naming it.
    """
    written, family = planned.config, FAMILIES[planned.kind]
    number = written.heads.num_heads
    kinds = "" if config.heads.kind == "cascade" else f" ({config.heads.kind}: one module, written once per depth)"
    heads = f" and {number} heads that draft further tokens{kinds}" if number else ", without heads"
    model = written.model
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- multi-token-prediction\n---",
        f"# A {family.title} model{' with multi-token-prediction heads' if number else ''}",
        f"Backbone of {model.layers} layers, width {model.width}, vocabulary {model.vocabulary_size:,}{heads}; "
        f"{FORMATS[planned.format].title}. Written by mtpd_jax after step {step:,} of the run that `mtpd_config.json` "
        "is the config of.",
        "## Loading",
        _loading(planned),
    ]
    if planned.notes:
        parts += ["## To be known", "\n".join(f"- {note}" for note in planned.notes)]
    return "\n\n".join([*parts, "## Measured", *_measured(number, measured), "## Definitions", _DEFINITIONS]) + "\n"


def _loading(planned: Plan) -> str:
    number = planned.config.heads.num_heads
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # this one',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForCausalLM.from_pretrained(folder)",
    ]
    if number and not FAMILIES[planned.kind].declares_heads:
        lines += [
            "first = model.config.num_hidden_layers  # the heads lie behind the last layer",
            f"heads = range(first, first + {number})",
            'model._keys_to_ignore_on_load_unexpected = {rf"model\\.layers\\.{layer}\\." for layer in heads}',
        ]
    drafting = ", use_mtp=True" if number else ""
    lines += ['inputs = tokenizer("Once upon a time", return_tensors="pt")']
    if number > 1:
        lines += [
            'length = inputs["input_ids"].shape[1]  # of at least as many tokens as there are heads',
            f"model.config.num_mtp_layers = min({number}, length)",
        ]
    lines += [
        f"written = model.generate(**inputs, max_new_tokens=64, do_sample=False{drafting})",
        "print(tokenizer.decode(written[0]))",
    ]
    text = ["```python", *lines, "```"]
    if number:
        since = FAMILIES[planned.kind].since
        text += ["", f"transformers {since} or later; one prompt at a time, of at least as many tokens as heads."]
    if number and FORMATS[planned.format].remote_code:
        text += [
            "With `trust_remote_code=True` the three lines about `heads` are not needed (`modeling_mtpd.py` has them); "
            "without it the folder is a plain model, whose heads are reported as unexpected.",
        ]
    return "\n".join(text)


def _measured(number: int, measured: Measurements) -> list[str]:
    parts = []
    agreement = [measured.held_out.get(f"eval/head_{k}/agreement") for k in range(1, number + 1)]
    if "eval/main/ce" in measured.held_out:
        text = f"Held-out text while training, at step {measured.held_out['step']}: cross entropy of the main head "
        text += f"{measured.held_out['eval/main/ce']:.3f} nats per token"
        shown = [f"{share:.3f}" for share in agreement if share is not None]
        parts.append(text + (f", agreement of the heads {', '.join(shown)}." if shown else "."))
    for name, report in measured.decoding.items():
        try:
            for prompts, decoded in report["decoding"].items():
                parts.append(_decoding_table(f"`{pathlib.Path(prompts).name}`", decoded["heads"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{name}: expected what mtpd_jax.evaluate --prompts=FILE --json=FILE writes") from error
    if number and not measured.decoding:
        parts.append("Acceptance was not measured: `python -m mtpd_jax.evaluate --prompts=FILE --json=FILE` does that.")
    return parts or ["Nothing was measured."]


def _decoding_table(title: str, by_heads: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        f"Decoding of {title}:\n",
        "| drafts | prompts | tokens per pass | without bonus | conditional | cumulative | speed-up | beside plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, score in by_heads.items():
        same = {True: "identical", False: "differs", None: "sampled"}[score["identical"]]
        accepted = [_all(score["acceptance"][name]) for name in ("conditional", "cumulative")]
        figures = [_interval(score.get(name)) for name in ("tokens_per_pass", "tokens_per_pass_without_bonus")]
        speed = _interval(score.get("speedup_over_plain"))
        rows.append(f"| {' | '.join([number, str(score['prompts']), *figures, *accepted, speed, same])} |")
    return "\n".join(rows)


def _all(intervals: list[Any]) -> str:
    return ", ".join(_interval(interval) for interval in intervals) or "-"


def _interval(value: Mapping[str, float | None] | None) -> str:
    if value is None or value["mean"] is None:
        return "-"
    return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
