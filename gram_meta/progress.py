"""Progress bars: a moving bar on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sized
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> tqdm:
    """Return a progress bar on stderr.

    Where stderr is no terminal, the bar writes whole lines: at most one for each tenth of the work and each 30 seconds,
    and one at the end of what took longer.

    Args:
        iterable, options: as for tqdm.
        shown: False: show nothing.
    """
    if not shown or sys.stderr.isatty():
        return tqdm(iterable, disable=not shown, **options)
    total = options.get("total") or (len(iterable) if isinstance(iterable, Sized) else 0)
    form = "{l_bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    sparse = {"mininterval": 30, "miniters": max(total / 10, 1), "delay": 1e-6}  # delay: no line at the start
    return _Lines(iterable, **{**options, **sparse, "bar_format": form})


class _Lines(tqdm):
    """A bar that writes lines."""

    monitor_interval = 0  # no thread that asks for more of them

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        self.fp.write(f"{self if msg is None else msg}\n")
        self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Do nothing: a line stays."""

    def close(self) -> None:
        if not self.disable and self.n > self.last_print_n and self.format_dict["elapsed"] >= self.mininterval:
            self.display()
        self.leave = self.disable = True

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        print(s, file=file or sys.stdout, end=end)
