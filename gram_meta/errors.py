"""The error that this package raises for bad input, and other errors' messages as a part of its own."""


class GramError(ValueError):
    """Bad input: a file, an option or an argument that cannot be used.

    The message is one sentence that names the file or key, what was expected and what was found. The command line
    prints it without a traceback and exits with status 2.
    """


def in_one_line(error: BaseException, most: int = 200) -> str:
    """Return at most `most` characters of an error's message, on one line; its class where it has no message."""
    return " ".join(str(error).split())[:most] or type(error).__name__
