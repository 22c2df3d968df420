"""One output folder, one run: `run.json` says which run a folder belongs to, and whether it is finished.

`gram train` looks before anything is built. The trainers look again for themselves, right before they train or
evaluate, so that it holds in anybody's train.py as well. There, Dassl's logger has opened a file in the folder by then:
the log of a run that is refused goes again, and a run that goes on continues the log.txt that is there, as CoOp's
parser reads no other. Light at import: no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from gram_meta.config import as_dict, flatten
from gram_meta.errors import GramError
from gram_meta.files import read_json, sha256_file, write_json
from gram_meta.runs import layout

# Options that do not make another run of it
INCIDENTAL = {
    "OUTPUT_DIR",
    "RESUME",
    "VERBOSE",
    "DATASET.ROOT",
    "DATALOADER.NUM_WORKERS",
    "TRAIN.PRINT_FREQ",
    "TRAIN.CHECKPOINT_FREQ",
    "TRAINER.GRAM.META",
    "TRAINER.MEMORY.CHECKPOINTING",
    "TRAINER.MEMORY.CLASSES",
    "TRAINER.MEMORY.TEXT_BUDGET",
    "TRAINER.MEMORY.IMAGE_BUDGET",
}


class Task(Protocol):
    """What a run is to do, besides its config; the parsed flags of train.py are one."""

    eval_only: bool
    model_dir: str
    load_epoch: int | None
    no_train: bool


@dataclass(frozen=True)
class Doing:
    """The same, from a trainer that was asked to train (the default) or to evaluate."""

    eval_only: bool = False
    model_dir: str = ""
    load_epoch: int | None = None
    no_train: bool = False


# ------------------------------------------------------------------------------------------------------ what trainers do


def check_options(cfg: Any) -> None:
    """Refuse early, before data and model are built, what `begin` would refuse later for its options.

    Only where a train.py has opened a log in the folder, and so means this to be its run.

    Raises:
        GramError: the folder belongs to a run with other options. The log that was opened for this one is gone.
    """
    path = Path(cfg.OUTPUT_DIR)
    if not _logs_in(path) or not (path / layout.RUN).is_file():
        return
    stored = {key: value for key, value in _stored(path).get("run", {}).items() if key[:2] != "--"}
    try:
        _compare(path, stored, _options(cfg))
    except GramError:
        _drop_logs(path)
        raise


def begin(cfg: Any, task: Task, again: bool = False) -> OutputFolder | None:
    """Make the output folder this run's, right before it trains or evaluates; None where this run is finished already.

    `again`: the folder is the caller's own, who now evaluates something else in it: it is not looked at.

    Raises:
        GramError: the folder belongs to another run, or cannot be written.
    """
    path = Path(cfg.OUTPUT_DIR)
    try:
        folder = OutputFolder(cfg, task, look=not again)
    except GramError:
        _drop_logs(path)
        raise
    if folder.finished:
        _drop_logs(path)
        print(folder.already())
        return None
    folder.claim()
    _one_log(path)
    return folder


@contextmanager
def nothing_left(cfg: Any) -> Iterator[None]:
    """What stops a run before its first step leaves no log behind, nor a folder for it alone.

    CoOp's scripts take a folder that is there for a result, and would skip the run once its options are mended.
    """
    try:
        yield
    except GramError:
        folder = Path(cfg.OUTPUT_DIR)
        logs = _logs_in(folder)
        for stream in logs:
            stream.flush()
        paths = [path for stream in logs if (path := _path_of(stream)) is not None]
        if paths and all(_failed_to_start(path) for path in paths):
            _drop_logs(folder)
            with suppress(OSError):  # something else is in it
                folder.rmdir()
        raise


def stored_accuracy(cfg: Any) -> float:
    """The accuracy of the finished run in the output folder."""
    return float(read_json(Path(cfg.OUTPUT_DIR, layout.RESULTS))["metrics"]["accuracy"])


# ---------------------------------------------------------------------------------------------------------- the folder


class OutputFolder:
    """One folder, one run: refuses a folder of another run, knows whether this one is finished.

    Attributes:
        finished: this very run has come to its end here.
        goes_on: this very run was begun here, and has not.
        adds: its log.txt is added to, not begun anew.
    """

    def __init__(self, cfg: Any, task: Task, look: bool = True) -> None:
        self.path = Path(cfg.OUTPUT_DIR)
        self.results_path = self.path / layout.RESULTS
        self.run_path = self.path / layout.RUN
        self.identity = _identity(cfg, task)
        self.finished = self.goes_on = self.adds = False
        if task.no_train or not look:
            return
        if self.run_path.is_file():
            stored = _stored(self.path)
            _compare(self.path, stored.get("run", {}), self.identity)
            had_results = stored.get("results", False) and not self.results_path.is_file()  # removed since
            self.finished = bool(stored.get("finished")) and not had_results
            self.goes_on = self.adds = not self.finished
        else:
            self._refuse_strangers()
            self.adds = (self.path / layout.LOG).is_file()  # of a start that failed

    def _refuse_strangers(self) -> None:
        """A run without run.json: of CoOp itself, or of another program."""
        found = next(iter(layout.checkpoints_below(self.path)), None)
        log = self.path / layout.LOG
        if found is None and log.is_file() and not _is_ours(log) and not _failed_to_start(log):
            found = log
        if found is not None:
            raise GramError(
                f"{self.path}: expected an empty folder or this same run, found the {found.relative_to(self.path)} of "
                f"a run without {layout.RUN}; choose another --output-dir"
            )

    def already(self) -> str:
        """The line that a finished run answers with."""
        where = self.results_path if self.results_path.is_file() else self.path
        return f"This run is finished: {where}; remove the folder to run it again"

    def claim(self) -> None:
        """From now on the folder is this run's."""
        self._write(finished=False)

    def finish(self) -> None:
        self._write(finished=True)

    def _write(self, finished: bool) -> None:
        results = finished and self.results_path.is_file()
        facts = {"finished": finished, "results": results, "run": self.identity}
        with one_sentence(self.path):
            write_json(self.run_path, facts)

    def results(self) -> dict[str, Any]:
        return read_json(self.results_path) if self.results_path.is_file() else {}

    @contextmanager
    def log(self) -> Iterator[Tee]:
        """What is printed goes to log.txt too; a run that goes on adds to its log."""
        tee = Tee(sys.stdout, self.path / layout.LOG, "a" if self.adds else "w")
        try:
            with redirect_stdout(tee):  # type: ignore[type-var]
                yield tee
        finally:
            tee.close()


@contextmanager
def one_sentence(path: Path) -> Iterator[None]:
    """A folder that cannot be written, or a disk that is full, as a `GramError`."""
    try:
        yield
    except OSError as error:
        raise GramError(f"{path}: cannot be written ({error.strerror or error})") from error


def _stored(folder: Path) -> dict[str, Any]:
    stored = read_json(folder / layout.RUN)
    if not isinstance(stored, dict) or not isinstance(stored.get("run"), dict):
        raise GramError(f"{folder / layout.RUN}: expected the facts of a run, found something else")
    return stored


def _compare(path: Path, stored: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse the run that is stored where it differs from the one here.

    An option that one of them lacks was at its default there; one that nothing here knows (a checkout's own, of
    another trainer) decides nothing.
    """
    unset = _defaults() if set(stored) ^ set(here) else {}
    for key in sorted(set(stored) | set(here)):
        if key not in unset and not (key in stored and key in here):
            continue
        old, new = (run.get(key, unset.get(key)) for run in (stored, here))
        if old != new and not (key == "--model-dir" and _same_model(old, new)):
            raise GramError(
                f"{path}: holds another run ({key} is {old!r} there and {new!r} here); "
                "choose another --output-dir or remove the folder"
            )


def _identity(cfg: Any, task: Task) -> dict[str, Any]:
    """What makes a run this run: every option that matters, what is evaluated, and what is in the files it starts from."""
    identity = _options(cfg)
    identity |= {"--eval-only": task.eval_only, "--model-dir": task.model_dir, "--load-epoch": task.load_epoch}
    if task.model_dir:  # what was trained anew there has to be evaluated anew
        files = layout.checkpoints_below(Path(task.model_dir))
        hashes = (f"{file.name} {sha256_file(file)}" for file in files)
        identity["--model-dir"] = [os.path.abspath(task.model_dir), *hashes]
    return identity


def _options(cfg: Any) -> dict[str, Any]:
    options = {key: value for key, value in flatten(as_dict(cfg)).items() if key not in INCIDENTAL}
    for key in ("TRAINER.GRAM.CHECKPOINT", "MODEL.INIT_WEIGHTS"):
        path = options.get(key)
        if path and os.path.isfile(path):
            options[key] = f"SHA-256 {sha256_file(path)}"  # a file may move, or change
    return options


def _same_model(there: Any, here: Any) -> bool:
    """Two entries of --model-dir, folder and contents: the contents decide, as a folder may be named anew or move."""
    if not (isinstance(there, list) and isinstance(here, list)):
        return False
    if len(there) > 1 or len(here) > 1:
        return there[1:] == here[1:]
    return os.path.realpath(there[0]) == os.path.realpath(here[0])


def _defaults() -> dict[str, Any]:
    """Every option where nothing sets it: what an option that is newer than a run was in that run."""
    from gram_meta import engine
    from gram_meta.engine.options import extend_cfg

    cfg = engine.get_cfg_default()
    extend_cfg(cfg)
    return flatten(as_dict(cfg))


# ---------------------------------------------------------------------------------------------------------------- logs


class Tee:
    """Writes to the console and, once `keep` was called, to a file, beginning with what came before.

    A run that cannot be built (a typing error in an option) so leaves no folder behind.
    """

    def __init__(self, console: IO[str], path: Path, mode: str) -> None:
        self.console, self.path, self.mode = console, path, mode
        self.file: IO[str] | None = None
        self.before: list[str] = []

    def keep(self) -> None:
        with one_sentence(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, self.mode, encoding="utf-8", buffering=1)  # noqa: SIM115, closed by close()
            self.file.write("".join(self.before))
        self.before.clear()

    def write(self, text: str) -> int:
        self.console.write(text)
        if self.file is None:
            self.before.append(text)
        else:
            with one_sentence(self.path):
                self.file.write(text)
        return len(text)

    def flush(self) -> None:
        self.console.flush()
        if self.file is not None:
            self.file.flush()

    def isatty(self) -> bool:
        return self.console.isatty()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def _logs_in(folder: Path) -> list[Any]:
    """Dassl's loggers (streams with a `console` and a `file`) that stand in for stdout and write into the folder."""
    found: list[Any] = []
    stream: Any = sys.stdout
    while stream is not None and len(found) < 10:
        path = _path_of(stream)
        if path is not None and path.parent.resolve() == folder.resolve():
            found.append(stream)
        stream = getattr(stream, "console", None)
    return found


def _path_of(stream: Any) -> Path | None:
    name = getattr(getattr(stream, "file", None), "name", None)
    return Path(name) if isinstance(name, str) else None


def _is_ours(log: Path) -> bool:
    """This process has made that file: Dassl's logger opens no log that is there already."""
    return any(path == log for stream in _logs_in(log.parent) if (path := _path_of(stream)) is not None)


def _drop_logs(folder: Path) -> None:
    """Close and remove the logs that this process has opened in the folder of another run; the console goes on."""
    for stream in _logs_in(folder):
        path = _path_of(stream)
        stream.file.close()
        stream.file = None
        if path is not None:
            path.unlink(missing_ok=True)


def _one_log(folder: Path) -> None:
    """A log that Dassl's logger has begun beside log.txt, named by the date, becomes the end of log.txt."""
    log = folder / layout.LOG
    for stream in _logs_in(folder):
        path = _path_of(stream)
        if path is None or path == log or not path.name.startswith(f"{layout.LOG}-"):
            continue
        stream.file.close()
        stream.file = open(log, "a", encoding="utf-8", buffering=1)  # noqa: SIM115, the logger's to close
        stream.file.write(path.read_text(encoding="utf-8"))
        path.unlink()


def _failed_to_start(log: Path) -> bool:
    """A log that ends before any training or test, as train.py leaves it when an option was wrong."""
    with open(log, encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip("\n") for line in file]
    steps = ("epoch [", "=> result", "Evaluate on the *", "Finish training")
    return "** Arguments **" in lines and not any(line.startswith(steps) for line in lines)
