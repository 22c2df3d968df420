"""Fixes of Dassl's warm-up schedulers: B1 (do not build), B4 (a resumed run never changes its learning rate)."""

from __future__ import annotations

import importlib
from typing import Any

from gram_meta.engine.checkpoints import restore_schedule, schedule_state
from gram_meta.engine.real.fix import Fix


def fixes() -> list[Fix]:
    return [
        Fix("B1", "schedulers with a warm-up build", _does_not_build, _build),
        Fix("B4", "a resumed run goes on in its learning-rate schedule", _keeps_an_object, _keep_numbers),
    ]


def _module() -> Any:
    return importlib.import_module("dassl.optim.lr_scheduler")


def _warmup() -> Any:
    """Build one epoch of warm-up before a cosine, as in every config of CoOp."""
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    return _module().ConstantWarmupScheduler(optimizer, cosine, 1, 0.5)


def _does_not_build() -> bool:
    """Return whether torch refuses the `verbose` that Dassl's schedulers pass to it."""
    try:
        _warmup()
    except TypeError:
        return True
    return False


def _build() -> None:
    base = _module()._BaseWarmupScheduler

    def __init__(
        self: Any, optimizer: Any, successor: Any, warmup_epoch: int, last_epoch: int = -1, verbose: bool = False
    ) -> None:
        self.successor = successor
        self.warmup_epoch = warmup_epoch
        super(base, self).__init__(optimizer, last_epoch)

    base.__init__ = __init__


def _keeps_an_object() -> bool:
    """Return whether the successor is saved as an object, which would drive a copy of the optimiser after a resume."""
    return not isinstance(_warmup().state_dict().get("successor"), dict)


def _keep_numbers() -> None:
    base = _module()._BaseWarmupScheduler
    base.state_dict = schedule_state
    base.load_state_dict = restore_schedule
