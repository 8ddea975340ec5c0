"""What the front doors share: one clear line and exit status 2 for a user's mistake."""

import argparse
import contextlib
import dataclasses
import logging
import os
import pathlib
import runpy
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_flags

from mtpd_jax.decoding.options import check_seed
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.editing import check_name, chosen_cases, fit_cases
from mtpd_jax.reference import help_text
from mtpd_jax.runs.choice import BEST, NEWEST
from mtpd_jax.runs.interruption import end_on_signals, leave, say_last
from mtpd_jax.runs.progress import command
from mtpd_jax.training.state import DivergedError

_CONFIG_HELP = """  --config=FILE: a config file, such as configs/quickstart.py
  --config.section.field=value: another value for one of its fields"""


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a bad flag with one line."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the flags)")


def fail(message: str, status: int = 2) -> NoReturn:
    """Writes one line on standard error and exits."""
    say_last("error: " + " ".join(message.encode(errors="backslashreplace").decode().split()))
    raise SystemExit(status)


def guarded(main: Callable[[], int]) -> NoReturn:
    """Runs a front door in this process, and ends the process with its status: see ``status_of``.

    It ends at once, so that no library adds lines of its own to an error, or crashes on the way out, while threads of
    it are still at work.
    """
    end_on_signals()
    # Whatever fails in a thread or a callback of a library reaches the front door as an exception as well.
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    threading.excepthook = sys.unraisablehook = lambda _: None
    status = status_of(main)
    with contextlib.suppress(OSError):  # full, which was said
        _flush_output()
    leave(status)


def _flush_output() -> None:
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def status_of(main: Callable[[], int]) -> int:
    """Runs a front door; returns its exit status.

    Bad input (ValueError), files that cannot be read or written, and a device out of memory are one
    line and status 2; a diverged loss is status 1; being interrupted, or a reader of the output that has left, 128
    plus the number of the signal that stands for it.
    """
    try:
        try:
            with command():
                status = main()
            _flush_output()
            return status
        # Whoever stopped listening, or asked to stop, is told by the status alone.
        except BrokenPipeError:
            return 128 + signal.SIGPIPE
        except KeyboardInterrupt:
            say_last("interrupted")
            return 128 + signal.SIGINT
        # What a user can mend is one line.
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            fail(where + error.strerror if error.strerror else str(error))
        except ValueError as error:
            fail(str(error))
        except DivergedError as error:
            fail(str(error), status=1)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            fail(f"out of memory: take a smaller batch, model or number of tokens ({str(error)[:200]})")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 2
    except Exception:
        with contextlib.suppress(OSError):
            traceback.print_exc()  # a defect of ours, which has to be seen whole
        return 1


def add_opening_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what ``opening_of`` reads."""
    parser.add_argument(
        "--checkpoint",
        help=f"{NEWEST}, {BEST} or a step (default: {BEST} of a run that rates its checkpoints, else {NEWEST})",
    )
    parser.add_argument(
        "--devices_per_model", type=int, help="devices that share one copy of it (default: as few as it fits on)"
    )
    parser.add_argument("--backbone", help="of heads on a frozen backbone: where that lies now")
    parser.add_argument(
        "--other_backbone", action="store_true", help="take another backbone than that which the heads were trained on"
    )


def opening_of(flags: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of how a run is opened; see ``open_run``."""
    return {name: getattr(flags, name) for name in ("checkpoint", "devices_per_model", "backbone", "other_backbone")}


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what ``sampling_of`` reads, and what else says how text is written."""
    parser.add_argument("--max_new_tokens", type=int, default=128, help="per prompt (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily (default)")
    parser.add_argument("--top_k", type=int, help="sample among the k likeliest tokens")
    parser.add_argument(
        "--top_p", type=float, help="sample among the likeliest tokens that together have probability p"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--greedy_drafts", action="store_true", help="draft the likeliest tokens, also when sampling")
    parser.add_argument(
        "--min_confidence", type=float, default=0.0,
        help="stop drafting below this probability, of all drafts so far together, or of each mask (default: never)",
    )  # fmt: skip
    parser.add_argument(
        "--past_trained_length", action="store_true",
        help="draft beyond the length of the texts that the heads were trained on, too (default: decode plainly there)",
    )  # fmt: skip
    parser.add_argument("--stop", action="append", default=[], help="end before this string; may be given again")
    parser.add_argument(
        "--bit_exact", action="store_true", help="plain and speculative passes of one width, and so of the same kernels"
    )


def sampling_of(flags: argparse.Namespace) -> Sampling:
    """The sampling that the flags ask for.

    Raises:
      ValueError: a value is out of range.
    """
    check_seed(flags.seed)
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.greedy_drafts)
    sampling.validate()
    return sampling


def check_output_path(path: str | None, flag: str = "--json") -> None:
    """Checks that a file that a flag names can be written, before the work whose figures it is for.

    Raises:
      ValueError: its folder is not there, or cannot be written to; or it is a folder itself, or no name.
    """
    if path is None:
        return
    if not path or epath.Path(path).is_dir():
        raise ValueError(f"{flag}={path}: expected the name of a file")
    if "://" in path:
        return
    target = pathlib.Path(path).resolve()
    if not target.parent.is_dir():
        raise ValueError(f"{flag}={path}: there is no folder {target.parent}")
    # A file is written beside its place first; what is no file is written to as it is.
    written = target if target.exists() and not target.is_file() else target.parent
    if not os.access(written, os.W_OK):
        raise ValueError(f"{flag}={path}: {written} may not be written to")


def integers(text: str) -> list[int]:
    """Parses a comma-separated list of integers, for argparse."""
    return [int(part) for part in text.split(",")]


def numbers(text: str) -> list[float]:
    """Parses a comma-separated list of numbers, for argparse."""
    return [float(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Parses a comma-separated list of names, for argparse."""
    return text.split(",")


@dataclasses.dataclass(frozen=True)
class TrainFlags:
    """What the command line of training says; see ``train.run``."""

    config: ml_collections.ConfigDict
    workdir: str
    checkpoint: str
    break_lock: bool
    backbone: str | None = None
    dry_run: bool = False
    json: str | None = None


_TRAIN_FLAGS = tuple(one.name for one in dataclasses.fields(TrainFlags) if one.name != "config")


def parse_config_flags(arguments: list[str], description: str) -> TrainFlags:
    """Parses ``--config=FILE --workdir=DIR [--config.section.field=value …]``.

    Args:
      arguments: the command line without the program's name.
      description: shown by ``--help``.

    Returns:
      The flags, overrides applied to the config.

    Raises:
      ValueError: a flag is unknown, missing or does not fit its field, or the config file cannot be loaded.
    """
    # Flags of the command; those of the config come from the config.
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "the run's folder, or a bucket path (gs://…)", flag_values=values)
    flags.DEFINE_string("checkpoint", NEWEST, "go on from this step, newest or best", flag_values=values)
    flags.DEFINE_string("backbone", None, "where the backbone of its heads lies now", flag_values=values)
    flags.DEFINE_boolean("break_lock", False, "take the run from a process that trains in it", flag_values=values)
    flags.DEFINE_boolean("dry_run", False, "say what the run would be; create nothing", flag_values=values)
    flags.DEFINE_string("json", None, "with --dry_run: write it to this file", flag_values=values)
    if {"--help", "-h", "-help"} & set(arguments):
        own = [f"  --{name}: {values[name].help}" for name in _TRAIN_FLAGS]
        print("\n".join([description, "flags:", _CONFIG_HELP, *own, "", "fields of a config:", help_text()]))
        raise SystemExit(0)
    # The config file, and what the command line changes in it.
    named = [argument for argument in arguments if argument.startswith("--config=")]
    if not named or not named[-1].removeprefix("--config="):
        raise ValueError("--config is missing")
    config = _load_config(named[-1].removeprefix("--config="))
    command_line = ["mtpd_jax", *_joined([argument for argument in arguments if argument not in named])]
    given = [argument.removeprefix("--config.") for argument in command_line if argument.startswith("--config.")]
    changes = {path: value for path, _, value in (argument.partition("=") for argument in given)}
    # A changed source or method brings its own fields with it.
    fit_cases(config, chosen_cases(changes))
    for path in changes:
        check_name(config, path)
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=command_line)
        left_over = values(command_line)[1:]
    except Exception as error:  # absl, ml_collections and the parsers of Python's literals raise many kinds
        raise ValueError(f"bad config or flag: {type(error).__name__}: {error}") from error
    # What nobody took, and what is missing.
    if left_over:
        raise ValueError(f"unexpected argument {left_over[0]!r}: flags are written --name=value")
    if not values["workdir"].value:
        raise ValueError("--workdir is missing")
    check_output_path(values["json"].value)
    if values["json"].value and not values["dry_run"].value:
        raise ValueError("--json is written with --dry_run: what a run measures is in its metrics.jsonl")
    if values["dry_run"].value and (values["backbone"].value or values["break_lock"].value):
        left_out = "backbone" if values["backbone"].value else "break_lock"
        raise ValueError(f"--{left_out}: expected none with --dry_run, which reads no parameters and takes no lock")
    given_flags: dict[str, Any] = {name: values[name].value for name in _TRAIN_FLAGS}
    return TrainFlags(config, **given_flags)


def _joined(arguments: list[str]) -> list[str]:
    """Writes flags of the config in one way: absl takes a single dash, and a value that comes as the next argument."""
    joined: list[str] = []
    for argument in arguments:
        argument = argument if not argument.startswith("-config.") else f"-{argument}"
        # Values of one flag that stand apart from it, as absl takes them.
        waiting = joined and joined[-1].startswith("--config.") and "=" not in joined[-1]
        if waiting and not argument.startswith("-"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _load_config(named: str) -> ml_collections.ConfigDict:
    """Runs a config file, which is a program of the user's: ``FILE``, or ``FILE:ARGUMENT`` for its function.

    Raises:
      ValueError: there is no such file; it fails, exits, or returns something else.
    """
    path, _, argument = named.partition(":")
    if not pathlib.Path(path).is_file():
        raise ValueError(f"--config={path}: no such file")
    try:
        get_config = runpy.run_path(path).get("get_config")
        config = get_config(*([argument] if argument else [])) if callable(get_config) else get_config
    except (Exception, SystemExit) as error:
        raise ValueError(f"--config={path}: fails with {type(error).__name__}: {error}") from error
    # It ran; what it returned has to be a config.
    if not callable(get_config):
        raise ValueError(f"--config={path}: expected a file with a function get_config")
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(f"--config={path}: get_config returns {config!r:.80}: expected an ml_collections.ConfigDict")
    return config
