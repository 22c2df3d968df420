"""Processes that run commands of `gram`, one at a time each: one per GPU, or one per share of the cores.

Workers are started anew (spawn), with their environment set before torch is imported, and stay: importing torch costs
seconds. A worker that dies takes one run with it; the next run gets another worker. Light at import.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from gram_meta.processes import cores

GRACE = 10.0  # seconds that a stopped worker has to leave whole files behind
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Task:
    """A command for a worker, and the file for its output, which is kept only if the command fails.

    Instead of a command of `gram`: ("python", "-c", code), or ("call",) with a function and its arguments.
    """

    key: str
    argv: tuple[str, ...]
    log: str
    call: tuple[Callable[..., Any], tuple[Any, ...]] | None = None


@dataclass(frozen=True)
class Outcome:
    """How a task ended. `result`: the metrics of a run, or the result of a call. `error`: one line, if it failed."""

    key: str
    seconds: float
    result: Any = None
    error: str = ""
    broken: bool = False  # the worker is not to be used again


def places(jobs: int, gpus: Sequence[str] = ()) -> list[dict[str, str]]:
    """Return the environment of each worker: a GPU, and a share of the cores unless the user has set the threads."""
    count = len(gpus) or jobs
    threads = str(max(cores() // count, 1))
    shares = {name: os.environ.get(name, threads) for name in THREADS} | {"TOKENIZERS_PARALLELISM": "false"}
    return [shares | ({"CUDA_VISIBLE_DEVICES": gpus[i]} if gpus else {}) for i in range(count)]


# ------------------------------------------------------------------------------------------------- in the main process


class Pool:
    """Worker processes with at most one task at a time: `start(task)` while `free`, then `wait()` for outcomes."""

    def __init__(self, environments: Sequence[Mapping[str, str]]) -> None:
        self.idle: list[_Worker] = []
        self.busy: list[_Worker] = []
        self.unused = list(environments)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def free(self) -> int:
        """Return how many tasks can be started now."""
        return len(self.idle) + len(self.unused)

    def start(self, task: Task) -> None:
        """Give a task to an idle worker, or to a new one."""
        worker = self.idle.pop() if self.idle else _Worker(self.unused.pop(0))
        self.busy.append(worker)
        worker.give(task)

    def wait(self) -> list[Outcome]:
        """Sleep until a task has ended; return all that have ended."""
        wait([handle for worker in self.busy for handle in (worker.connection, worker.process.sentinel)])
        outcomes = []
        for worker in list(self.busy):
            outcome = worker.outcome()
            if outcome is None:
                continue
            outcomes.append(outcome)
            self.busy.remove(worker)
            if outcome.broken:
                worker.stop()
                self.unused.append(worker.environment)
            else:
                self.idle.append(worker)
        return outcomes

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of a function that a worker calls; a failure is raised as a `GramError`."""
        from gram_meta.errors import GramError

        with tempfile.TemporaryDirectory() as folder:
            self.start(Task("call", ("call",), f"{folder}/log", (function, arguments)))
            outcomes: list[Outcome] = []
            while not outcomes:  # a dying process may wake `wait` before it has ended
                outcomes = self.wait()
            (outcome,) = outcomes
        if outcome.error:
            raise GramError(outcome.error)
        return outcome.result

    def stop(self) -> None:
        """End all workers and what they have started; their runs can be resumed.

        A second Ctrl-C would leave some of the processes behind, so it is ignored meanwhile.
        """
        with handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM):
            workers, self.idle, self.busy = [*self.idle, *self.busy], [], []
            for worker in workers:
                worker.process.terminate()
            deadline = time.monotonic() + GRACE
            for worker in workers:
                worker.stop(max(deadline - time.monotonic(), 0.1))


class _Worker:
    """One process and its task."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, dict(environment)), daemon=False)
        self.process.start()
        theirs.close()  # or the end of the process would not be seen
        self.task: Task | None = None
        self.begun = 0.0

    def give(self, task: Task) -> None:
        self.task, self.begun = task, time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionError):  # it died: `outcome` reports that
            self.connection.send(task)

    def outcome(self) -> Outcome | None:
        """Return how the task ended; None while it runs."""
        assert self.task is not None
        alive = self.process.is_alive()  # asked before `poll`, which then sees all that a dead process has sent
        with contextlib.suppress(EOFError, OSError):
            if self.connection.poll():
                return self.connection.recv()
            if alive:
                return None
        self.process.join(GRACE)
        seconds = time.monotonic() - self.begun
        return Outcome(self.task.key, seconds, error=_cause_of_death(self.process.exitcode), broken=True)

    def stop(self, grace: float = GRACE) -> None:
        self.process.terminate()
        self.process.join(grace)
        if self.process.pid:  # the worker leads a process group, which ends with it
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def _cause_of_death(status: int | None) -> str:
    if status is None or status >= 0:
        return f"the worker process ended with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
    hint = "; perhaps for lack of memory" if name == "SIGKILL" else ""
    return f"the worker process was ended by {name}{hint}"


@contextlib.contextmanager
def handled(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Give these signals a handler inside the block; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


# ----------------------------------------------------------------------------------------------------- in the workers


def _serve(connection: Connection, environment: dict[str, str]) -> None:
    """Run tasks until the main process closes the connection, ends, or sends SIGTERM."""
    os.environ.update(environment)  # numpy and torch, which read it, are not imported yet
    os.setsid()  # Ctrl-C reaches only the main process, which then ends this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_follow_parent, daemon=True).start()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        outcome = _run(task)
        connection.send(outcome)
        if outcome.broken:
            return


def _leave(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: clean-up of half-written files begins now
    raise SystemExit(143)


def _follow_parent() -> None:
    """End this process when the main process ends, however that happens."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _run(task: Task) -> Outcome:
    Path(task.log).parent.mkdir(parents=True, exist_ok=True)
    with open(task.log, "w", encoding="utf-8") as log:
        failed = False
        try:
            with _printing_to(log.fileno()):
                outcome = _attempt(task)
            failed = bool(outcome.error)
        finally:
            if not failed:  # or the worker is stopping
                Path(task.log).unlink(missing_ok=True)
    return outcome


def _attempt(task: Task) -> Outcome:
    from gram_meta.errors import GramError

    begun = time.monotonic()
    try:
        if task.argv[0] == "train":
            import gram_meta.plugin  # noqa: F401, torch and CLIP, once a worker: not part of the first run's time
            from gram_meta.backbone import clip

            clip.keeps_last = True  # most runs have the CLIP of the run before
            begun = time.monotonic()
        result = _execute(task)
    except GramError as error:
        print(f"{error}", file=sys.stderr)
        return Outcome(task.key, time.monotonic() - begun, error=str(error))
    except Exception as error:  # a fault of the program or of the machine, which may leave memory occupied
        traceback.print_exc()
        words = " ".join(str(error).split())[:300]  # the log has all of it
        error_line = f"{type(error).__name__}: {words}" if words else type(error).__name__
        return Outcome(task.key, time.monotonic() - begun, error=error_line, broken=True)
    gc.collect()
    return Outcome(task.key, time.monotonic() - begun, result)


def _execute(task: Task) -> Any:
    """Run the command in this process; return the metrics of a run that tested something."""
    from gram_meta.errors import GramError

    if task.call is not None:
        function, arguments = task.call
        return function(*arguments)
    if task.argv[0] == "python":
        done = subprocess.run([sys.executable, *task.argv[1:]], check=False)
        if done.returncode:
            raise GramError(_last_line(task.log) or f"python ended with status {done.returncode}")
        return None
    if task.argv[0] == "train":
        from gram_meta.coop import launch

        return launch.train(task.argv[1:], quiet=True).get("metrics")
    from gram_meta import cli

    status = cli.main(task.argv)
    if status:
        raise GramError(_last_line(task.log) or f"gram {task.argv[0]} ended with status {status}")
    return None


def _last_line(path: str) -> str:
    sys.stderr.flush()
    lines = Path(path).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


@contextlib.contextmanager
def _printing_to(handle: int) -> Iterator[None]:
    """Send what this process and its children print to a file, and afterwards to nowhere."""
    for number in (1, 2):
        os.dup2(handle, number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(nowhere, number)
        os.close(nowhere)
