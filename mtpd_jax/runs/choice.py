"""Which checkpoint of a run: a step, the newest, or the one whose drafts stood longest on held-out prompts.

Runs that decode held-out prompts while they train write what came of it to their metrics, at steps that have a
checkpoint: the loss may go on falling when fewer drafts are accepted again.
"""

from typing import TypeAlias

import orbax.checkpoint as ocp

from mtpd_jax.runs.metrics import read_metrics
from mtpd_jax.runs.workdir import Workdir
from mtpd_jax.validation import check_integer

NEWEST, BEST = "newest", "best"
# As it is asked for: its step, "newest", "best"; None: where checkpoints differ in their drafts alone the best of those
# that were rated, else the newest.
Choice: TypeAlias = int | str | None
# What a checkpoint is rated by: tokens per pass on the held-out prompts that select, and on no others.
RATING = "selection/tokens_per_pass"


def steps_of(workdir: Workdir) -> list[int]:
    """The steps of a run's complete checkpoints, newest first; creates nothing."""
    if not workdir.checkpoints.is_dir():
        return []
    return sorted(ocp.utils.checkpoint_steps(workdir.checkpoints), reverse=True)


def latest_step(workdir: Workdir) -> int | None:
    """The newest complete checkpoint's step, or None; creates nothing."""
    return next(iter(steps_of(workdir)), None)


def parse_choice(checkpoint: Choice) -> Choice:
    """What is asked for, from the command line, where a step is text, or from Python.

    Raises:
      ValueError: it is nothing that can be asked for.
    """
    if checkpoint in (None, NEWEST, BEST):
        return checkpoint
    if isinstance(checkpoint, str):
        if not (checkpoint.isascii() and checkpoint.isdigit()):
            raise ValueError(f"--checkpoint={checkpoint}: expected {NEWEST}, {BEST}, or the step of a checkpoint")
        return int(checkpoint)
    check_integer("checkpoint", checkpoint)
    return checkpoint


def ratings_of(workdir: Workdir) -> dict[int, float]:
    """The ratings of a run's complete checkpoints, by step; of those that have one."""
    steps = set(steps_of(workdir))
    lines = [line for line in read_metrics(workdir) if line["step"] in steps and line.get(RATING) is not None]
    return {line["step"]: line[RATING] for line in lines}


def candidates(workdir: Workdir, choice: Choice) -> list[int]:
    """The steps that may be read for a choice: a damaged checkpoint is passed over for the next of them.

    Raises:
      ValueError: what was asked for is not there; naming what is.
    """
    steps = steps_of(workdir)
    if isinstance(choice, int):
        if choice not in steps:
            there = f"has {', '.join(map(str, sorted(steps)))}" if steps else "holds no complete checkpoint"
            raise ValueError(f"checkpoint = {choice!r}: {workdir.checkpoints} {there}")
        return [choice]
    if choice == NEWEST:
        return steps
    ratings = ratings_of(workdir)
    if choice == BEST and not ratings:
        raise ValueError(
            f"checkpoint = {BEST!r}: {workdir.path} has no checkpoint that was rated by decoding held-out prompts; "
            f"ask for {NEWEST}, or a step"
        )
    rated = sorted(ratings, key=lambda step: (ratings[step], step), reverse=True)
    return rated + [step for step in steps if step not in ratings]
