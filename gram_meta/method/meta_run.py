"""The folder of a meta-training run: identity, resume, checkpoints, logs, and the reaction to SIGTERM.

`meta_files` names the files; `tensorboard/` has the scores of the log, and the training loss. All ranks call the same
methods; rank 0 alone reads and writes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, TypedDict, TypeVar

import torch
from yacs.config import CfgNode

from gram_meta.config import INCIDENTAL, as_dict, flatten, stored_config
from gram_meta.engine.checkpoints import check_finite, read_checkpoint, restoring
from gram_meta.errors import GramError, as_gram_error, tensorboard_errors
from gram_meta.files import Count, atomic_write, check_type, parse_json, read_json, read_text, to_json, write_json
from gram_meta.method.checkpoint import MetaCheckpoint, save_meta_checkpoint
from gram_meta.method.meta_files import FACTS, LOG, STATE
from gram_meta.processes import ALONE, ProcessGroup
from gram_meta.progress import progress_bar
from gram_meta.trackers import Tracker, Trackers

logger = logging.getLogger("gram")
T = TypeVar("T")

RECORDED = ("CHC",)  # nodes that describe the hierarchy, whose fingerprint tells runs apart


class Stopped(Exception):
    """SIGTERM arrived; the step was finished and the state saved for --resume."""


class Sigterm:
    """Inside `with`, SIGTERM sets `received` and does not end the process. Slurm sends it before a job's time is up."""

    received = False

    def __enter__(self) -> Sigterm:
        self.in_main_thread = threading.current_thread() is threading.main_thread()  # others cannot catch signals
        if self.in_main_thread:
            self.before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self.in_main_thread:
            signal.signal(signal.SIGTERM, self.before)

    def _receive(self, *_: object) -> None:
        self.received = True

    def next_of(self, items: Iterator[T]) -> T | None:
        """Return the next item; None if SIGTERM has also ended the processes that make the items."""
        try:
            return next(items)
        except (GramError, RuntimeError):
            if not self.received:
                raise
            return None


class _Facts(TypedDict, total=False):
    """The type of run.json."""

    config: dict[str, Any]
    version: str


class _Line(TypedDict):
    """The type of a line of log.jsonl."""

    step: Count


class _State(TypedDict):
    """The type of state.pt."""

    step: Count
    theta: dict[str, Any]
    regulator: dict[str, Any]
    optimiser: dict[str, Any]
    norms: Any
    best: dict[str, float]


class MetaRun:
    """Reads and writes the folder `out` of a run; `facts`, JSON values, belong to its identity beside its settings."""

    def __init__(self, out: Path, config: CfgNode, facts: Mapping[str, Any], group: ProcessGroup = ALONE) -> None:
        self.out, self.group = out, group
        self.identity = json.loads(json.dumps({"config": as_dict(config), **facts}))

    def begin(self) -> None:
        """Write the identity of a new run; raise `GramError` if the folder holds a run."""

        def begin() -> None:
            if (self.out / FACTS).exists():
                raise GramError(f"{self.out}: expected an empty folder, found a meta-training; --resume goes on")
            write_json(self.out / FACTS, self.identity)

        self.group.first(begin)

    def resume(self) -> dict[str, Any] | None:
        """Return the last saved state, None if there is none; raise `GramError` if the folder holds another run."""
        if not self.group.first((self.out / FACTS).exists):
            logger.info(f"{self.out}: holds no meta-training yet; a new one begins")
            self.begin()
            return None
        return self.group.first(self._read_state)

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Write state.pt, atomically."""
        if self.group.is_first:
            with atomic_write(self.out / STATE) as file:
                torch.save(state, file)

    def save_checkpoint(self, name: str, checkpoint: MetaCheckpoint) -> None:
        """Write a meta-checkpoint, atomically."""
        if self.group.is_first:
            save_meta_checkpoint(self.out / name, checkpoint)

    @contextmanager
    def log(self, first: int, steps: int, batch: int, progress: bool) -> Iterator[MetaLog]:
        """Open the logs of a run that continues after step `first`, and close them at the end."""
        bar = progress_bar(
            total=steps * batch, initial=first * batch, unit=" tasks", desc="meta-training", shown=progress
        )
        with tensorboard_errors(self.out), self._trackers(first) as trackers, self._open_log(first) as lines, bar:
            yield MetaLog(lines, trackers, bar, batch)

    def _trackers(self, first: int) -> Any:
        """Open the trackers of a run that continues after step `first`; on other ranks than 0, a context of None."""
        if not self.group.is_first:
            return nullcontext()
        return Trackers(self.out, flatten(self.identity["config"]), first + 1 if first else 0)

    def _open_log(self, first: int) -> IO[str]:
        """Open log.jsonl without the lines after step `first`, which will be written again."""
        if not self.group.is_first:
            return open(os.devnull, "w", encoding="utf-8")
        path = self.out / LOG
        kept = []
        if first and path.exists():
            kept = [line for line in read_text(path).splitlines() if _step_of(line) <= first]
        with atomic_write(path, "w") as file:
            file.writelines(line + "\n" for line in kept)
        return open(path, "a", encoding="utf-8")

    def _read_state(self) -> dict[str, Any] | None:
        before, now = read_json(self.out / FACTS, _Facts), dict(self.identity)
        if "config" in before:  # if the run is older than a key, the key counts as having had its default
            before["config"] = json.loads(json.dumps(as_dict(stored_config(before["config"]))))
        for facts in (before, now):
            config = facts.get("config", {})
            facts["config"] = {node: values for node, values in config.items() if node not in (*INCIDENTAL, *RECORDED)}
        if before.get("version") != now.get("version"):  # of gram-meta: a note, not another run
            logger.info(f"{self.out}: begun by gram-meta {before.get('version')}, goes on with {now.get('version')}")
        for key in now:
            if key != "version" and before.get(key) != now[key]:
                raise GramError(f"{self.out}: expected the same {_first_difference(key, before.get(key), now[key])}")
        if not (self.out / STATE).exists():
            return None  # the run was interrupted before its first state
        state = check_type(read_checkpoint(self.out / STATE), _State, str(self.out / STATE))
        with restoring(self.out / STATE):
            check_finite(self.out / STATE, state["theta"] | state["regulator"])
        return state


class MetaLog:
    """Open logs of a run: log.jsonl, trackers (rank 0 alone) and the progress bar."""

    def __init__(self, lines: IO[str], trackers: Tracker | None, bar: Any, batch: int) -> None:
        self.lines, self.trackers, self.bar, self.batch = lines, trackers, bar, batch

    def held_out(self, step: int, scores: Mapping[str, float]) -> None:
        """Log the scores of the held-out tasks."""
        self.track(step, {f"held_out/{key}": value for key, value in scores.items()})
        finite = {key: value if math.isfinite(value) else None for key, value in scores.items()}
        with as_gram_error(self.lines.name):
            self.lines.write(to_json({"step": step, **finite}, LOG) + "\n")
            self.lines.flush()
        self.bar.set_postfix(
            refresh=False, loss=f"{scores['loss_after']:.3f}", acc=f"{100 * scores['accuracy_after']:.1f}%"
        )

    def track(self, step: int, metrics: Mapping[str, float]) -> None:
        """Give numbers to the trackers, on rank 0."""
        if self.trackers is not None:
            self.trackers.log(step, metrics)


def _step_of(line: str) -> float:
    """Return the step of a line of log.jsonl; a line that was cut off or edited comes after all steps."""
    try:
        return parse_json(line, LOG, _Line)["step"]
    except GramError:
        return math.inf


def _first_difference(key: str, before: Any, now: Any) -> str:
    """Return the deepest key in which two runs differ, with both values."""
    while isinstance(before, dict) and isinstance(now, dict):
        name = next((k for k in sorted({*before, *now}) if before.get(k) != now.get(k)), None)
        if name is None:
            break
        key, before, now = f"{key}.{name}", before.get(name), now.get(name)
    return f"{key} as in the run to resume, {before!r}, found {now!r}"
