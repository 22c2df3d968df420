"""Progress bars: a moving bar on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Sized
from typing import Any

from tqdm import tqdm

from gram_meta.processes import ProcessGroup

EVERY = 0.5  # seconds between updates of a bar that processes share
_BARS = itertools.count()  # all processes of a group create their bars in the same order


def progress_bar(iterable: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> tqdm:
    """Return a progress bar of tqdm on stderr; without `shown` it shows nothing.

    Where stderr is no terminal, the bar writes whole lines: at most one for each tenth of the work and each 30 seconds,
    and one at the end of what took longer.
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


class SharedBar:
    """A progress bar on rank 0 of what all processes of a group have done, beside what an earlier run has `done`.

    Updates also tell a process that works by itself for long that another one has failed: then it ends.
    """

    def __init__(self, group: ProcessGroup, total: int, unit: str, shown: bool, done: int = 0) -> None:
        self.name = f"bar {next(_BARS)}"
        self.group = group
        self.done = done
        self.pending, self.last = 0, 0.0
        self.bar = progress_bar(total=total, initial=done, unit=unit, shown=shown and group.is_first, smoothing=0.05)

    def add(self, amount: int) -> None:
        """Count what this process has done since the last call."""
        self.pending += amount
        if time.monotonic() > self.last + EVERY:
            self.show()

    def show(self) -> None:
        """Share this process's count and update the bar."""
        done = self.done + self.group.count(self.name, self.pending)
        self.pending, self.last = 0, time.monotonic()
        self.bar.update(done - self.bar.n)

    def __enter__(self) -> SharedBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            self.show()
        self.bar.close()
