"""The error that this package raises for bad input, and other errors' messages as a part of its own."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class GramError(ValueError):
    """Bad input: a file, an option or an argument that cannot be used.

    The message is one sentence that names the file or key, what was expected and what was found. The command line
    prints it without a traceback and exits with status 2.
    """


def in_one_line(error: BaseException, most: int = 200) -> str:
    """Return at most `most` characters of an error's message, on one line; its class where it has no message."""
    return " ".join(str(error).split())[:most] or type(error).__name__


@contextmanager
def system_errors(path: object) -> Iterator[None]:
    """Raise an error of the system (a full disk, a vanished file) as one sentence with its file, or else with `path`.

    Raises:
        GramError: the block raised an OSError, other than that of a connection.
    """
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise GramError(f"{path}: no space left on the device; free some and run the same command again") from None
        reason = error.strerror or in_one_line(error)
        raise GramError(f"{error.filename or path}: expected to read and write there, found: {reason}") from None
