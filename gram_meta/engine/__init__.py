"""The adapter to Dassl: everything in this project that needs Dassl imports it from here.

It has two backends. `real` is the `dassl` package, where it is installed. `builtin` is the engine of the same API in
`gram_meta.engine.builtin`, which then can be imported as `dassl` too, so that CoOp-style trainers run on it unchanged.
The environment variable GRAM_DASSL chooses: `auto` (the real one where it imports), `real` or `builtin`.

    from gram_meta.engine import TRAINER_REGISTRY, TrainerX

Importing this module is cheap; the first name that is asked for chooses the backend and imports it.
"""

import warnings
from typing import Any

from gram_meta.engine.adapter import backend as backend
from gram_meta.engine.adapter import dassl_module as dassl_module
from gram_meta.engine.adapter import fixes as fixes
from gram_meta.engine.registries import register_dataset as register_dataset
from gram_meta.engine.registries import register_trainer as register_trainer

# name -> the module of Dassl that holds it; the adapter offers no other name
EXPORTS = {
    name: f"dassl.{module}"
    for module, names in {
        "config": "get_cfg_default",
        "data": "DataManager DatasetWrapper",
        "data.data_manager": "build_data_loader",
        "data.datasets": "DATASET_REGISTRY DatasetBase Datum build_dataset",
        "data.transforms": "build_transform",
        "engine": "TRAINER_REGISTRY TrainerX build_trainer",
        "evaluation": "EVALUATOR_REGISTRY build_evaluator",
        "metrics": "compute_accuracy",
        "optim": "build_lr_scheduler build_optimizer",
        "utils": "collect_env_info load_checkpoint load_pretrained_weights mkdir_if_missing save_checkpoint "
        "set_random_seed setup_logger",
    }.items()
    for name in names.split()
}

_RENAMED = {"room": backend, "repairs": fixes}  # names of version 0.1


def __getattr__(name: str) -> Any:
    if name in EXPORTS:
        return getattr(dassl_module(EXPORTS[name]), name)
    if name in _RENAMED:
        new = _RENAMED[name]
        warnings.warn(f"engine.{name} is now engine.{new.__name__}", DeprecationWarning, stacklevel=2)
        return new
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
