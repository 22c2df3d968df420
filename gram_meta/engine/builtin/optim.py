"""Optimisers and learning-rate schedules (counted in epochs) from OPTIM.*."""

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
    """Runs `warmup_epoch` epochs at a rate of their own, then the successor's schedule from its beginning.

    `rate` is that of the whole warm-up; of a linear one only of its first epoch: epoch e then has e / warmup_epoch of
    the full rate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        successor: LRScheduler,
        warmup_epoch: int,
        rate: float,
        is_linear: bool = False,
        last_epoch: int = -1,
    ) -> None:
        self.successor, self.warmup_epoch, self.rate, self.is_linear = successor, warmup_epoch, rate, is_linear
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        if self.last_epoch >= self.warmup_epoch:
            return self.successor.get_last_lr()
        if self.is_linear and self.last_epoch:
            return [float(lr) * self.last_epoch / self.warmup_epoch for lr in self.base_lrs]
        return [self.rate] * len(self.base_lrs)

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
    first_rates = {"constant": c.WARMUP_CONS_LR, "linear": c.WARMUP_MIN_LR}
    if c.WARMUP_TYPE not in first_rates:
        raise builtin.not_built_in("OPTIM.WARMUP_TYPE", c.WARMUP_TYPE, first_rates)
    rate, is_linear = first_rates[c.WARMUP_TYPE], c.WARMUP_TYPE == "linear"
    return WarmupScheduler(optimizer, scheduler, c.WARMUP_EPOCH, rate, is_linear)


def _step_size(c: CfgNode) -> int:
    size = c.STEPSIZE[-1] if isinstance(c.STEPSIZE, list | tuple) else c.STEPSIZE
    if not isinstance(size, int):
        raise GramError(f"OPTIM.STEPSIZE is {c.STEPSIZE!r}; single_step expects a whole number of epochs")
    return size if size > 0 else c.MAX_EPOCH
