"""What the folder of a run holds, and which checkpoint in it counts. Light at import: no torch.

    OUT/results.json                         what was measured, written after the test
    OUT/predictions.npz                      what was predicted for each test image
    OUT/run.json                             which run the folder belongs to, and whether it is finished
    OUT/log.txt, log.txt-<date>              what was printed; Dassl never overwrites a log
    OUT/prompt_learner/model.pth.tar-<epoch> checkpoints; `checkpoint` there names the one written last
    OUT/prompt_learner/model-best.pth.tar    the best epoch by validation (TEST.FINAL_MODEL best_val)

A folder of `gram pretrain` holds other files (`method.meta_files`), of which run.json has the same name. CoOp and its
descendants write the same folders without results.json and run.json; some name the folder of checkpoints otherwise.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gram_meta.config import flatten
from gram_meta.errors import GramError
from gram_meta.files import read_json, read_text
from gram_meta.runs.coop_log import Log, read_log
from gram_meta.runs.schemas import RunFile, check_results

RESULTS = "results.json"
PREDICTIONS = "predictions.npz"
RUN = "run.json"
LOG = "log.txt"
LEARNER = "prompt_learner"  # CoOp's name for the registered model, and so for the folder of its checkpoints
BEST = "model-best.pth.tar"

LISTED = 6  # names in an error message
LOOKED_AT = 5000  # folders to search for runs, at most


def read_results(run: Path) -> dict[str, Any]:
    """Return the contents of results.json; {} where there is none."""
    path = run / RESULTS
    return check_results(read_json(path), str(path), whole=False) if path.is_file() else {}


def read_run(run: Path) -> dict[str, Any]:
    """Return what run.json says of the run: its options and flags; {} where there is none."""
    return read_json(run / RUN, RunFile).get("run", {}) if (run / RUN).is_file() else {}


def read_log_of(run: Path) -> Log | None:
    """Return what log.txt says; None where there is none, or it is not the log of a CoOp-style run."""
    return read_log(run / LOG) if (run / LOG).is_file() else None


def options_of(run: Path) -> dict[str, Any]:
    """Return every option of a run by its full key, from results.json, else run.json, else log.txt."""
    config = read_results(run).get("config")
    if config:
        return flatten(config)
    facts = read_run(run)
    if facts:
        return facts
    log = read_log_of(run)
    return log.options if log else {}


def tested_run(run: Path) -> tuple[str, int | None]:
    """Return the folder and the epoch of the run whose prompts were evaluated here; ("", None) where none were."""
    results = read_results(run)
    if results:
        return results.get("model_dir") or "", results.get("epoch") or None
    log = read_log_of(run)
    return (str(log.arguments.get("model_dir") or ""), log.epoch or None) if log else ("", None)


def choose_checkpoint(run: str | Path, epoch: int | None = None, learner: str = LEARNER) -> tuple[Path, str]:
    """Return the checkpoint that an evaluation of a run loads, and why ("" where the epoch was given).

    Without an epoch this is, as in CoOp, model-best.pth.tar where it exists. A run of this project says in its run.json
    whether it ends with its best epoch (TEST.FINAL_MODEL best_val); if not, an older model-best.pth.tar does not count.
    In all other cases it is the last epoch by number.

    Args:
        run: the output folder of a run. epoch: the one to load. learner: name of the folder of checkpoints.

    Raises:
        GramError: no such folder, or no such epoch; the message lists what is there.
    """
    folder = Path(run, learner)
    if not folder.is_dir():
        raise GramError(f"{run}: expected {learner}/ in it, {_found_instead(Path(run))}")
    epochs = epochs_in(folder)
    best = folder / BEST
    names = [*map(str, epochs), *([BEST] if best.is_file() else [])]
    listed = ", ".join(names) or "none"
    if epoch is not None:
        if epoch not in epochs:
            raise GramError(f"{folder}: expected a checkpoint of epoch {epoch} (--load-epoch), found epochs {listed}")
        return checkpoint_path(folder, epoch), ""
    final = read_run(Path(run)).get("TEST.FINAL_MODEL", "best_val")
    if best.is_file() and (final == "best_val" or not epochs):
        return best, f"the best by validation; epochs here: {listed}"
    if not epochs:
        raise GramError(f"{folder}: expected a checkpoint, model.pth.tar-<epoch>, found {listed}")
    return checkpoint_path(folder, epochs[-1]), f"the last of epochs {listed}" if len(names) > 1 else "the only one"


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """Return the path of an epoch's checkpoint in a folder of checkpoints."""
    return folder / f"model.pth.tar-{epoch}"


def checkpoints_below(run: Path) -> list[Path]:
    """Return every checkpoint in a run's folder, of whichever trainer, sorted."""
    return sorted(run.glob("*/model*.pth.tar*"))


def learner_in(run: Path) -> str:
    """Return the name of a run's folder of checkpoints: prompt_learner, or the only one; "" for none or several."""
    names = {path.parent.name for path in checkpoints_below(run)}
    if LEARNER in names:
        return LEARNER
    return names.pop() if len(names) == 1 else ""


def last_checkpoint(run: str | Path) -> Path | None:
    """Return the checkpoint that was written last, as the file `checkpoint` says; None where there is none."""
    pointer = Path(run, LEARNER, "checkpoint")
    return pointer.with_name(read_text(pointer).strip()) if pointer.is_file() else None


def checkpoint_to_resume(directory: str) -> Path:
    """Return the last checkpoint of the folder that --resume names; raise a `GramError` if there is none."""
    path = last_checkpoint(directory)
    if path is None:
        there = list_runs(Path(directory))
        found = "found no such file" + (f"; {there}" if there else "")
        raise GramError(f"--resume {directory}: expected {LEARNER}/checkpoint in it, {found}")
    return path


def epochs_in(folder: Path) -> list[int]:
    """Return the epochs whose checkpoints are in a folder of checkpoints, in order."""
    suffixes = (path.name.rpartition("-")[2] for path in folder.glob("model.pth.tar-*"))
    return sorted(int(suffix) for suffix in suffixes if suffix.isdigit())


def runs_below(folder: Path) -> Iterator[Path]:
    """Yield the folders of runs with checkpoints of prompts at or below `folder`; stop after LOOKED_AT folders."""
    for count, (path, names, files) in enumerate(os.walk(folder)):
        if count > LOOKED_AT:
            return
        names.sort()
        if os.path.basename(path) == LEARNER and any(file.startswith("model") for file in files):
            yield Path(path).parent


def list_runs(folder: Path) -> str:
    """Return a phrase that lists the runs at or below a folder, or below its nearest existing parent; "" for none."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    runs = [run for run, _ in zip(runs_below(folder), range(LISTED + 1), strict=False)]
    if not runs:
        return ""
    names = [os.path.relpath(run, folder) for run in runs[:LISTED]]
    more = ", ..." if len(runs) > LISTED else ""
    return f"runs with checkpoints below {folder}: {', '.join(names)}{more}"


def _found_instead(run: Path) -> str:
    """Describe a path that was expected to be the folder of a run and is not."""
    if not run.exists():
        runs = list_runs(run)
        return f"found no such folder, but {runs}" if runs else "found no such folder"
    if run.is_file():
        return f"found a file; the folder of its run is {run.parent.parent}"
    if epochs_in(run) or (run / BEST).is_file():
        return f"found the folder of checkpoints itself; its run is {run.parent}"
    others = sorted({path.parent.name for path in checkpoints_below(run)})
    if others:
        return f"found {', '.join(others)}/, which another trainer has learned"
    runs = list_runs(run)
    names = sorted(path.name for path in run.iterdir())
    return f"found {runs or ', '.join(names[:LISTED] + ['...'] * (len(names) > LISTED)) or 'nothing'}"
