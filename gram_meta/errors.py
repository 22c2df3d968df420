"""The one error that this project raises for bad input."""


class GramError(ValueError):
    """Something that was given cannot be used.

    The message is one sentence that names the file or key, says what was expected and what was found. The command
    line prints it without a traceback and exits with status 2.
    """
