"""The one door to Dassl: everything in this project that needs Dassl asks here.

Behind it are two rooms. `real` is the `dassl` package, where it is installed. `builtin` is the engine of the same API
in `gram_meta.engine.builtin`, which then answers to the name `dassl` too, so that CoOp-style trainers run on it
unchanged. The environment variable GRAM_DASSL chooses: `auto` (the real one where it imports), `real` or `builtin`.

    from gram_meta.engine import TRAINER_REGISTRY, TrainerX

Importing this module opens nothing and is cheap; the first name that is asked for opens the door.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gram_meta.engine.registries import register_dataset as register_dataset
from gram_meta.engine.registries import register_trainer as register_trainer
from gram_meta.errors import GramError

if TYPE_CHECKING:
    from gram_meta.engine.real import Repair

# name -> the module of Dassl that holds it; a name outside this table is not part of the door
EXPORTS = {
    "get_cfg_default": "dassl.config",
    "DATASET_REGISTRY": "dassl.data.datasets",
    "DatasetBase": "dassl.data.datasets",
    "Datum": "dassl.data.datasets",
    "build_dataset": "dassl.data.datasets",
    "DataManager": "dassl.data",
    "DatasetWrapper": "dassl.data",
    "build_data_loader": "dassl.data.data_manager",
    "build_transform": "dassl.data.transforms",
    "TRAINER_REGISTRY": "dassl.engine",
    "TrainerX": "dassl.engine",
    "build_trainer": "dassl.engine",
    "EVALUATOR_REGISTRY": "dassl.evaluation",
    "build_evaluator": "dassl.evaluation",
    "compute_accuracy": "dassl.metrics",
    "build_lr_scheduler": "dassl.optim",
    "build_optimizer": "dassl.optim",
    "collect_env_info": "dassl.utils",
    "load_checkpoint": "dassl.utils",
    "load_pretrained_weights": "dassl.utils",
    "mkdir_if_missing": "dassl.utils",
    "save_checkpoint": "dassl.utils",
    "set_random_seed": "dassl.utils",
    "setup_logger": "dassl.utils",
}

_room = ""  # "", "real" or "builtin"
_repairs: list[Repair] = []


def room() -> str:
    """Which Dassl is behind the door: "real" or "builtin". Opens the door where it is still shut."""
    global _room
    if not _room:
        _room = _open()
    return _room


def repairs() -> list[Repair]:
    """Every known repair of the real Dassl, with `id`, `summary` and `applied`; none in the built-in room. Opens the door."""
    room()
    return list(_repairs)


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room()
    return getattr(importlib.import_module(EXPORTS[name]), name)


# ----------------------------------------------------------------------------------------------- opening the door


def _open() -> str:
    wish = os.environ.get("GRAM_DASSL", "auto") or "auto"
    rooms: dict[str, Callable[[], str]] = {"auto": _open_either, "real": _open_real, "builtin": _open_builtin}
    if wish not in rooms:
        raise GramError(f"GRAM_DASSL is {wish!r}; expected auto, builtin or real")
    return rooms[wish]()


def _open_either() -> str:
    if not _real_is_there():
        return _open_builtin()
    try:
        return _open_real()
    except GramError as error:
        print(f"Note: {error}; the built-in engine steps in", file=sys.stderr)
        return _open_builtin()


def _open_real() -> str:
    global _repairs
    if not _real_is_there():
        raise GramError("GRAM_DASSL is 'real', but no package `dassl` can be imported; install it, or use builtin")
    from gram_meta.engine import real

    try:
        _repairs = real.import_repaired()
    except GramError:
        _forget_dassl()  # a half-imported package must not shadow the built-in one
        raise
    return "real"


def _open_builtin() -> str:
    if _real_is_there() and "dassl" in sys.modules:
        raise GramError("GRAM_DASSL is 'builtin', but the real `dassl` has been imported already in this process")
    from gram_meta.engine import builtin

    builtin.answer_as_dassl()
    return "builtin"


def _real_is_there() -> bool:
    """Whether `dassl` is a package of its own (imported or importable), not the built-in engine under that name."""
    module = sys.modules.get("dassl")
    if module is not None:
        return module.__name__ == "dassl"
    spec = importlib.util.find_spec("dassl")
    return spec is not None and spec.origin is not None  # a folder without __init__.py is no package


def _forget_dassl() -> None:
    for name in [n for n in sys.modules if n == "dassl" or n.startswith("dassl.")]:
        del sys.modules[name]
