"""The evaluators by name."""

from typing import Any

from yacs.config import CfgNode

from gram_meta.engine.builtin.utils.registry import Registry, build

EVALUATOR_REGISTRY = Registry("EVALUATOR")


def build_evaluator(cfg: CfgNode, **kwargs: Any) -> Any:
    """Build the evaluator that TEST.EVALUATOR names."""
    return build(EVALUATOR_REGISTRY, "Loading evaluator", cfg.TEST.EVALUATOR, cfg.VERBOSE, cfg, **kwargs)
