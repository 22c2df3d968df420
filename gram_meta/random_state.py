"""The state of every random generator, as plain values that a checkpoint can hold."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators: tensors and plain values only."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()  # typed as two formats at once
    name, keys, position, has_gauss, cached = numpy_state
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from what `random_state` returned. Another number of GPUs leaves theirs as they are."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Whatever the block draws, afterwards the generators stand where they stood."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def make_deterministic() -> None:
    """Have torch take the algorithms that give equal results every time (TRAIN.DETERMINISTIC), for this process.

    An operation that has none raises torch's RuntimeError, which names it. cuBLAS reads its variable when it is used
    first: a process that has multiplied matrices on a GPU before keeps what it had.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False  # CoOp's train.py sets it
    torch.use_deterministic_algorithms(True)


@contextmanager
def kept_determinism() -> Iterator[None]:
    """Whatever the block chooses, afterwards torch is as deterministic as it was."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
