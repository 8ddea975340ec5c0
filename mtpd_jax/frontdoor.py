"""What the front doors share: one clear line and exit status 2 for a user's mistake."""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.training.loop import DivergedError


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a bad flag with one line."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the flags)")


def fail(message: str, status: int = 2) -> NoReturn:
    """Writes one line on standard error and exits."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(status)


def guarded(main: Callable[[], int]) -> NoReturn:
    """Runs a front door and exits with its status.

    Bad input (ValueError), files that cannot be read or written, and a device out of memory end it with one line and
    status 2; a diverged loss with status 1.
    """
    logging.set_verbosity(logging.ERROR)  # orbax warns about what is meant: reading a run without writing to it
    try:
        status = main()
    except (ValueError, OSError) as error:
        fail(str(error))
    except DivergedError as error:
        fail(str(error), status=1)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail(f"out of memory: take a smaller batch, model or number of tokens ({str(error)[:200]})")
    raise SystemExit(status)


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what ``sampling_of`` reads, and --max_new_tokens, --min_confidence and --bit_exact."""
    parser.add_argument("--max_new_tokens", type=int, default=128, help="per prompt (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily (default)")
    parser.add_argument("--top_k", type=int, help="sample among the k likeliest tokens")
    parser.add_argument(
        "--top_p", type=float, help="sample among the likeliest tokens that together have probability p"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--greedy_drafts", action="store_true", help="draft the likeliest tokens, also when sampling")
    parser.add_argument(
        "--min_confidence", type=float, default=0.0, help="stop drafting below this joint probability (default: never)"
    )
    parser.add_argument(
        "--bit_exact", action="store_true", help="plain and speculative passes of one width, and so of the same kernels"
    )


def sampling_of(flags: argparse.Namespace) -> Sampling:
    """The sampling that the flags ask for.

    Raises:
      ValueError: a value is out of range.
    """
    if not 0 <= flags.seed < 2**32:
        raise ValueError(f"--seed={flags.seed}: expected 0 to 2**32 - 1")
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.greedy_drafts)
    sampling.validate()
    return sampling


def check_json_path(path: str | None) -> None:
    """Checks that a ``--json`` file can be written, before the work whose figures it is for.

    Raises:
      ValueError: its folder is not there.
    """
    if path is not None and not epath.Path(path).parent.is_dir():
        raise ValueError(f"--json={path}: there is no folder {epath.Path(path).parent}")


def integers(text: str) -> list[int]:
    """Parses a comma-separated list of integers, for argparse."""
    return [int(part) for part in text.split(",")]


def parse_config_flags(arguments: list[str], description: str) -> tuple[Any, str]:
    """Parses ``--config=FILE --workdir=DIR [--config.section.field=value …]``.

    Args:
      arguments: the command line without the program's name.
      description: shown by ``--help``.

    Returns:
      The ConfigDict, overrides applied, and the workdir.

    Raises:
      ValueError: a flag is unknown, missing or does not fit its field, or the config file cannot be loaded.
    """
    values = flags.FlagValues()
    command_line = ["mtpd_jax", *arguments]
    config_flags.DEFINE_config_file(
        "config", None, "a config file, such as configs/quickstart.py; --config.section.field=value overrides a field",
        flag_values=values, sys_argv=command_line,
    )  # fmt: skip
    flags.DEFINE_string("workdir", None, "the run's folder, or a bucket path (gs://…)", flag_values=values)
    if {"--help", "-h", "-help"} & set(arguments):
        print(f"{description}\n\nflags:\n{values.main_module_help() or values.get_help()}")
        raise SystemExit(0)
    named = next((argument.split("=", 1)[1] for argument in arguments if argument.startswith("--config=")), None)
    if named is not None and not pathlib.Path(named.split(":")[0]).is_file():
        raise ValueError(f"--config={named}: no such file")
    try:
        left_over = values(command_line)[1:]
        config = values["config"].value
    except Exception as error:  # a config file is a program of the user's, and may raise anything
        raise ValueError(f"bad config or flag: {type(error).__name__}: {error}") from error
    if left_over:
        raise ValueError(f"unexpected argument {left_over[0]!r}: flags are written --name=value")
    for name in ("config", "workdir"):
        if not values[name].value:
            raise ValueError(f"--{name} is missing")
    return config, str(values["workdir"].value)
