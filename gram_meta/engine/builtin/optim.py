"""Optimisers and learning-rate schedules (counted in epochs) from OPTIM.*."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, StepLR
from yacs.config import CfgNode

from gram_meta.engine import builtin
from gram_meta.engine.checkpoints import restore_schedule, schedule_state
from gram_meta.errors import GramError

__all__ = ["build_lr_scheduler", "build_optimizer"]

AVAI_OPTIMS = ["adam", "adamw", "sgd"]
AVAI_SCHEDS = ["single_step", "multi_step", "cosine"]


def build_optimizer(model: nn.Module | Iterable[Any], optim_cfg: CfgNode, param_groups: Any = None) -> Optimizer:
    """Build the optimiser OPTIM.NAME over `param_groups`, else over `model` (a module or its parameters)."""
    c = optim_cfg
    if c.NAME not in AVAI_OPTIMS:
        raise builtin.not_built_in("OPTIM.NAME", c.NAME, AVAI_OPTIMS)
    if c.STAGED_LR:
        raise builtin.not_built_in("OPTIM.STAGED_LR", True, ["False"])
    if param_groups is None:
        param_groups = model.parameters() if isinstance(model, nn.Module) else model
    shared = {"lr": c.LR, "weight_decay": c.WEIGHT_DECAY}
    if c.NAME == "sgd":
        return torch.optim.SGD(
            param_groups, momentum=c.MOMENTUM, dampening=c.SGD_DAMPNING, nesterov=c.SGD_NESTEROV, **shared
        )
    kind = torch.optim.AdamW if c.NAME == "adamw" else torch.optim.Adam
    return kind(param_groups, betas=(c.ADAM_BETA1, c.ADAM_BETA2), **shared)


class WarmupScheduler(LRScheduler):
    """Runs `warmup_epoch` epochs at the rates of `warmup_lr`, then the successor's schedule from its beginning."""

    def __init__(self, optimizer: Optimizer, successor: LRScheduler, warmup_epoch: int, last_epoch: int = -1) -> None:
        self.successor = successor
        self.warmup_epoch = warmup_epoch
        super().__init__(optimizer, last_epoch)

    def warmup_lr(self, base_lr: Any) -> float:
        """Return the rate in epoch `self.last_epoch` (from 0) of the warm-up."""
        raise NotImplementedError

    def get_lr(self) -> list[Any]:
        if self.last_epoch >= self.warmup_epoch:
            return self.successor.get_last_lr()
        return [self.warmup_lr(float(lr)) for lr in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch >= self.warmup_epoch:
            self.successor.step() if epoch is None else self.successor.step(epoch)
            self._last_lr = self.successor.get_last_lr()
        else:
            super().step() if epoch is None else super().step(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values only; the successor's state is nested, as it belongs to the same optimiser."""
        return schedule_state(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from `state_dict()`, or from what Dassl saved: the successor as an object."""
        restore_schedule(self, state_dict)


class ConstantWarmupScheduler(WarmupScheduler):
    """Keeps one rate through the whole warm-up."""

    def __init__(
        self, optimizer: Optimizer, successor: LRScheduler, warmup_epoch: int, cons_lr: float, last_epoch: int = -1
    ) -> None:
        self.cons_lr = cons_lr
        super().__init__(optimizer, successor, warmup_epoch, last_epoch)

    def warmup_lr(self, base_lr: float) -> float:
        return self.cons_lr


class LinearWarmupScheduler(WarmupScheduler):
    """Takes `min_lr` in the first epoch, then e / warmup_epoch of the full rate in epoch e."""

    def __init__(
        self, optimizer: Optimizer, successor: LRScheduler, warmup_epoch: int, min_lr: float, last_epoch: int = -1
    ) -> None:
        self.min_lr = min_lr
        super().__init__(optimizer, successor, warmup_epoch, last_epoch)

    def warmup_lr(self, base_lr: float) -> float:
        return base_lr * self.last_epoch / self.warmup_epoch if self.last_epoch else self.min_lr


def build_lr_scheduler(optimizer: Optimizer, optim_cfg: CfgNode) -> LRScheduler:
    """Build the schedule that OPTIM.LR_SCHEDULER names, after the warm-up that OPTIM.WARMUP_* describes."""
    c = optim_cfg
    if c.LR_SCHEDULER == "single_step":
        scheduler: LRScheduler = StepLR(optimizer, step_size=_step_size(c), gamma=c.GAMMA)
    elif c.LR_SCHEDULER == "multi_step":
        if not isinstance(c.STEPSIZE, list | tuple):
            raise GramError(f"OPTIM.STEPSIZE is {c.STEPSIZE!r}; multi_step expects a list of epochs")
        scheduler = MultiStepLR(optimizer, milestones=list(c.STEPSIZE), gamma=c.GAMMA)
    elif c.LR_SCHEDULER == "cosine":
        scheduler = CosineAnnealingLR(optimizer, float(c.MAX_EPOCH))  # type: ignore[arg-type]
    else:
        raise builtin.not_built_in("OPTIM.LR_SCHEDULER", c.LR_SCHEDULER, AVAI_SCHEDS)
    if c.WARMUP_EPOCH <= 0:
        return scheduler
    if not c.WARMUP_RECOUNT:
        scheduler.last_epoch = c.WARMUP_EPOCH
    if c.WARMUP_TYPE == "constant":
        return ConstantWarmupScheduler(optimizer, scheduler, c.WARMUP_EPOCH, c.WARMUP_CONS_LR)
    if c.WARMUP_TYPE == "linear":
        return LinearWarmupScheduler(optimizer, scheduler, c.WARMUP_EPOCH, c.WARMUP_MIN_LR)
    raise builtin.not_built_in("OPTIM.WARMUP_TYPE", c.WARMUP_TYPE, ["constant", "linear"])


def _step_size(c: CfgNode) -> int:
    size = c.STEPSIZE[-1] if isinstance(c.STEPSIZE, list | tuple) else c.STEPSIZE
    if not isinstance(size, int):
        raise GramError(f"OPTIM.STEPSIZE is {c.STEPSIZE!r}; single_step expects a whole number of epochs")
    return size if size > 0 else c.MAX_EPOCH
