"""Checkpoint files of learned prompts: read, write, and check that the tensors fit a trainer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gram_meta.engine.builtin.utils import save_checkpoint
from gram_meta.engine.checkpoints import check_finite, read_checkpoint
from gram_meta.errors import GramError
from gram_meta.files import check_type
from gram_meta.method.checkpoint import check_fit
from gram_meta.runs.layout import LEARNER, LISTED, list_runs, read_results
from gram_meta.runs.schemas import CheckpointFacts


def read(path: Path) -> dict[str, Any]:
    """Read a run's checkpoint; see `read_checkpoint`."""
    state = read_facts(path)
    if "state_dict" not in state:
        raise GramError(f"{path}: expected state_dict in it, found {', '.join(map(str, state)) or 'nothing'}")
    return state


def read_facts(path: Path) -> dict[str, Any]:
    """Read a checkpoint with `read_checkpoint`; check the types of what this project's trainers add to it."""
    state = read_checkpoint(path)
    return check_type(state, CheckpointFacts, str(path)) if "reads" in state else state


def read_start(name: str) -> dict[str, Any]:
    """Read the checkpoint that MODEL.INIT_WEIGHTS names: of a run, or only tensors by name."""
    path = Path(name)
    if path.suffix == ".safetensors":
        hint = "a meta-checkpoint is for TRAINER.GRAM.CHECKPOINT, or for `gram export`"
        raise GramError(f"{name}: MODEL.INIT_WEIGHTS expects a checkpoint of prompts; {hint}")
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        inside = [path, path / LEARNER] if path.is_dir() else [path.parent]
        files = [str(file) for folder in inside for file in sorted(folder.glob("model*.pth.tar*"))[:LISTED]]
        there = f"there are {', '.join(files)}" if files else list_runs(path)
        expected = f"a checkpoint, such as {LEARNER}/model.pth.tar-50, found {what}"
        raise GramError(f"{name}: MODEL.INIT_WEIGHTS expects {expected}" + (f"; {there}" if there else ""))
    state = read_facts(path)
    return state if "state_dict" in state else {"state_dict": state}


def write(state: dict[str, Any], folder: str, is_best: bool, model_name: str) -> None:
    """Write a checkpoint atomically, with either backend; see `save_checkpoint`."""
    check_finite(folder, state["state_dict"])
    save_checkpoint(state, folder, is_best=is_best, model_name=model_name)


def fit(learner: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tensors to load, without CoOp's tokens of class names; refuse other names or shapes."""
    named = {key.removeprefix("module."): value for key, value in tensors.items()}  # of a DataParallel
    given = {key: value for key, value in named.items() if key not in ("token_prefix", "token_suffix")}
    own, found = ({key: value.shape for key, value in state.items()} for state in (learner.state_dict(), given))
    check_fit(path, own, found)
    check_finite(path, given)
    return given


def load(learner: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load learned tensors, checked as `fit` does."""
    learner.load_state_dict(fit(learner, tensors, path))


def classnames_beside(path: Path) -> list[str] | None:
    """Return the class names in the results.json of a checkpoint's run; None where there are none."""
    return read_results(path.parent.parent).get("classnames")


def difference(there: list[str], here: list[str]) -> str:
    """Return in what two lists of class names differ."""
    if len(there) != len(here):
        return f"{len(there)} there, {len(here)} here"
    index = next(i for i, (old, new) in enumerate(zip(there, here, strict=True)) if old != new)
    return f"class {index} is {there[index]!r} there and {here[index]!r} here"
