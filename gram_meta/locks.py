"""One lock for each output folder, so that two commands never write to one folder at once."""

import errno
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from gram_meta.errors import GramError, as_gram_error
from gram_meta.files import PathLike, remove_unfinished

LOCK = ".gram-lock"  # hidden: CoOp's parser and the checks for an empty folder skip it
MARKER = ".gram-lock-marker"  # instead of LOCK, on a file system without flock: its existence is the lock
WAIT = 30.0  # seconds; a job that Slurm requeues starts while its former process is still ending
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def only_writer(folder: PathLike, here: bool = True) -> Iterator[None]:
    """Hold the lock of an output folder, without the half-written files of a killed process.

    The folder is created, and removed again if it is empty at the end.

    Args:
        folder: the output folder.
        here: False in the ranks of `torchrun` for which rank 0 holds the lock.

    The system frees the lock when the process ends, however it ends. The lock is reentrant within a thread.

    Raises:
        GramError: another process holds the lock for longer than `WAIT` seconds, or the folder cannot be written.
    """
    if not here:
        yield
        return
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    if folder.is_file():
        raise GramError(f"{folder}: expected a folder for the output, found a file")
    with as_gram_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(folder)
    try:
        if lock.lock_counter == 1:
            remove_unfinished(folder)
        yield
    finally:
        if lock.lock_counter == 1 and isinstance(lock, FileLock):
            (folder / LOCK).unlink(missing_ok=True)  # who waits for it sees that, and takes the new file's lock
        lock.release()
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def tidy(folder: PathLike) -> None:
    """Remove what a killed process left in an output folder, if it left its lock and no other process has it now."""
    lock = Path(folder, LOCK)
    with suppress(OSError, Timeout):
        if lock.exists():
            with FileLock(lock, timeout=0):
                remove_unfinished(folder)
                lock.unlink()


def _acquire(folder: Path) -> BaseFileLock:
    lock: BaseFileLock = FileLock(folder / LOCK, is_singleton=True, on_acquired=_write_holder)
    try:
        return _wait_for(lock, folder)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
    (folder / LOCK).unlink(missing_ok=True)
    return _wait_for(SoftFileLock(folder / MARKER, is_singleton=True), folder)


def _wait_for(lock: BaseFileLock, folder: Path) -> BaseFileLock:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{folder}: another run is writing to it{_holder(lock)}; waiting for up to {WAIT:.0f} s", file=sys.stderr)
        try:
            lock.acquire(timeout=WAIT)
        except Timeout:
            gone = "" if isinstance(lock, FileLock) else f", or remove {lock.lock_file} if that run has ended"
            advice = f"wait until it has ended, or choose another folder{gone}"
            raise GramError(f"{folder}: another run is writing to this folder{_holder(lock)}; {advice}") from None
    return lock


def _write_holder(handle: int) -> None:
    """Write into the lock file who holds it; on a full disk the lock holds without that."""
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.argv),
    }
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(holder).encode(), 0)


def _holder(lock: BaseFileLock) -> str:
    """Describe who holds a lock, as far as its file says."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        facts = json.loads(Path(lock.lock_file).read_text(encoding="utf-8"))
        return " (process {pid} on {host}, since {since}: {command})".format(**facts)
    return ""
