"""Checks of arguments that a caller gives."""


def check_integer(name: str, value: object) -> None:
    """Checks the type of an argument.

    Raises:
      ValueError: naming the argument and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} = {value!r}: expected an integer")


def check_count(name: str, value: int) -> None:
    """Checks that an argument is an integer from one on.

    Raises:
      ValueError: naming the argument and the value.
    """
    check_integer(name, value)
    if value < 1:
        raise ValueError(f"{name} = {value}: expected at least one")


def check_number(name: str, value: object) -> None:
    """Checks the type of an argument; see ``check_integer``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} = {value!r}: expected a number")


def check_flag(name: str, value: object) -> None:
    """Checks the type of an argument; see ``check_integer``."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} = {value!r}: expected True or False")
