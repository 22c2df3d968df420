"""Files, seeds, names, and a description of this environment."""

from __future__ import annotations

import json
import os
import platform
import random
import warnings
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import PIL
import torch

from gram_meta.errors import GramError
from gram_meta.images import read_rgb as read_image  # noqa: F401, Dassl has it here

__all__ = [
    "check_availability",
    "check_isfile",
    "collect_env_info",
    "get_most_similar_str_to_a_from_b",
    "listdir_nohidden",
]
__all__ += ["mkdir_if_missing", "read_image", "read_json", "set_random_seed", "tolist_if_not", "write_json"]


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
    nearest = get_most_similar_str_to_a_from_b(requested, available)
    raise GramError(
        f"{requested!r} is not known; did you mean {nearest!r}? Known: {', '.join(sorted(available)) or 'none'}"
    )


def tolist_if_not(x: Any) -> list:
    """Return `x` if it is a list, else a list with `x` in it."""
    return x if isinstance(x, list) else [x]
