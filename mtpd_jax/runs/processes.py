"""What several processes have to agree on: whoever waited for one that went another way would wait for ever."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

_Result = TypeVar("_Result")


def first_decides(value: bool) -> bool:
    """What the first process found, in all of them."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def together(action: Callable[[], _Result], recoverable: type[Exception]) -> _Result:
    """Runs something in every process that may fail in some of them.

    Args:
      action: without collectives of its own.
      recoverable: the kind of error after which all go on alike.

    Raises:
      ``recoverable`` in all processes if any raised that and none anything else; else OSError in those that did not
      fail themselves.
    """
    result = error = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    if jax.process_count() > 1:
        own = 0 if error is None else 1 if isinstance(error, recoverable) else 2
        worst = int(np.max(multihost_utils.process_allgather(np.int32(own))))
        if worst > own:
            elsewhere = "another process cannot read it; its own message says why"
            error = recoverable(elsewhere) if worst == 1 else OSError(elsewhere)
    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType]  # without an error there is one
