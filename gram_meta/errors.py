"""The error that this package raises for bad input."""


class GramError(ValueError):
    """Bad input: a file, an option or an argument that cannot be used.

    The message is one sentence that names the file or key, what was expected and what was found. The command line
    prints it without a traceback and exits with status 2.
    """
