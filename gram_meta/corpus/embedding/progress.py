"""One progress bar for the work of several processes."""

from __future__ import annotations

import itertools
import time
from typing import Any

from gram_meta.processes import ProcessGroup
from gram_meta.progress import progress_bar

EVERY = 0.5  # seconds between updates
_BARS = itertools.count()  # all processes of a group create their bars in the same order


class SharedBar:
    """A progress bar on rank 0 that counts what all processes of a group have done.

    Updates also tell a process that works by itself for long that another one has failed: then it ends.

    Args:
        total, unit: as for tqdm. shown: whether rank 0 shows the bar. done: what an earlier run has done.
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
