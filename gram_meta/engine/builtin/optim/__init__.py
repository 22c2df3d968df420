"""Optimisers and learning-rate schedules by name."""

from gram_meta.engine.builtin.optim.lr_scheduler import build_lr_scheduler
from gram_meta.engine.builtin.optim.optimizer import build_optimizer

__all__ = ["build_lr_scheduler", "build_optimizer"]
