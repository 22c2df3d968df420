"""Shards that a process has open, to read single images from: a bounded number, whatever a corpus has.

The caches belong to the process, so a reader stays small and can be sent to worker processes. A forked process begins
with empty ones; tars are read with `os.pread`, which knows no position that threads or processes could share.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from gram_meta.errors import GramError

T = TypeVar("T")

MAX_OPEN = 64  # files; a process may mostly have 1,024


class Opened(Generic[T]):
    """The most recently used of what `make` gives for a key, at most `most` of them.

    What is dropped is not closed but let go of: a thread that still reads from it keeps it alive.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.lock = threading.Lock()
        self.held: OrderedDict[object, T] = OrderedDict()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin_anew)

    def get(self, key: object, make: Callable[[], T]) -> T:
        with self.lock:
            if key in self.held:
                self.held.move_to_end(key)
                return self.held[key]
        made = make()
        with self.lock:
            made = self.held.setdefault(key, made)
            while len(self.held) > self.most:
                self.held.popitem(last=False)
        return made

    def _begin_anew(self) -> None:  # another thread may have held the lock when the process was forked
        self.lock = threading.Lock()
        self.held = OrderedDict()


class TarFile:
    """An open tar shard."""

    def __init__(self, path: Path, size: int | None) -> None:
        self.path = path
        self.size = check_shard(path, size)
        self.file = open(path, "rb", buffering=0)

    def read(self, offset: int, size: int) -> bytes:
        """The `size` bytes from `offset`; an `OSError` where the disk does not give them.

        Raises:
            GramError: the file ends before.
        """
        content = b""
        while len(content) < size:
            more = os.pread(self.file.fileno(), size - len(content), offset + len(content))
            if not more:
                raise GramError(changed(self.path, f"at least {offset + size} bytes", f"{self.size}"))
            content += more
        return content


def check_shard(path: Path, size: int | None) -> int:
    """The size of a shard.

    Raises:
        GramError: it is not there, or not of `size` (None: of any).
    """
    try:
        found = path.stat().st_size
    except OSError as error:
        raise GramError(f"{path}: expected the shard that was embedded, found {error.strerror}") from None
    if size is not None and found != size:
        raise GramError(changed(path, f"{size} bytes", f"{found}"))
    return found


def changed(path: Path, expected: str, found: str) -> str:
    """What a message says of a shard that is not the one it was."""
    return f"{path}: expected the shard that was embedded, of {expected}, found {found}: it has changed since"


TARS: Opened[TarFile] = Opened(MAX_OPEN)
