"""Checks of arguments that a caller gives."""


def check_integer(name: str, value: object) -> None:
    """Checks the type of an argument.

    Raises:
      ValueError: naming the argument and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} = {value!r}: expected an integer")


def check_number(name: str, value: object) -> None:
    """Checks the type of an argument; see ``check_integer``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} = {value!r}: expected a number")


def check_flag(name: str, value: object) -> None:
    """Checks the type of an argument; see ``check_integer``."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} = {value!r}: expected True or False")
