"""The trainers by name."""

from typing import Any

from yacs.config import CfgNode

from gram_meta.engine.builtin.utils.registry import Registry, build

TRAINER_REGISTRY = Registry("TRAINER")


def build_trainer(cfg: CfgNode) -> Any:
    """Build the trainer that TRAINER.NAME names."""
    return build(TRAINER_REGISTRY, "Loading trainer", cfg.TRAINER.NAME, cfg.VERBOSE, cfg)
