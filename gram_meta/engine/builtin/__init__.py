"""The built-in engine: the part of Dassl's API that CoOp-style trainers touch, written for a current torch.

The modules bear the names of Dassl's, and after `answer_as_dassl()` they can be imported under these names:
`from dassl.engine import TrainerX`. What differs from Dassl, on purpose:

- checkpoints hold tensors and plain values only and are loaded with `weights_only=True`;
- a warm-up scheduler saves its successor's state, so that a resumed run continues the learning-rate schedule;
- no model is wrapped in `DataParallel`;
- TensorBoard is used where it is installed and is not needed otherwise;
- the logger never closes the console.
"""

from __future__ import annotations

import importlib
import sys

from gram_meta import hooks

# in an order in which each can be imported; parents come before children
MODULES = (
    "utils",
    "utils.tools",
    "utils.logger",
    "utils.meters",
    "utils.registry",
    "utils.torchtools",
    "config",
    "config.defaults",
    "data",
    "data.datasets",
    "data.datasets.build",
    "data.datasets.base_dataset",
    "data.transforms",
    "data.transforms.transforms",
    "data.samplers",
    "data.data_manager",
    "optim",
    "optim.optimizer",
    "optim.lr_scheduler",
    "metrics",
    "metrics.accuracy",
    "evaluation",
    "evaluation.build",
    "evaluation.evaluator",
    "modeling",
    "engine",
    "engine.build",
    "engine.trainer",
)


def answer_as_dassl() -> None:
    """Make this package and its modules importable as `dassl`, `dassl.engine`, ... (hook `answer-as-dassl`)."""
    if not hooks.is_on("answer-as-dassl"):
        return
    sys.modules.setdefault("dassl", sys.modules[__name__])
    for name in MODULES:
        sys.modules.setdefault(f"dassl.{name}", importlib.import_module(f"{__name__}.{name}"))
