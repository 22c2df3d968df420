"""A copy of what is printed, in a file."""

from __future__ import annotations

import os
import sys
import time
from typing import IO, Any, TextIO

from gram_meta.engine.builtin.utils.tools import mkdir_if_missing

__all__ = ["Logger", "setup_logger"]


class Logger:
    """Replaces `sys.stdout`: writes to the console and to a file. `close` closes the file alone."""

    def __init__(self, fpath: str | None = None, mode: str = "w") -> None:
        self.console: TextIO = sys.stdout
        self.file: IO[str] | None = None
        if fpath is not None:
            mkdir_if_missing(os.path.dirname(fpath))
            self.file = open(fpath, mode, encoding="utf-8")  # noqa: SIM115, closed by close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, msg: str) -> int:
        self.console.write(msg)
        if self.file is not None:
            self.file.write(msg)
        return len(msg)

    def flush(self) -> None:
        self.console.flush()
        if self.file is not None:
            self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def isatty(self) -> bool:
        return self.console.isatty()

    @property
    def encoding(self) -> str:
        return self.console.encoding


def setup_logger(output: str | None = None) -> None:
    """Copy what is printed to `output`: a .txt or .log file, or else a folder, in which it writes log.txt.

    An existing file is kept; the name of the new one then ends in the date.
    """
    if output is None:
        return
    fpath = output if output.endswith((".txt", ".log")) else os.path.join(output, "log.txt")
    if os.path.exists(fpath):
        fpath += time.strftime("-%Y-%m-%d-%H-%M-%S")
    sys.stdout = Logger(fpath)
