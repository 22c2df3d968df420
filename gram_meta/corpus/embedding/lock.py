"""The lock on a store's folder: only one run may write to it."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gram_meta.corpus.store import MANIFEST
from gram_meta.errors import GramError
from gram_meta.files import MARK, PathLike, file_locks

log = logging.getLogger(__name__)

LOCK = ".lock"
_HELD: set[Path] = set()  # by this process: record locks do not exclude a process from its own files


def check_free(out: PathLike) -> None:
    """Check that a run can write to this store.

    Raises:
        GramError: another run is writing to it, `out` is not a folder for a store, or the system has no file locks.
    """
    file_locks()
    out = Path(out)
    _check_folder(out)
    if out.resolve() in _HELD:
        raise GramError(_busy(out))
    if (out / LOCK).exists():
        with open(out / LOCK, "a") as file:
            _lock(file, out)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Create the folder and lock it for this process; the lock ends with the process, however that ends.

    It is a record lock, not a `flock`: that would survive in forked image workers for seconds after their parent was
    killed.
    """
    _check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    key = out.resolve()
    if key in _HELD:
        raise GramError(_busy(out))
    with open(out / LOCK, "a") as file:
        _lock(file, out)
        _HELD.add(key)
        try:
            yield
        finally:
            _HELD.discard(key)


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise GramError(f"{out}: expected a folder for the store, found a file")
    of_a_store = (LOCK, MARK, f".{MANIFEST}.")  # before the manifest is written
    if out.is_dir() and not (out / MANIFEST).exists() and not all(p.name.startswith(of_a_store) for p in out.iterdir()):
        raise GramError(f"{out}: expected an empty folder or a pair store, found other files")


def _lock(file: IO[Any], out: Path) -> None:
    fcntl = file_locks()
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise GramError(_busy(out)) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log.warning("%s: its file system has no locks; make sure that no second run writes to it", out)


def _busy(out: Path) -> str:
    return f"{out}: another run is at work on this store; wait for it, or choose another folder"
