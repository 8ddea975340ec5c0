"""An interactive session: prompts are typed, and continuations appear in colours as they are written."""

import contextlib
import signal
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import rich.console

from mtpd_jax.data.chat import Message, Prompt
from mtpd_jax.evaluation.generation import Generation
from mtpd_jax.evaluation.transcript import figures_line, show_legend, show_stream
from mtpd_jax.run import Run
from mtpd_jax.runs.interruption import StopRequest, keep_terminal

with contextlib.suppress(ImportError):  # not on every platform
    import readline  # noqa: F401  # what is typed can be edited, and found again

_HELP = "Ctrl-C stops a text; an empty line or Ctrl-D ends"


def converse(
    opened: Run,
    console: rich.console.Console,
    options: Mapping[str, Any],
    *,
    chat: bool = False,
    system: str | None = None,
) -> None:
    """Asks for prompts until there is none, and continues each.

    With ``chat`` they are the messages of one conversation. A prompt that cannot be continued, such as one that leaves
    no room in the model's context, is answered by one line, and forgotten. Ctrl-C ends a continuation where it is.

    Args:
      opened: the run.
      console: where all is shown.
      options: what ``Run.stream`` takes.
      chat: whether prompts are messages, which the model answers.
      system: with ``chat``, what the model is told before.
    """
    keep_terminal()
    said: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    console.print(f"{opened.trained.folder.shown}, step {opened.step:,}; {_HELP}", style="dim")
    while text := _ask():
        prompt: Prompt = [*said, {"role": "user", "content": text}] if chat else text
        try:
            generations = opened.stream(prompt, **options)
            decode = opened.text_after(prompt)
            with StopRequest() as stopping:
                found = show_stream(console, "" if chat else text, _until(stopping, generations), decode)
        except ValueError as error:
            console.print(str(error), style="red", markup=False)
            continue
        if stopping.signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        show_legend(console, found)
        console.print(figures_line(found), style="dim", markup=False)
        if chat:
            said = [*prompt, {"role": "assistant", "content": found.text}]  # pyright: ignore[reportAssignmentType]


def _until(stopping: StopRequest, generations: Iterable[Generation]) -> Iterator[Generation]:
    for newest in generations:
        yield newest
        if stopping.asked():
            return


def _ask() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""
