"""Small helpers: files, seeds, a description of this environment, meters, registry, checkpoints, logger."""

import json
import os
import platform
import random
import shutil
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import nn

from gram_meta.engine.checkpoints import read_checkpoint
from gram_meta.errors import GramError
from gram_meta.files import Tee, atomic_write
from gram_meta.images import read_rgb as read_image  # noqa: F401, Dassl has it here


def mkdir_if_missing(dirname: str) -> None:
    """Make a folder and its parents where they are missing."""
    if dirname:
        os.makedirs(dirname, exist_ok=True)


def check_isfile(fpath: str) -> bool:
    """Return whether `fpath` is a file; warn where it is not."""
    there = os.path.isfile(fpath)
    if not there:
        warnings.warn(f'No file found at "{fpath}"', stacklevel=2)
    return there


def read_json(fpath: str) -> Any:
    """Return the contents of a JSON file."""
    with open(fpath, encoding="utf-8") as file:
        return json.load(file)


def write_json(obj: Any, fpath: str) -> None:
    """Write JSON, and make its folder where it is missing. (Object first, path second, as in Dassl.)"""
    mkdir_if_missing(os.path.dirname(fpath))
    with open(fpath, "w", encoding="utf-8") as file:
        json.dump(obj, file, indent=4, separators=(",", ": "))


def set_random_seed(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def collect_env_info() -> str:
    """Return versions and devices, a line each."""
    import torchvision

    lines = [
        f"Python {platform.python_version()} on {platform.platform()}",
        f"PyTorch {torch.__version__}, torchvision {torchvision.__version__}",
        f"NumPy {np.__version__}, Pillow {PIL.__version__}",
        f"CUDA {torch.version.cuda} on {torch.cuda.get_device_name()}"
        if torch.cuda.is_available()
        else f"no CUDA device, {torch.get_num_threads()} CPU threads",
    ]
    return "\n".join(lines)


def listdir_nohidden(path: str, sort: bool = False) -> list[str]:
    """Return the names in a folder that do not begin with a dot, in the file system's order unless `sort`."""
    names = [name for name in os.listdir(path) if not name.startswith(".")]
    return sorted(names) if sort else names


def get_most_similar_str_to_a_from_b(a: str, b: Sequence[str]) -> str | None:
    """Return the string in `b` that resembles `a` most; None for an empty `b`."""
    return max(b, key=lambda candidate: SequenceMatcher(None, a, candidate).ratio(), default=None)


def check_availability(requested: str, available: Sequence[str]) -> None:
    """Raise a `GramError` that names the nearest known name if `requested` is not in `available`."""
    if requested in available:
        return
    nearest, known = get_most_similar_str_to_a_from_b(requested, available), ", ".join(sorted(available)) or "none"
    raise GramError(f"{requested!r} is not known; did you mean {nearest!r}? Known: {known}")


def tolist_if_not(x: Any) -> list:
    """Return `x` if it is a list, else a list with `x` in it."""
    return x if isinstance(x, list) else [x]


class AverageMeter:
    """Keeps the latest value (`val`) and the mean so far (`avg`)."""

    def __init__(self) -> None:
        self.val = self.avg = self.sum = 0.0
        self.count = 0

    def update(self, val: Any, n: int = 1) -> None:
        self.val = val.item() if isinstance(val, torch.Tensor) else val
        self.sum += self.val * n
        self.count += n
        self.avg = self.sum / self.count


def as_floats(summaries: list[Any]) -> list[Any]:
    """Return what some steps gave for the log with floats for tensors of one number each, which are read at once."""
    given = [summary for summary in summaries if isinstance(summary, dict)]
    tensors = [v.detach().reshape(()) for summary in given for v in summary.values() if isinstance(v, torch.Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())

    def read(summary: Any) -> Any:
        if not isinstance(summary, dict):
            return summary
        return {name: next(numbers) if isinstance(v, torch.Tensor) else v for name, v in summary.items()}

    return [read(summary) for summary in summaries]


class MetricMeter:
    """Keeps an `AverageMeter` for each name; its text is `name val (avg)` for each."""

    def __init__(self) -> None:
        self.meters: dict[str, AverageMeter] = defaultdict(AverageMeter)

    def update(self, input_dict: dict[str, Any] | None) -> None:
        if input_dict is None:
            return
        if not isinstance(input_dict, dict):
            raise TypeError("Input to MetricMeter.update() must be a dictionary")
        for name, value in input_dict.items():
            self.meters[name].update(value)

    def __str__(self) -> str:
        return " ".join(f"{name} {m.val:.4f} ({m.avg:.4f})" for name, m in self.meters.items())


class Registry:
    """Maps the `__name__` of a class or function to it.

    `@REGISTRY.register()` above a class, or `REGISTRY.register(Class)`, enters it; `REGISTRY.get(name)` finds it.
    A name that is taken is a KeyError unless `force`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._obj_map: dict[str, Any] = {}

    def register(self, obj: Any = None, force: bool = False) -> Any:
        def enter(entry: Any) -> Any:
            if entry.__name__ in self._obj_map and not force:
                raise KeyError(f'"{entry.__name__}" is registered in "{self._name}" already')
            self._obj_map[entry.__name__] = entry
            return entry

        if obj is None:
            return enter
        enter(obj)
        return None

    def get(self, name: str) -> Any:
        if name not in self._obj_map:
            nearest = get_most_similar_str_to_a_from_b(name, self.registered_names())
            raise KeyError(f'"{name}" is not registered in "{self._name}" (nearest: "{nearest}")')
        return self._obj_map[name]

    def registered_names(self) -> list[str]:
        return list(self._obj_map)


def build(registry: Any, what: str, name: str, verbose: bool, *args: Any, **kwargs: Any) -> Any:
    """Call the entry `name` of a registry with the arguments; print `what` and the name where `verbose`."""
    check_availability(name, registry.registered_names())
    if verbose:
        print(f"{what}: {name}")
    return registry.get(name)(*args, **kwargs)


def save_checkpoint(
    state: dict[str, Any],
    save_dir: str,
    is_best: bool = False,
    remove_module_from_keys: bool = True,
    model_name: str = "",
) -> None:
    """Write `state` to `<save_dir>/model.pth.tar-<epoch>` (or `model_name`) and its name to `<save_dir>/checkpoint`.

    With `is_best` a copy goes to `model-best.pth.tar`. `state` needs "state_dict" and "epoch" (counted from 1).
    """
    if remove_module_from_keys:
        state["state_dict"] = {key.removeprefix("module."): value for key, value in state["state_dict"].items()}
    name = model_name or f"model.pth.tar-{state['epoch']}"
    path = os.path.join(save_dir, name)
    with atomic_write(path) as file:
        torch.save(state, file)
    print(f"Checkpoint saved to {path}")
    with atomic_write(os.path.join(save_dir, "checkpoint"), "w") as file:
        file.write(f"{name}\n")
    if is_best:
        best = os.path.join(save_dir, "model-best.pth.tar")
        with atomic_write(best) as file, open(path, "rb") as source:
            shutil.copyfileobj(source, file)
        print(f'Best checkpoint saved to "{best}"')


def load_checkpoint(fpath: str) -> dict[str, Any]:
    """Read a checkpoint without running code from it; see `gram_meta.engine.checkpoints`."""
    if fpath is None:
        raise ValueError("File path is None")
    if not os.path.exists(fpath):
        raise FileNotFoundError(f'File is not found at "{fpath}"')
    return read_checkpoint(fpath, map_location=None if torch.cuda.is_available() else "cpu")


def resume_from_checkpoint(fdir: str, model: nn.Module, optimizer: Any = None, scheduler: Any = None) -> int:
    """Load the checkpoint that `<fdir>/checkpoint` names into model, optimiser and scheduler; return its epoch."""
    with open(os.path.join(fdir, "checkpoint"), encoding="utf-8") as file:
        path = os.path.join(fdir, file.readline().strip())
    print(f'Loading checkpoint from "{path}"')
    checkpoint = load_checkpoint(path)
    model.load_state_dict(checkpoint["state_dict"])
    print("Loaded model weights")
    if optimizer is not None and checkpoint.get("optimizer") is not None:
        optimizer.load_state_dict(checkpoint["optimizer"])
        print("Loaded optimizer")
    if scheduler is not None and checkpoint.get("scheduler") is not None:
        scheduler.load_state_dict(checkpoint["scheduler"])
        print("Loaded scheduler")
    print(f"Previous epoch: {checkpoint['epoch']}")
    return checkpoint["epoch"]


def load_pretrained_weights(model: nn.Module, weight_path: str) -> None:
    """Copy into `model` the tensors of a checkpoint that agree in name and size; print the names of the others."""
    checkpoint = load_checkpoint(weight_path)
    own = model.state_dict()
    matched, discarded = {}, []
    for key, value in checkpoint.get("state_dict", checkpoint).items():
        key = key.removeprefix("module.")
        if key in own and own[key].size() == value.size():
            matched[key] = value
        else:
            discarded.append(key)
    if not matched:
        warnings.warn(f"Cannot load {weight_path} (check the key names manually)", stacklevel=2)
        return
    model.load_state_dict({**own, **matched})
    print(f"Successfully loaded pretrained weights from {weight_path}")
    if discarded:
        print(f"Layers discarded due to unmatched keys or size: {discarded}")


class Logger(Tee):
    """Replaces `sys.stdout`: writes to the console and to a file. `close` closes the file alone."""

    def __init__(self, fpath: str | None = None, mode: str = "w") -> None:
        super().__init__(sys.stdout, Path(fpath or os.devnull), mode)
        self.keep()


def setup_logger(output: str | None = None) -> None:
    """Copy what is printed to `output`: a .txt or .log file, or else a folder, in which it writes log.txt.

    An existing file is kept; the name of the new one then ends in the date.
    """
    if output is None:
        return
    fpath = output if output.endswith((".txt", ".log")) else os.path.join(output, "log.txt")
    if os.path.exists(fpath):
        fpath += time.strftime("-%Y-%m-%d-%H-%M-%S")
    sys.stdout = Logger(fpath)
