"""How continuations are shown."""

import io

import rich.console

from mtpd_jax.evaluation import generation as generation_module
from mtpd_jax.evaluation.acceptance import Acceptance


def test_on_a_terminal_tokens_are_coloured_by_proposer():
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    generation = generation_module.Generation(
        "abc", (1, 2, 3), (0, 1, 0), 1, 2.0, 1.0, 3.0, Acceptance((1.0,), (1.0,)), lossless=True
    )  # fmt: skip
    generation_module.show(console, "prompt", generation, lambda ids: "".join("?abc"[token] for token in ids))
    shown = console.file.getvalue()
    assert "\x1b[32mb\x1b[0m" in shown and "\x1b[32ma" not in shown  # green: head 1
