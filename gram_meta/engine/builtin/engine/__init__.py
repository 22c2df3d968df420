"""Trainers: their registry and their bases."""

from gram_meta.engine.builtin.engine.build import TRAINER_REGISTRY, build_trainer
from gram_meta.engine.builtin.engine.trainer import SimpleNet, SimpleTrainer, TrainerBase, TrainerX

__all__ = ["TRAINER_REGISTRY", "SimpleNet", "SimpleTrainer", "TrainerBase", "TrainerX", "build_trainer"]
