"""The loop of a bench: finished runs are skipped, failures are reported, and the other runs go on."""

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TypedDict

from gram_meta.bench.matrix import BenchRun, BenchSettings, meta_state
from gram_meta.bench.pool import Outcome, Pool, Task, handled
from gram_meta.clustering.hierarchy import TOPICS
from gram_meta.errors import GramError
from gram_meta.files import Number, read_json, write_json
from gram_meta.locks import only_writer
from gram_meta.progress import progress_bar
from gram_meta.runs import layout
from gram_meta.runs.folder import open_folder

MANIFEST = "bench.json"
LOGS = "bench_logs"  # the output of failed runs
SHOWN = 10  # failed runs that are named again at the end


def show(jobs: Sequence[BenchRun], settings: BenchSettings, environments: Sequence[Mapping[str, str]]) -> None:
    """Print all commands in order, as a user types them; finished ones as comments."""
    with Pool(environments[:1]) as pool:
        states = pool.call(look, jobs, settings)
    for job in jobs:
        state = states[job.folder]
        marks = {"finished": "# finished: ", "refused": f"# {state.why}\n# refused: "}
        print(marks.get(state.name, "") + job.line)


def run(
    jobs: Sequence[BenchRun],
    settings: BenchSettings,
    environments: Sequence[Mapping[str, str]],
    say: Callable[[str], None] = print,
    part: bool = False,
) -> int:
    """Run what is not finished; return the exit status: 0 all finished, 1 some failed, 130 interrupted.

    With `part`, other processes run the other runs of the bench at the same time: each run locks its own folder, nobody
    locks the output folder, and bench.json stays as it is.
    """
    as_ctrl_c = handled(signal.default_int_handler, signal.SIGTERM, signal.SIGHUP)  # and a closed terminal
    lock = nullcontext() if part else only_writer(settings.output)
    with as_ctrl_c, lock, Pool(environments) as pool:
        states = pool.call(look, jobs, settings)
        manifest = Manifest(settings.output, settings, jobs, pool.call(_versions), kept=not part)
        options: dict[str, Any] = {"unit": " runs", "desc": "bench", "smoothing": 0, "dynamic_ncols": True}
        with progress_bar(total=len(jobs), shown=sys.stderr.isatty(), **options) as bar:
            bench = Bench(jobs, states, settings.output, Clock(len(environments), manifest.durations), bar, say)
            bench.introduce()
            try:
                bench.run(pool)
            except KeyboardInterrupt:
                pool.stop()
                bench.say("interrupted; the same command goes on here")
                return 130
            finally:
                manifest.end(bench)
            return bench.conclude()


# ------------------------------------------------------------------------------------------------------ states of runs


@dataclass(frozen=True)
class State:
    name: str  # finished, unfinished, new or refused
    why: str = ""


def look(jobs: Sequence[BenchRun], settings: BenchSettings) -> dict[Path, State]:
    """Return the state of every run; an unknown option is a `GramError`. What needs an unfinished run is unfinished."""
    states: dict[Path, State] = {}
    for job in jobs:
        waits = any(states[folder].name != "finished" for folder in job.after if folder in states)
        states[job.folder] = _state(job, settings, waits)
    return states


def _state(job: BenchRun, settings: BenchSettings, waits: bool) -> State:
    if job.argv[0] == "train":
        return _run_state(job, waits)
    if job.argv[0] == "pretrain":
        return State(meta_state(job.folder, settings.meta_opts))
    if job.argv[0] == "embed":
        manifest = job.folder / "manifest.json"
        finished = manifest.is_file() and read_json(manifest, dict[str, Any]).get("finished") is True
    elif job.argv[0] == "cluster":
        finished = (job.folder / TOPICS).is_file()
    else:
        finished = all(path.exists() for path in job.leaves)
    return State("finished" if finished else "new")


def _run_state(job: BenchRun, waits: bool) -> State:
    """Return the state of a training or test as `gram train` finds it: from the run that run.json names."""
    from gram_meta.coop import launch

    args = launch.build_parser().parse_args(job.argv[1:])
    cfg = launch.setup_cfg(args)
    if waits:  # its identity depends on files that do not exist yet
        return State("unfinished" if (job.folder / layout.RUN).is_file() else "new")
    try:
        folder = open_folder(cfg, args)
    except GramError as error:
        return State("refused", str(error))
    return State("finished" if folder.finished else "unfinished" if folder.goes_on else "new")


# -------------------------------------------------------------------------------------------------------------- loop


class Bench:
    """The runs to do, those in progress, and the results of the others."""

    def __init__(
        self,
        jobs: Sequence[BenchRun],
        states: Mapping[Path, State],
        output: Path,
        clock: "Clock",
        bar: Any,
        say: Callable[[str], None],
    ) -> None:
        self.jobs = {job.folder: job for job in jobs}
        self.states, self.output, self.clock, self.bar, self._say = states, output, clock, bar, say
        self.before = [f for f, state in states.items() if state.name == "finished"]
        self.done: set[Path] = set(self.before)
        self.todo = [job for job in jobs if job.folder not in self.done]
        self.running: dict[str, BenchRun] = {}
        self.failed: dict[Path, str] = {}

    def say(self, line: str) -> None:
        """Print a line, above the progress bar on a terminal."""
        with self.bar.external_write_mode():
            self._say(line)
            sys.stdout.flush()  # users read a log file while it grows

    def introduce(self) -> None:
        goes_on = sum(state.name == "unfinished" for state in self.states.values())
        parts = [f"{len(self.before)} finished before"] if self.before else []
        parts += [f"{goes_on} to go on with"] if goes_on else []
        self.say(f"{len(self.jobs)} runs in {self.output}" + (f": {', '.join(parts)}" if parts else ""))
        self.bar.update(len(self.before))

    def run(self, pool: Pool) -> None:
        while self.todo or self.running:
            waiting = len(self.todo)
            while pool.free and (job := self._next()):
                self.running[str(job.folder)] = job
                pool.start(Task(str(job.folder), job.command, str(self._log(job))))
            if self.running:
                for outcome in pool.wait():
                    self._ended(self.running.pop(outcome.key), outcome)
            else:  # the remaining runs failed with those that they need
                assert len(self.todo) < waiting, "runs that wait for each other"

    def _next(self) -> BenchRun | None:
        """Return the first run whose needs are finished; a run that needs a failed one fails."""
        for job in list(self.todo):
            state = self.states[job.folder]
            broken = next((folder for folder in job.after if folder in self.failed), None)
            if state.name == "refused" or broken is not None:
                self.todo.remove(job)
                why = state.why if broken is None else f"needs {self.jobs[broken].title}, which failed"
                self._fail(job, why, report=broken is None)
            elif all(folder in self.done for folder in job.after if folder in self.jobs):
                self.todo.remove(job)
                return job
        return None

    def _ended(self, job: BenchRun, outcome: Outcome) -> None:
        if outcome.error:
            log = self._log(job)
            where = f" (log: {log})" if log.is_file() else ""
            self._fail(job, f"{outcome.error}{where}")
            return
        self.done.add(job.folder)
        self.clock.passed(job.pace, outcome.seconds)
        accuracy = (outcome.result or {}).get("accuracy")
        result = "" if accuracy is None else f": {accuracy:.1f}"
        left = self.clock.left([j.pace for j in [*self.todo, *self.running.values()]])
        rest = f"; about {in_words(left)} left" if left else ""
        self._report(f"{job.title}{result} ({outcome.seconds:.0f} s{rest})")

    def _fail(self, job: BenchRun, why: str, report: bool = True) -> None:
        self.failed[job.folder] = why
        if report:
            self._report(f"FAILED {job.title}: {why}")
        else:
            self.bar.update(1)  # the failed run has a line already

    def _report(self, line: str) -> None:
        self.bar.update(1)
        count = len(self.done) + len(self.failed)
        width = len(str(len(self.jobs)))
        self.say(f"[{count:{width}d}/{len(self.jobs)}] {line}")

    def conclude(self) -> int:
        if self.failed:
            causes = [folder for folder in self.failed if not any(f in self.failed for f in self.jobs[folder].after)]
            self.say(f"{len(self.failed)} of {len(self.jobs)} runs failed or need one that did:")
            for folder in causes[:SHOWN]:
                self.say(f"  {self.jobs[folder].title}: {self.failed[folder]}")
            if len(causes) > SHOWN:
                self.say(f"  ... and {len(causes) - SHOWN} more, which {self.output / MANIFEST} lists")
            self.say("the same command tries them again")
        if any(job.argv[0] == "train" and job.folder in self.done for job in self.jobs.values()):
            self.say(f"tables: gram report {shlex.quote(str(self.output))}")
        return 1 if self.failed else 0

    def _log(self, job: BenchRun) -> Path:
        folder = os.path.relpath(job.folder, self.output) if job.folder.is_relative_to(self.output) else job.folder
        return self.output / LOGS / (re.sub(r"[^\w.+-]+", "-", str(folder)).strip("-") + ".log")


def in_words(seconds: float) -> str:
    """Return seconds as text: "40 s", "7 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@dataclass
class Clock:
    """Estimates the time left from the durations of similar runs, now and earlier in this output folder."""

    workers: int
    took: dict[str, list[float]] = field(default_factory=dict)  # pace, and every beginning of it -> count, seconds

    def passed(self, pace: Sequence[str], seconds: float) -> None:
        for end in range(len(pace) + 1):
            entry = self.took.setdefault("|".join(pace[:end]), [0, 0.0])
            entry[0] += 1
            entry[1] += seconds

    def expected(self, pace: Sequence[str]) -> float:
        """Return seconds for one run: the mean of the most similar ones; 0 if no run was measured."""
        for end in range(len(pace), -1, -1):
            count, seconds = self.took.get("|".join(pace[:end]), (0, 0.0))
            if count:
                return seconds / count
        return 0.0

    def left(self, paces: Sequence[Sequence[str]]) -> float:
        """Return seconds for these runs, shared among the workers; at least the longest of them."""
        times = [self.expected(pace) for pace in paces]
        return max(sum(times) / self.workers, max(times)) if times else 0.0


# ------------------------------------------------------------------------------------------------------------- manifest


class _Manifest(TypedDict):
    """The type of bench.json."""

    format: Literal[1]
    benches: list[Any]
    durations: dict[str, tuple[Number, Number]]


class Manifest:
    """`bench.json`: every bench that ran into this folder, and the durations of runs."""

    def __init__(
        self,
        output: Path,
        settings: BenchSettings,
        jobs: Sequence[BenchRun],
        versions: dict[str, str],
        kept: bool = True,
    ) -> None:
        self.path, self.kept = output / MANIFEST, kept
        self.value: dict[str, Any] = {"format": 1, "benches": [], "durations": {}}
        if self.path.is_file():
            self.value = read_json(self.path, _Manifest)
        self.durations: dict[str, list[float]] = self.value["durations"]
        self.entry: dict[str, Any] = {
            "command": shlex.join(["gram", *sys.argv[1:]]),
            "matrix": json.loads(json.dumps(asdict(settings), default=str)),  # paths as text
            "runs": len(jobs),
            "versions": versions,
            "started": _now(),
            "ended": None,
        }
        self.value["benches"].append(self.entry)
        self._write()

    def end(self, bench: Bench) -> None:
        self.entry |= {
            "ended": _now(),
            "finished": len(bench.done),
            "failed": {str(folder): why for folder, why in bench.failed.items()},
        }
        self._write()

    def _write(self) -> None:
        if self.kept:
            write_json(self.path, self.value)


def _versions() -> dict[str, str]:
    from gram_meta.runs.results import versions  # with torch, which the main process does not import

    return versions()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
