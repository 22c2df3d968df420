"""One output folder, one run: `run.json` names the run that a folder belongs to, and whether it is finished.

`gram train` looks at the folder before anything is built. The trainers look again right before they train or evaluate,
so that the rule holds in anybody's train.py too. There, Dassl's logger writes a file of its own in the folder: log.txt, or
log.txt-<date> where a log.txt exists. That file is never touched. A run that goes on also appends what it prints to
log.txt, because CoOp's parser reads no other file. Light at import: no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gram_meta import hooks
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


@dataclass(frozen=True)
class RunMode:
    """What a run does besides its config: train (the default), or evaluate the prompts of `model_dir`."""

    eval_only: bool = False
    model_dir: str = ""
    load_epoch: int | None = None
    no_train: bool = False


def open_folder(cfg: Any, flags: Any) -> OutputFolder:
    """Return the output folder of a command line, from its config and its parsed flags.

    Raises:
        GramError: the folder belongs to another run.
    """
    mode = RunMode(flags.eval_only, flags.model_dir, flags.load_epoch, flags.no_train)
    return OutputFolder(cfg, mode, foreign=foreign_run(Path(cfg.OUTPUT_DIR), opened=False))


# ------------------------------------------------------------------------------------------------- what trainers call


def check_options(cfg: Any) -> None:
    """Refuse, before data and model are built, a run with other options than the run in its output folder.

    This looks only where a log without any step has been begun in the folder, as a train.py does that means to run there. A
    program may build a trainer to read from a run's folder.

    Raises:
        GramError: the folder belongs to a run with other options.
    """
    path = Path(cfg.OUTPUT_DIR)
    if not (path / layout.RUN).is_file() or all(_is_of_run(log) for log in path.glob(f"{layout.LOG}*")):
        return
    options = {key: value for key, value in _stored(path)["run"].items() if key[:2] != "--"}
    _refuse_other_run(path, options, _options(cfg))


def begin(cfg: Any, mode: RunMode, foreign: Path | None = None, again: bool = False) -> OutputFolder | None:
    """Claim the output folder for a run, right before it trains or evaluates.

    Args:
        cfg: the run's configuration.
        mode: what the run does.
        foreign: a file of a run without run.json that was in the folder when the trainer was built; see `foreign_run`.
        again: the folder is the caller's own already, and now evaluates something else: do not look at it.

    Returns:
        The folder; None where this very run is finished there already.

    Raises:
        GramError: the folder belongs to another run, or cannot be written.
    """
    folder = OutputFolder(cfg, mode, look=not again, foreign=foreign)
    if folder.finished:
        print(folder.already())
        return None
    folder.claim()
    return folder


def stored_accuracy(cfg: Any) -> float:
    """Return the accuracy of the finished run in the output folder."""
    return float(read_json(Path(cfg.OUTPUT_DIR, layout.RESULTS))["metrics"]["accuracy"])


def foreign_run(folder: Path, opened: bool = True) -> Path | None:
    """Return a file which shows that a run without run.json is in a folder, such as one of CoOp itself; None: no such run.

    Args:
        folder: an output folder.
        opened: the log.txt may be the one that this process's train.py has just begun: only steps and results in it count.
    """
    if (folder / layout.RUN).is_file():
        return None
    log = folder / layout.LOG
    return next(iter(layout.checkpoints_below(folder)), log if log.is_file() and _is_of_run(log, opened) else None)


# ---------------------------------------------------------------------------------------------------------- the folder


class OutputFolder:
    """One folder, one run: refuses a folder of another run, knows whether this one is finished.

    Args:
        cfg: the run's configuration; OUTPUT_DIR is the folder.
        mode: what the run does.
        look: whether to look at what is in the folder.
        foreign: see `begin`.

    Attributes:
        finished: this very run has come to its end here.
        goes_on: this very run was begun here, and has not.
        adds: its log.txt is added to, not begun anew.
    """

    def __init__(self, cfg: Any, mode: RunMode, look: bool = True, foreign: Path | None = None) -> None:
        self.path = Path(cfg.OUTPUT_DIR)
        self.results_path = self.path / layout.RESULTS
        self.run_path = self.path / layout.RUN
        self.identity = _identity(cfg, mode)
        self.finished = self.goes_on = self.adds = False
        if mode.no_train or not look:
            return
        if self.run_path.is_file():
            stored = _stored(self.path)
            _refuse_other_run(self.path, stored["run"], self.identity)
            had_results = stored.get("results", False) and not self.results_path.is_file()  # removed since
            self.finished = bool(stored.get("finished")) and not had_results
            self.goes_on = self.adds = not self.finished
            return
        if foreign is not None:
            raise GramError(
                f"{self.path}: expected an empty folder or this same run, found the {foreign.relative_to(self.path)} of "
                f"a run without {layout.RUN}; choose another --output-dir"
            )
        self.adds = (self.path / layout.LOG).is_file()  # of a start that failed, or opened by the caller's train.py

    def already(self) -> str:
        """Return the line that a finished run answers with."""
        where = self.results_path if self.results_path.is_file() else self.path
        return f"This run is finished: {where}; remove the folder to run it again"

    def claim(self) -> None:
        """Write run.json: the folder is this run's from now on."""
        self._write(finished=False)

    def finish(self) -> None:
        """Write in run.json that the run is finished."""
        self._write(finished=True)

    def _write(self, finished: bool) -> None:
        results = finished and self.results_path.is_file()
        facts = {"finished": finished, "results": results, "run": self.identity}
        with as_gram_error(self.path):
            write_json(self.run_path, facts)

    def results(self) -> dict[str, Any]:
        """Return the contents of results.json, {} without it."""
        return read_json(self.results_path) if self.results_path.is_file() else {}

    @contextmanager
    def log(self) -> Iterator[Tee]:
        """Copy what is printed to log.txt, from `Tee.keep` on; a run that goes on adds to its log. For `gram train`."""
        tee = Tee(sys.stdout, self.path / layout.LOG, "a" if self.adds else "w")
        try:
            with redirect_stdout(tee):  # type: ignore[type-var]
                yield tee
        finally:
            tee.close()

    @contextmanager
    def continued_log(self) -> Iterator[None]:
        """Append what is printed to log.txt, where Dassl's logger has begun a log.txt-<date> beside it."""
        log = self.path / layout.LOG
        if (
            not (self.adds and log.is_file() and any(self.path.glob(f"{layout.LOG}-*")))
            or _reaches(log)
            or not hooks.is_on("log-copy")
        ):
            yield
            return
        tee = Tee(sys.stdout, log, "a")
        tee.keep()
        try:
            with redirect_stdout(tee):  # type: ignore[type-var]
                yield
        finally:
            tee.close()


@contextmanager
def as_gram_error(path: Path) -> Iterator[None]:
    """Raise a `GramError` for a folder that cannot be written, or a full disk."""
    try:
        yield
    except OSError as error:
        raise GramError(f"{path}: cannot be written ({error.strerror or error})") from error


def _stored(folder: Path) -> dict[str, Any]:
    stored = read_json(folder / layout.RUN)
    if not isinstance(stored, dict) or not isinstance(stored.get("run"), dict):
        raise GramError(f"{folder / layout.RUN}: expected the facts of a run, found something else")
    return stored


def _refuse_other_run(path: Path, stored: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise where the stored run differs from the one here.

    If one of them is older than an option, the option counts as having had its default. An option that this project does
    not know (of a trainer of the checkout) is compared only where both have it.
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


def _identity(cfg: Any, mode: RunMode) -> dict[str, Any]:
    """Return what identifies a run: every option that matters, what is evaluated, and hashes of the files it starts from."""
    identity = _options(cfg)
    identity |= {"--eval-only": mode.eval_only, "--model-dir": mode.model_dir, "--load-epoch": mode.load_epoch}
    if mode.model_dir:  # what was trained anew there has to be evaluated anew
        hashes = (f"{file.name} {sha256_file(file)}" for file in layout.checkpoints_below(Path(mode.model_dir)))
        identity["--model-dir"] = [os.path.abspath(mode.model_dir), *hashes]
    return identity


def _options(cfg: Any) -> dict[str, Any]:
    options = {key: value for key, value in flatten(as_dict(cfg)).items() if key not in INCIDENTAL}
    for key in ("TRAINER.GRAM.CHECKPOINT", "MODEL.INIT_WEIGHTS"):
        path = options.get(key)
        if path and os.path.isfile(path):
            options[key] = f"SHA-256 {sha256_file(path)}"  # a file may move, or change
    return options


def _same_model(there: Any, here: Any) -> bool:
    """Whether two entries of --model-dir (folder, then hashes) are the same model; the hashes decide, as a folder may move."""
    if not (isinstance(there, list) and isinstance(here, list)):
        return False
    if len(there) > 1 or len(here) > 1:
        return there[1:] == here[1:]
    return os.path.realpath(there[0]) == os.path.realpath(here[0])


def _defaults() -> dict[str, Any]:
    """Return every option with its default."""
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
        """Open the file, and write to it from now on."""
        with as_gram_error(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, self.mode, encoding="utf-8", buffering=1)  # noqa: SIM115, closed by close()
            self.file.write("".join(self.before))
        self.before.clear()

    def write(self, text: str) -> int:
        self.console.write(text)
        if self.file is None:
            self.before.append(text)
        else:
            with as_gram_error(self.path):
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


def _reaches(log: Path) -> bool:
    """Print a line, and return whether it arrives in a log."""
    before = log.stat().st_size
    print(f"The log of this run goes on in {log}", flush=True)
    return log.stat().st_size > before


def _is_of_run(log: Path, opened: bool = True) -> bool:
    """Whether a log is more than the arguments and options that a start which failed leaves behind."""
    with open(log, encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip("\n") for line in file]
    steps = ("epoch [", "=> result", "Evaluate on the *", "Finish training")
    return any(line.startswith(steps) for line in lines) or not (opened or "** Arguments **" in lines)
