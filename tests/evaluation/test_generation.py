"""How continuations are shown."""

import io

import rich.console

from mtpd_jax.evaluation import generation as generation_module
from mtpd_jax.evaluation.acceptance import Acceptance
from mtpd_jax.evaluation.comparison import Divergence


def test_on_a_terminal_tokens_are_coloured_by_proposer():
    shown = printed(lossless=True, strategy="speculative")
    assert "\x1b[32mb\x1b[0m" in shown and "\x1b[32ma" not in shown  # green: head 1
    assert "head 1" in shown and "lossless" not in shown


def test_a_lossy_strategy_says_so_and_names_slots():
    parted = Divergence(index=1, margin=1.0, shortfall=2.0, rounding=0.0, tie=False)
    shown = printed(lossless=False, strategy="confident", identical=False, divergence=parted)
    assert "slot 2" in shown and "head 1" not in shown and "confident believes its guesses" in shown
    assert "another text from token 1 on" in shown and "report" not in shown
    assert not generation_of(lossless=False, strategy="confident", divergence=parted).failed
    safe = {"lossless": True, "strategy": "verified", "identical": False, "divergence": parted}
    assert generation_of(**safe).failed and "NOT A TIE" in printed(**safe)


def generation_of(**fields):
    return generation_module.Generation(
        "abc", (1, 2, 3), (0, 1, 0), 1, 2.0, 1.0, 3.0, Acceptance((1.0,), (1.0,)), **fields
    )  # fmt: skip


def printed(**fields):
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    generation = generation_of(**fields)
    generation_module.show(console, "prompt", generation, lambda ids: "".join("?abc"[token] for token in ids))
    return console.file.getvalue()
