"""What a run would be, without creating anything: its size, what a step needs, and the text that it begins with."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
import rich.console
import rich.table
import rich.text

from mtpd_jax.config import Config
from mtpd_jax.data.pipeline import Batch, TrainingData, put_on_devices
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.evaluation.report import new_table, number
from mtpd_jax.model.backbone import count_parameters
from mtpd_jax.runs.checkpoint import chosen_record
from mtpd_jax.runs.choice import NEWEST, latest_step, parse_choice
from mtpd_jax.runs.plan import Plan, planned
from mtpd_jax.runs.progress import say
from mtpd_jax.sharding import batch_sharding, describe_mesh
from mtpd_jax.training.feasibility import device_memory
from mtpd_jax.training.state import TrainState, state_shardings
from mtpd_jax.training.step import make_step

# Rows, and characters of a segment, that a terminal shows; JSON has all of them. Our choice.
_SHOWN_ROWS = 2
_SHOWN_CHARACTERS = 320


@dataclasses.dataclass(frozen=True)
class Segment:
    """A document's part of a packed row.

    Attributes:
      tokens: how many.
      text: what they stand for, special tokens by name.
    """

    tokens: int
    text: str


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What ``train`` would do.

    Attributes:
      workdir: the run's folder, which need not be there.
      step: that it would go on from; 0: it would begin.
      steps: optimizer steps of the whole run.
      trains: what is trained, where it is not the whole model; and other things that training would say.
      devices: how many, of which kind, and how they are arranged.
      parameters: numbers of them, by part of the model; ``trained`` are those that learn, ``frozen`` the others.
      flops_per_token, flops_per_step: that the model needs, forward and backward; nothing recomputed is counted.
      tokens_per_step: padding included.
      state_bytes: per device: parameters, optimizer, average.
      temporary_bytes: per device, of the compiled step beside them; None where the compiler does not say.
      device_bytes: that a device has.
      rows: of the first batch, or of the next: the segments of each.
    """

    workdir: str
    step: int
    steps: int
    trains: str
    devices: str
    parameters: dict[str, int]
    trained: int
    frozen: int
    flops_per_token: int
    flops_per_step: int
    tokens_per_step: int
    state_bytes: int
    temporary_bytes: int | None
    device_bytes: int
    rows: list[list[Segment]]


def dry_run(
    config: Config | ml_collections.ConfigDict | Mapping[str, Any], workdir: str, checkpoint: int | str = NEWEST
) -> DryRun:
    """Looks at all that training would look at before its first step, and compiles that; creates nothing.

    The parameters of a run to start from are not read.

    Args:
      config, workdir, checkpoint: see ``train.run``.

    Raises:
      ValueError: what ``train.run`` would refuse.
    """
    chosen = parse_choice(checkpoint)
    plan = planned(config, workdir, chosen)
    config, folder, method, source = plan.config, plan.folder, plan.method, plan.source
    # The checkpoint that the run would go on from.
    record, step = chosen_record(folder, chosen) if latest_step(folder) is not None else ({}, None)
    # The batch that would be next.
    tokenizer = plan.tokenizer()
    with TrainingData(config, source, tokenizer) as data:
        if step is not None:
            data.set_state(record["data"])
        batch = next(data)
    # What it costs.
    costs, tokens = method.costs(), int(np.prod(batch.tokens.shape))
    state, temporary = _memory(plan, batch)
    mesh, abstract = method.mesh, plan.abstract
    device, notes = mesh.devices.flat[0], (method.describe(), *plan.notes)
    return DryRun(
        workdir=str(folder.path), step=step or 0, steps=config.training.steps, trains="\n".join(filter(None, notes)),
        devices=describe_mesh(mesh), parameters=_by_part(abstract),
        trained=count_parameters(abstract.parameters), frozen=count_parameters(abstract.frozen),
        flops_per_token=costs.flops_per_token, flops_per_step=costs.flops_per_token * tokens, tokens_per_step=tokens,
        state_bytes=state, temporary_bytes=temporary, device_bytes=device_memory(device, len(mesh.local_devices)),
        rows=_segments(batch, tokenizer),
    )  # fmt: skip


def _by_part(abstract: TrainState) -> dict[str, int]:
    """Parameters by the top names of the model's tree, trained and frozen ones together."""
    found: dict[str, int] = {}
    for tree in (abstract.parameters, abstract.frozen or {}):
        for part, below in tree.items():
            found[part] = found.get(part, 0) + count_parameters(below)
    return found


def _memory(plan: Plan, batch: Batch) -> tuple[int, int | None]:
    """Bytes per device: of the state, and of what the compiled step needs beside it, if the compiler says so."""
    say("compiling the training step …")
    step = make_step(plan.method, plan.optimizer, state_shardings(plan.abstract))
    on_devices = put_on_devices(batch, batch_sharding(plan.method.mesh))
    found = step.lower(plan.abstract, on_devices).compile().memory_analysis()  # pyright: ignore[reportFunctionMemberAccess]
    state = sum(
        leaf.dtype.itemsize * int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
        for leaf in jax.tree.leaves(plan.abstract)
    )
    return state, None if found is None else int(found.temp_size_in_bytes)


def _segments(batch: Batch, tokenizer: Tokenizer) -> list[list[Segment]]:
    """The rows of a batch as text, document by document; padding is left out."""

    def of_row(tokens: np.ndarray, segment_ids: np.ndarray) -> list[Segment]:
        # Where a document begins, and behind the last token.
        begins = np.flatnonzero(np.diff(segment_ids, prepend=0, append=0)).tolist()
        parts = [slice(begin, end) for begin, end in itertools.pairwise(begins) if segment_ids[begin]]
        return [Segment(part.stop - part.start, tokenizer.decode(tokens[part], special=True)) for part in parts]

    length = batch.tokens.shape[-1]
    rows = (np.asarray(part).reshape(-1, length) for part in (batch.tokens, batch.segment_ids))
    return [of_row(*row) for row in zip(*rows, strict=True)]


def show(console: rich.console.Console, found: DryRun) -> None:
    """Prints a table, and the first rows as text."""
    table = new_table(f"dry run: {found.workdir}", ("what", "figure"), left=("what",), show_header=False)
    would = f"go on from step {found.step:,}" if found.step else "begin"
    table.add_row("would", f"{would}, to {found.steps:,}" if found.step < found.steps else "find it finished")
    if found.trains:
        table.add_row("", found.trains)
    table.add_row("devices", found.devices)
    table.add_section()
    for part, count in found.parameters.items():
        table.add_row(f"parameters: {part}", f"{count:,}")
    table.add_row("trained", f"{found.trained:,}")
    if found.frozen:
        table.add_row("frozen", f"{found.frozen:,}")
    table.add_section()
    table.add_row("tokens per step", f"{found.tokens_per_step:,}")
    table.add_row("FLOPs per token", f"{found.flops_per_token / 1e6:,.1f} million")
    table.add_row("FLOPs per step", f"{found.flops_per_step / 1e9:,.1f} billion")
    table.add_section()
    together = None if found.temporary_bytes is None else found.state_bytes + found.temporary_bytes
    fits = ": DOES NOT FIT" if (together or found.state_bytes) > found.device_bytes else ""
    for name, size, more in (
        ("state", found.state_bytes, ""), ("temporary, as compiled", found.temporary_bytes, ""),
        ("together", together, fits), ("that a device has", found.device_bytes, ""),
    ):  # fmt: skip
        shown = "not known" if size is None else f"{number(size / 2**20, 1)} MiB{more}"
        table.add_row(f"memory per device: {name}", shown)
    console.print(table)
    for place, row in enumerate(found.rows[:_SHOWN_ROWS], 1):
        kept = sum(segment.tokens for segment in row)
        console.print(f"row {place} of {len(found.rows)}: {kept:,} tokens, {len(row)} segments", style="bold")
        for segment in row:
            console.print(_shown(segment), soft_wrap=True)
    console.print(f"nothing was created in {found.workdir}", style="dim", soft_wrap=True)


def _shown(segment: Segment) -> rich.text.Text:
    text, half = segment.text, _SHOWN_CHARACTERS // 2
    if len(text) > _SHOWN_CHARACTERS:
        text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
    return rich.text.Text().append(f"[{segment.tokens} tokens] ", style="reverse").append(text)
