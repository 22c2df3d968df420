"""A command of `gram` in a process of its own: forked from this one, which has imported it, or a new interpreter."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

LIMIT = 300.0  # seconds after which a process counts as hanging
_numbers = itertools.count()


class Process:
    """A process that runs `gram ARGV` in the folder `cwd` and prints to a file.

    Args:
        argv: the arguments; or a function that is called instead.
        cwd: the working directory.
        before: called in the process first; not for a new interpreter.
        fresh: start a new interpreter.
    """

    def __init__(
        self,
        argv: Sequence[str] | Callable[[], object],
        cwd: Path,
        before: Callable[[], object] | None = None,
        fresh: bool = False,
    ) -> None:
        self.argv, self.cwd, self.before, self.fresh = argv, cwd, before, fresh
        self.log = cwd / "printed" / f"{next(_numbers)}.txt"
        self.log.parent.mkdir(exist_ok=True)
        self.started = time.monotonic()
        self.seconds = 0.0
        self.process = multiprocessing.get_context("fork").Process(target=self._run)
        self.process.start()

    def _run(self) -> None:
        out = open(self.log, "w", buffering=1, encoding="utf-8")
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
        sys.stdout = sys.stderr = out
        os.chdir(self.cwd)
        if self.fresh and not callable(self.argv):
            os.execv(sys.executable, [sys.executable, "-m", "gram_meta", *self.argv])
        status: object = 1
        try:
            if self.before is not None:
                self.before()
            status = self._work()
        except SystemExit as error:
            status = error.code
            if isinstance(status, str):
                print(status)
        except BaseException:
            traceback.print_exc()
        finally:
            out.flush()
            os._exit(status if isinstance(status, int) else int(status is not None))

    def _work(self) -> object:
        from gram_meta import cli
        from gram_meta.errors import exit_status

        if callable(self.argv):
            return exit_status("gram soak", lambda: self.argv() or 0)  # type: ignore[operator, return-value]
        sys.argv = ["gram", *self.argv]
        return cli.main()

    def kill_after(self, seconds: float) -> None:
        """Send SIGKILL after so many seconds from the start, unless the process ends before."""
        self.join(self.started + seconds - time.monotonic())
        self.process.kill()
        self.wait()

    def join(self, seconds: float) -> None:
        """Wait for the end, for so many seconds at most; Process.join has no limit after execv closed its pipe."""
        until = time.monotonic() + seconds
        while self.process.exitcode is None and time.monotonic() < until:
            time.sleep(0.005)

    def wait(self) -> int | str:
        """Return the exit status, minus the signal that ended it; "hangs" after `LIMIT` seconds."""
        self.join(LIMIT)
        self.seconds = time.monotonic() - self.started
        if self.process.exitcode is None:
            self.process.kill()
            self.join(LIMIT)
            return "hangs"
        return self.process.exitcode

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended the process."""
        return self.process.exitcode == -signal.SIGKILL

    def printed(self) -> str:
        """Return what the process has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")
