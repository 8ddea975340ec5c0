"""What an error of storage says: whether a file is broken, or cannot be read or written for the moment."""

import errno
import os
import re

# What says nothing of a file's contents: it may be read later, or by somebody else.
_PASSING = {
    errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOMEM, errno.EAGAIN, errno.EBUSY,
    errno.ETIMEDOUT, errno.ESTALE, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ECONNRESET,
}  # fmt: skip
_PASSING_WORDS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "Too many open files")


def is_passing(error: BaseException) -> bool:
    """Whether an error is of the system that reads, and not of what is read."""
    text, number = _whole_text(error), _error_number(error)
    return number in _PASSING or any(word in text for word in _PASSING_WORDS)


def _whole_text(error: BaseException) -> str:
    """The words of an error and of those that led to it."""
    words, cause = [], error
    while cause is not None and len(words) < 10:
        words.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    return " ".join(" ".join(words).split())


def _error_number(error: BaseException) -> int | None:
    number = re.search(r"os_error_code='(\d+)'|\[Errno (\d+)\]", _whole_text(error))
    if number:
        return int(number[1] or number[2])
    return error.errno if isinstance(error, OSError) else None


def reason(error: BaseException) -> str:
    """Why something could not be read or written, in a few words: what the operating system said, if it spoke."""
    number = _error_number(error)
    return os.strerror(number) if number else " ".join(str(error).split())[:160] or type(error).__name__
