"""GRAM: Gradient-Regulated Meta-Prompt Learning for the Dassl/CoOp world.

An independent implementation of Li et al., "Gradient-Regulated Meta-Prompt Learning for Generalizable
Vision-Language Models" (ICCV 2023). `gram --help` lists the commands; the names in `__all__` are the Python API.
Importing this package imports no torch: each name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from gram_meta.api import cluster, embed, evaluate, pretrain
    from gram_meta.backbone.clip import load_backbone
    from gram_meta.clustering.hierarchy import Hierarchy
    from gram_meta.corpus.store import PairStore
    from gram_meta.errors import GramError
    from gram_meta.method.apply import Regulation, regulate, start_from
    from gram_meta.method.checkpoint import MetaCheckpoint
    from gram_meta.method.checkpoint import load_meta_checkpoint as load
    from gram_meta.method.checkpoint import save_meta_checkpoint as save
    from gram_meta.method.dassl import WithGRAM
    from gram_meta.method.prompts import PromptedCLIP
    from gram_meta.method.regulator import GradientRegulator, RegulatorConfig
    from gram_meta.tools.classifier import GramClassifier
    from gram_meta.tools.predict import Prediction, Predictor

__all__ = [
    "GradientRegulator", "GramClassifier", "GramError", "Hierarchy", "MetaCheckpoint", "PairStore", "Prediction",
    "Predictor", "PromptedCLIP", "Regulation", "RegulatorConfig", "WithGRAM", "__version__", "cluster", "embed",
    "evaluate", "load", "load_backbone", "pretrain", "regulate", "save", "start_from",
]  # fmt: skip

# name -> the module that holds it, and its name there if that differs
_PLACES = {
    name: module
    for module, names in {
        "api": "cluster embed evaluate pretrain",
        "backbone": "load_backbone",
        "clustering.hierarchy": "Hierarchy",
        "corpus.store": "PairStore",
        "errors": "GramError",
        "method.apply": "Regulation regulate start_from",
        "method.checkpoint": "MetaCheckpoint",
        "method.dassl": "WithGRAM",
        "method.prompts": "PromptedCLIP",
        "method.regulator": "GradientRegulator RegulatorConfig",
        "tools.classifier": "GramClassifier",
        "tools.predict": "Prediction Predictor",
    }.items()
    for name in names.split()
}
_PLACES |= {name: f"method.checkpoint:{name}_meta_checkpoint" for name in ("load", "save")}


def __getattr__(name: str) -> Any:
    """Load a name of the API on its first use (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, there = _PLACES[name].partition(":")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), there or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
