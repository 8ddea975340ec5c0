"""Self-distilled multi-token prediction in JAX and Flax."""

import signal
import sys

_module = [*sys.orig_argv, "-m", ""][[*sys.orig_argv, "-m"].index("-m") + 1]
if _module.startswith(("mtpd_jax.", "experiments.")) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # ``python -m mtpd_jax.…`` is starting, and imports for seconds: until it has a handler of its own
    # (``frontdoor.guarded``), Ctrl-C ends it as it ends any program, and not with a traceback out of somebody's import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
