"""Fix of Dassl's metrics: B15 (top-k accuracy for k > 1 takes a view that torch refuses)."""

from __future__ import annotations

import importlib

from gram_meta.engine.builtin.metrics import compute_accuracy
from gram_meta.engine.real.fix import Fix, rebind


def fixes() -> list[Fix]:
    return [Fix("B15", "top-k accuracy is computed for every k", _fails_above_one, _replace)]


def _fails_above_one() -> bool:
    import torch

    try:
        importlib.import_module("dassl.metrics.accuracy").compute_accuracy(torch.eye(3), torch.arange(3), topk=(1, 2))
    except RuntimeError:
        return True
    return False


def _replace() -> None:
    rebind(importlib.import_module("dassl.metrics.accuracy").compute_accuracy, compute_accuracy)
