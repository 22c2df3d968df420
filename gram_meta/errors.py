"""The error that this package raises for bad input, and the errors of the system as such."""

import errno
import sys
import threading
from collections.abc import Callable, Iterator
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
def as_gram_error(path: object = "", what: str = "cannot be written", end: str = "") -> Iterator[None]:
    """Turn an error of the system, such as a full disk, into the `GramError` "path: what (the reason)end".

    Without `path`, the sentence names the file that the error names. Errors of the system are `OSError`, but for those
    of a connection, and what torch's writer raises in their place.
    """
    try:
        yield
    except ConnectionError:
        raise
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        if cause.errno in (errno.ENOSPC, errno.EDQUOT):
            end = end or "; free some space and run the same command again"
        where = f"{path or cause.filename}: " if path or cause.filename else ""
        raise GramError(f"{where}{what} ({cause.strerror or in_one_line(cause)}){end}") from error


# The modules of the packages that the extra `corpus` installs
CORPUS_MODULES = ("pyarrow", "sentence_transformers", "umap", "hdbscan")


@contextmanager
def needs_corpus_extra() -> Iterator[None]:
    """Turn the import error of a package of the extra `corpus` into a `GramError` that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in CORPUS_MODULES:
            raise
        raise GramError(f"expected the package {package}, found none; run pip install 'gram-meta[corpus]'") from None


@contextmanager
def tensorboard_errors(folder: object) -> Iterator[None]:
    """As `as_gram_error`, for a block that writes for TensorBoard: its thread prints no traceback of its own.

    The thread keeps its error, and the next call of its writer raises it.
    """
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard")):
            before(args)

    threading.excepthook = hook
    try:
        with as_gram_error(folder):
            yield
    finally:
        threading.excepthook = before


def exit_status(program: str, run: Callable[[], int]) -> int:
    """Call `run` and return its exit status; report bad input and an interruption in one line on stderr."""
    try:
        with as_gram_error(what="cannot be read or written"), needs_corpus_extra():
            return run()
    except (GramError, ConnectionError, FloatingPointError) as error:  # the last: Dassl's, for a loss of NaN
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
