"""The datasets by name."""

from typing import Any

from yacs.config import CfgNode

from gram_meta.engine.builtin.utils.registry import Registry, build

DATASET_REGISTRY = Registry("DATASET")


def build_dataset(cfg: CfgNode) -> Any:
    """Build the dataset that DATASET.NAME names."""
    return build(DATASET_REGISTRY, "Loading dataset", cfg.DATASET.NAME, cfg.VERBOSE, cfg)
