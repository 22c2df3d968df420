"""One output folder, one run: `run.json` names the run that a folder belongs to, and whether it is finished.

`gram train` checks the folder before it builds a trainer. The trainers check it again before they train or evaluate, so
that the rule also holds in a checkout's train.py. There, Dassl's logger writes its own file in the folder: log.txt, or
log.txt-<date> if log.txt exists. This module never changes that file. A resumed run also appends its output to log.txt,
because CoOp's parser reads no other file. Importing this module imports no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gram_meta import hooks
from gram_meta.config import as_dict, flatten
from gram_meta.errors import GramError, as_gram_error
from gram_meta.files import Tee, check_type, read_json, remove_unfinished, sha256_file, write_json
from gram_meta.runs import layout
from gram_meta.runs.schemas import RunFile

# Options that may differ in one run
INCIDENTAL = {
    *("OUTPUT_DIR", "RESUME", "VERBOSE", "DATASET.ROOT", "DATALOADER.NUM_WORKERS", "TRAINER.GRAM.META"),
    *("TRAIN.PRINT_FREQ", "TRAIN.CHECKPOINT_FREQ", "TRAINER.MEMORY.CHECKPOINTING", "TRAINER.MEMORY.CLASSES"),
    *("TRAINER.MEMORY.TEXT_BUDGET", "TRAINER.MEMORY.IMAGE_BUDGET", "TRAINER.MEMORY.KEPT_IMAGES"),
    "TRAINER.MEMORY.CUDA_GRAPHS",
}
# Options, or beginnings of options, that act on a training before its first checkpoint or through its state: a run that
# --resume goes on from has settled them
SETTLED = ("OPTIM.", "TRAINER.", "MODEL.INIT_WEIGHTS", "SEED")


@dataclass(frozen=True)
class RunMode:
    """The task of a run: train (the default), or evaluate the prompts of `model_dir`."""

    eval_only: bool = False
    model_dir: str = ""
    load_epoch: int | None = None
    no_train: bool = False


def open_folder(cfg: Any, flags: Any) -> OutputFolder:
    """Return the output folder of a command line, from its config and its flags; refuse that of another run."""
    mode = RunMode(flags.eval_only, flags.model_dir, flags.load_epoch, flags.no_train)
    return OutputFolder(cfg, mode, foreign=foreign_run(Path(cfg.OUTPUT_DIR), opened=False))


def check_options(cfg: Any) -> None:
    """Refuse, before data and model are built, a run with other options than the run in its output folder.

    The check applies only if a log without any step has been begun in the folder, as a train.py does. Without one, the
    trainer may have been built to read a finished run.
    """
    path = Path(cfg.OUTPUT_DIR)
    if not (path / layout.RUN).is_file() or all(_is_of_run(log) for log in path.glob(f"{layout.LOG}*")):
        return
    options = {key: value for key, value in _stored(path)["run"].items() if key[:2] != "--"}
    _refuse_other_run(path, options, _options(cfg))


def check_resumed(cfg: Any, directory: str) -> None:
    """Refuse to go on from the run in a folder with other settings than it has settled (`SETTLED`).

    A folder without run.json says nothing of its settings, and is accepted.
    """
    path = Path(directory)
    if not (path / layout.RUN).is_file():
        return
    for key, old, new in _differences(_stored(path)["run"], _options(cfg)):
        if key.startswith(SETTLED):
            raise GramError(f"--resume {directory}: expected {key} as in that run, {old!r}, found {new!r}")


def begin(cfg: Any, mode: RunMode, foreign: Path | None = None, again: bool = False) -> OutputFolder | None:
    """Claim the output folder for a run, right before it trains or evaluates.

    Args:
        cfg, mode: the run's configuration and task.
        foreign: a file of a run without run.json that was in the folder when the trainer was built; see `foreign_run`.
        again: the caller has claimed the folder already, and now evaluates another split or model: skip the checks.

    Returns:
        The folder; None if this run is finished there.

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
    return float(layout.read_results(Path(cfg.OUTPUT_DIR))["metrics"]["accuracy"])


def foreign_run(folder: Path, opened: bool = True) -> Path | None:
    """Return a file of a run without run.json in a folder, such as a run of CoOp itself; None if there is no such run.

    Args:
        folder: an output folder.
        opened: log.txt may have been begun by this process's train.py: only steps and results in it count.
    """
    if (folder / layout.RUN).is_file():
        return None
    log = folder / layout.LOG
    return next(iter(layout.checkpoints_below(folder)), log if log.is_file() and _is_of_run(log, opened) else None)


class OutputFolder:
    """The output folder of one run.

    Args:
        cfg, mode, foreign: as for `begin`. look: whether to check the contents, and refuse those of another run.

    Attributes:
        finished: this run is finished in the folder.
        goes_on: this run was begun in the folder and is not finished.
        adds: its output is appended to an existing log.txt.
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
            removed = stored.get("results", False) and not self.results_path.is_file()
            self.finished = bool(stored.get("finished")) and not removed
            self.goes_on = self.adds = not self.finished
            return
        if foreign is not None:
            raise GramError(
                f"{self.path}: expected an empty folder or this same run, found the {foreign.relative_to(self.path)} "
                f"of a run without {layout.RUN}; choose another --output-dir"
            )
        self.adds = (self.path / layout.LOG).is_file()  # of a failed start, or begun by the caller's train.py

    def already(self) -> str:
        """Return the line to print for a finished run."""
        where = self.results_path if self.results_path.is_file() else self.path
        return f"This run is finished: {where}; remove the folder to run it again"

    def claim(self) -> None:
        """Write run.json: the folder is this run's from now on."""
        for checkpoints in filter(Path.is_dir, self.path.iterdir()):
            remove_unfinished(checkpoints)
        self._write(finished=False)

    def finish(self) -> None:
        """Write in run.json that the run is finished."""
        self._write(finished=True)

    def _write(self, finished: bool) -> None:
        results = finished and self.results_path.is_file()
        facts = {"finished": finished, "results": results, "run": self.identity}
        write_json(self.run_path, facts)

    def results(self) -> dict[str, Any]:
        """Return the contents of results.json, {} without it."""
        return layout.read_results(self.path)

    @contextmanager
    def log(self) -> Iterator[Tee]:
        """Copy what is printed to log.txt, from `Tee.keep` on; a resumed run appends to its log. For `gram train`."""
        tee = Tee(sys.stdout, self.path / layout.LOG, "a" if self.adds else "w")
        with tee, redirect_stdout(tee):  # type: ignore[type-var]
            yield tee

    @contextmanager
    def continued_log(self) -> Iterator[None]:
        """Append what is printed to log.txt if Dassl's logger has begun a log.txt-<date> beside it."""
        log = self.path / layout.LOG
        dated = self.adds and log.is_file() and any(self.path.glob(f"{layout.LOG}-*"))
        if not dated or _reaches(log) or not hooks.is_on("log-copy"):
            yield
            return
        tee = Tee(sys.stdout, log, "a")
        tee.keep()
        with tee, redirect_stdout(tee):  # type: ignore[type-var]
            yield


def _stored(folder: Path) -> dict[str, Any]:
    stored = read_json(folder / layout.RUN)
    if not isinstance(stored, dict) or "run" not in stored:
        raise GramError(f"{folder / layout.RUN}: expected the facts of a run, found something else")
    return check_type(stored, RunFile, str(folder / layout.RUN))


def _refuse_other_run(path: Path, stored: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise if the stored run differs from this one."""
    for key, old, new in _differences(stored, here):
        if not (key == "--model-dir" and _same_model(old, new)):
            raise GramError(
                f"{path}: holds another run ({key} is {old!r} there and {new!r} here); "
                "choose another --output-dir or remove the folder"
            )


def _differences(stored: dict[str, Any], here: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the options in which two runs differ, with both values; one older than an option had the default."""
    unset = _defaults() if set(stored) ^ set(here) else {}
    for key in sorted(set(stored) | set(here)):
        if key not in unset and not (key in stored and key in here):
            continue  # an option of a checkout's trainer, which one of them does not have
        old, new = (run.get(key, unset.get(key)) for run in (stored, here))
        if old != new:
            yield key, old, new


def _identity(cfg: Any, mode: RunMode) -> dict[str, Any]:
    """Return the identity of a run: options, the prompts that it evaluates, and hashes of its initial files."""
    identity = _options(cfg)
    identity |= {"--eval-only": mode.eval_only, "--model-dir": mode.model_dir, "--load-epoch": mode.load_epoch}
    if mode.model_dir:  # prompts that were trained again have to be evaluated again
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
    """Return whether two entries of --model-dir (folder, then hashes) have equal hashes; folders may be moved."""
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


def _reaches(log: Path) -> bool:
    """Print a line, and return whether it arrives in a log."""
    before = log.stat().st_size
    print(f"The log of this run goes on in {log}", flush=True)
    return log.stat().st_size > before


def _is_of_run(log: Path, opened: bool = True) -> bool:
    """Return whether a log has more than the arguments and options that a failed start leaves behind."""
    with as_gram_error(log, "cannot be read"), open(log, encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip("\n") for line in file]
    steps = ("epoch [", "=> result", "Evaluate on the *", "Finish training")
    return any(line.startswith(steps) for line in lines) or not (opened or "** Arguments **" in lines)
