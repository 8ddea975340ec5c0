"""Self-distilled multi-token prediction in JAX and Flax."""

import importlib
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtpd_jax.config import Config
    from mtpd_jax.decoding.sampling import Sampling
    from mtpd_jax.run import Run, open_run

__all__ = ["Config", "Run", "Sampling", "open_run"]

# Imported when they are asked for: who reads a config waits for no decoder.
_HOME = {
    "Config": "mtpd_jax.config", "Run": "mtpd_jax.run", "Sampling": "mtpd_jax.decoding.sampling",
    "open_run": "mtpd_jax.run",
}  # fmt: skip
_COMMANDS = ("train", "generate", "evaluate", "convert", "corpus")


def __getattr__(name: str) -> Any:
    if name in _COMMANDS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


_module = [*sys.orig_argv, "-m", ""][[*sys.orig_argv, "-m"].index("-m") + 1]
if _module.startswith(("mtpd_jax.", "experiments.")) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # ``python -m mtpd_jax.…`` is starting, and imports for seconds: until it has a handler of its own
    # (``frontdoor.guarded``), Ctrl-C ends it as it ends any program, and not with a traceback out of somebody's import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
