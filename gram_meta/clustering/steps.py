"""Intermediate results of a long clustering, kept beside its result so that an interrupted run can continue."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gram_meta.files import PathLike, read_arrays, write_arrays

log = logging.getLogger(__name__)

NAMES = ("sample", "assigned")


class Steps:
    """Arrays in hidden files of a folder, each with a key: a hash of what it was computed from.

    Args:
        folder: None: no array is kept.
    """

    def __init__(self, folder: PathLike | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def once(self, name: str, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the array that an earlier run with this key kept under `name`; else keep the result of `make`."""
        if self.folder is None:
            return make()
        kept = read_arrays(self.path(name))
        if str(kept.get("key")) == key:
            log.info("%s: found by an earlier run that was interrupted", name)
            return kept["value"]
        value = make()
        write_arrays(self.path(name), {"key": np.array(key), "value": value})
        return value

    def path(self, name: str) -> Path:
        assert self.folder is not None and name in NAMES
        return self.folder / f".{name}.npz"

    def forget(self) -> None:
        """Remove the files."""
        if self.folder is not None:
            for name in NAMES:
                self.path(name).unlink(missing_ok=True)
