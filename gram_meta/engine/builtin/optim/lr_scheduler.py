"""Learning-rate schedules from OPTIM.*, counted in epochs."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, StepLR
from yacs.config import CfgNode

from gram_meta.engine.checkpoints import restore_schedule, schedule_state
from gram_meta.errors import GramError

AVAI_SCHEDS = ["single_step", "multi_step", "cosine"]


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
        raise GramError(f"OPTIM.LR_SCHEDULER is {c.LR_SCHEDULER!r}; expected one of {', '.join(AVAI_SCHEDS)}")
    if c.WARMUP_EPOCH <= 0:
        return scheduler
    if not c.WARMUP_RECOUNT:
        scheduler.last_epoch = c.WARMUP_EPOCH
    if c.WARMUP_TYPE == "constant":
        return ConstantWarmupScheduler(optimizer, scheduler, c.WARMUP_EPOCH, c.WARMUP_CONS_LR)
    if c.WARMUP_TYPE == "linear":
        return LinearWarmupScheduler(optimizer, scheduler, c.WARMUP_EPOCH, c.WARMUP_MIN_LR)
    raise GramError(f"OPTIM.WARMUP_TYPE is {c.WARMUP_TYPE!r}; expected constant or linear")


def _step_size(c: CfgNode) -> int:
    size = c.STEPSIZE[-1] if isinstance(c.STEPSIZE, list | tuple) else c.STEPSIZE
    if not isinstance(size, int):
        raise GramError(f"OPTIM.STEPSIZE is {c.STEPSIZE!r}; single_step expects a whole number of epochs")
    return size if size > 0 else c.MAX_EPOCH
