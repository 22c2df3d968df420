"""Checkpoint files of prompts: which one is meant, whose it is, and whether it fits; every refusal says what is there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gram_meta.engine.builtin.utils import save_checkpoint
from gram_meta.engine.checkpoints import read_checkpoint
from gram_meta.errors import GramError
from gram_meta.files import read_json
from gram_meta.runs.folder import RUN_FILE

NAME = "prompt_learner"  # CoOp's name for the registered model, and so for the checkpoints' folder
BEST = "model-best.pth.tar"
LISTED = 6  # of what is there, in a message
LOOKED_AT = 5000  # folders, when runs are looked for


# ------------------------------------------------------------------------------------------------------ which file


def choose(directory: str | Path, epoch: int | None) -> tuple[Path, str]:
    """The checkpoint of an epoch in a run's folder, and why it was taken ("" where the epoch was asked for).

    Without an epoch: the last one by number, unless the run that made them was to end with its best by validation
    (TEST.FINAL_MODEL best_val). Where the run does not say, model-best.pth.tar stands for that, as in CoOp.

    Raises:
        GramError: no such folder, or no such epoch; runs below the folder, or epochs in it, are listed.
    """
    folder = Path(directory, NAME)
    if not folder.is_dir():
        raise GramError(f"--model-dir {directory}: expected {NAME}/ in it, {_instead(Path(directory))}")
    epochs = epochs_in(folder)
    best = folder / BEST
    there = [*map(str, epochs), *([BEST] if best.is_file() else [])]
    listed = ", ".join(there) or "none"
    if epoch is not None:
        if epoch not in epochs:
            raise GramError(f"{folder}: expected a checkpoint of epoch {epoch} (--load-epoch), found epochs {listed}")
        return folder / f"model.pth.tar-{epoch}", ""
    wish = _final_model(Path(directory))
    if best.is_file() and (wish == "best_val" or not wish or not epochs):
        return best, f"the best by validation; epochs here: {listed}"
    if not epochs:
        raise GramError(f"{folder}: expected a checkpoint, model.pth.tar-<epoch>, found {listed}")
    why = f"the last of epochs {listed}" if len(there) > 1 else "the only one"
    return folder / f"model.pth.tar-{epochs[-1]}", why


def last(directory: str | Path) -> Path | None:
    """The checkpoint that was saved last in a run's folder, as the file `checkpoint` there says; None without it."""
    pointer = Path(directory, NAME, "checkpoint")
    return pointer.with_name(pointer.read_text(encoding="utf-8").strip()) if pointer.is_file() else None


def epochs_in(folder: Path) -> list[int]:
    """Epochs whose checkpoints are in a folder, in order."""
    suffixes = (path.name.rpartition("-")[2] for path in folder.glob("model.pth.tar-*"))
    return sorted(int(suffix) for suffix in suffixes if suffix.isdigit())


def runs_below(folder: Path) -> Iterator[Path]:
    """Folders of runs that hold checkpoints of prompts, at or below `folder`, in order; not all of a huge tree."""
    for count, (path, names, files) in enumerate(os.walk(folder)):
        if count > LOOKED_AT:
            return
        names.sort()
        if os.path.basename(path) == NAME and any(file.startswith("model") for file in files):
            yield Path(path).parent


def found_runs(folder: Path) -> str:
    """What a message says of the runs at or below a folder, or below the nearest folder above it that exists."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    runs = [run for run, _ in zip(runs_below(folder), range(LISTED + 1), strict=False)]
    if not runs:
        return ""
    names = [os.path.relpath(run, folder) for run in runs[:LISTED]]
    more = ", ..." if len(runs) > LISTED else ""
    return f"runs with checkpoints below {folder}: {', '.join(names)}{more}"


def _instead(directory: Path) -> str:
    """What is there where --model-dir names no run."""
    if not directory.exists():
        runs = found_runs(directory)
        return f"found no such folder, but {runs}" if runs else "found no such folder"
    if directory.is_file():
        return f"found a file; the folder of its run is {directory.parent.parent}"
    if epochs_in(directory) or (directory / BEST).is_file():
        return f"found the folder of checkpoints itself; its run is {directory.parent}"
    runs = found_runs(directory)
    other = sorted({path.parent.name for path in directory.glob("*/model*.pth.tar*")})
    if other:
        return f"found {', '.join(other)}/, which another trainer has learned"
    return f"found {runs}" if runs else f"found {_names(directory)}"


def _names(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:LISTED] + ["..."] * (len(names) > LISTED)) or "nothing"


def _final_model(run: Path) -> str:
    """TEST.FINAL_MODEL of the run in a folder; "" where it does not say."""
    if not (run / RUN_FILE).is_file():
        return ""
    stored = read_json(run / RUN_FILE)
    facts = stored.get("run") if isinstance(stored, dict) else None
    return str(facts.get("TEST.FINAL_MODEL", "")) if isinstance(facts, dict) else ""


# ---------------------------------------------------------------------------------------------------- what is in it


def read(path: Path) -> dict[str, Any]:
    """A run's checkpoint; see `read_checkpoint`."""
    state = read_checkpoint(path)
    if "state_dict" not in state:
        raise GramError(f"{path}: expected state_dict in it, found {', '.join(map(str, state)) or 'nothing'}")
    return state


def read_start(name: str) -> dict[str, Any]:
    """The checkpoint that MODEL.INIT_WEIGHTS names: of a run, or tensors by name alone."""
    path = Path(name)
    if path.suffix == ".safetensors":
        raise GramError(
            f"{name}: MODEL.INIT_WEIGHTS expects a checkpoint of prompts; a meta-checkpoint is for "
            "TRAINER.GRAM.CHECKPOINT, or for `gram export`"
        )
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        inside = [path, path / NAME] if path.is_dir() else [path.parent]
        files = [str(file) for folder in inside for file in sorted(folder.glob("model*.pth.tar*"))[:LISTED]]
        there = f"there are {', '.join(files)}" if files else found_runs(path)
        raise GramError(
            f"{name}: MODEL.INIT_WEIGHTS expects a checkpoint, such as {NAME}/model.pth.tar-50, found {what}"
            + (f"; {there}" if there else "")
        )
    state = read_checkpoint(path)
    return state if "state_dict" in state else {"state_dict": state}


def write(state: dict[str, Any], folder: str, is_best: bool, model_name: str) -> None:
    """Write a checkpoint, whole or not at all, with either Dassl; see `save_checkpoint`.

    Raises:
        GramError: the folder cannot be written, or the disk is full. What was there before stays.
    """
    try:
        save_checkpoint(state, folder, is_best=is_best, model_name=model_name)
    except (OSError, RuntimeError) as error:
        cause = _system_error(error)
        if cause is None:
            raise
        raise GramError(
            f"{folder}: the checkpoint of epoch {state['epoch']} cannot be written ({cause.strerror or cause}); what "
            "was there before stays, and the same command goes on from it"
        ) from error


def _system_error(error: BaseException | None) -> OSError | None:
    """The error of the system behind an error: torch's writer tells of a failed write in its own words."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def fit(learner: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors to load into `learner`, names and shapes checked. CoOp also saves the class names' tokens: left out.

    Raises:
        GramError: other names or shapes than the learner's; they are named.
    """
    named = {key.removeprefix("module."): value for key, value in tensors.items()}  # of a DataParallel
    given = {key: value for key, value in named.items() if key not in ("token_prefix", "token_suffix")}
    own = learner.state_dict()
    if set(given) != set(own):
        raise GramError(
            f"{path}: expected {', '.join(own)}, as this trainer learns it, found {', '.join(given) or 'nothing'}"
        )
    for key, value in given.items():
        if value.shape != own[key].shape:
            raise GramError(
                f"{path}: holds {key} of shape {tuple(value.shape)}, but the trainer is set to {tuple(own[key].shape)}"
            )
    return given


def load(learner: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load learned tensors, checked as `fit` does."""
    learner.load_state_dict(fit(learner, tensors, path))


def difference(there: list[str], here: list[str]) -> str:
    """In what two lists of class names differ, in one sentence."""
    what = "was learned on other classes of this dataset than are here now"
    if len(there) != len(here):
        return f"{what}: {len(there)} there, {len(here)} here"
    index = next(i for i, (old, new) in enumerate(zip(there, here, strict=True)) if old != new)
    return f"{what}: class {index} is {there[index]!r} there and {here[index]!r} here"
