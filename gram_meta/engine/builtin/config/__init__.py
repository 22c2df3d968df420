"""The default configuration."""

from yacs.config import CfgNode

from gram_meta.engine.builtin.config.defaults import _C as cfg_default

__all__ = ["clean_cfg", "get_cfg_default"]


def get_cfg_default() -> CfgNode:
    """Return a fresh copy of the defaults, to be extended and merged into."""
    return cfg_default.clone()


def clean_cfg(cfg: CfgNode, trainer: str) -> None:
    """Remove the options of other trainers than `trainer`, so that a printed config is short."""
    for key in list(cfg.TRAINER):
        if key not in ("NAME", trainer.upper()):
            cfg.TRAINER.pop(key)
