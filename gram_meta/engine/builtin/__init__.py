"""The built-in engine: the part of Dassl's API that CoOp-style trainers touch, written for a current torch.

After `answer_as_dassl()` its modules can be imported under Dassl's names: `from dassl.engine import TrainerX`. What
differs from Dassl, on purpose:

- it holds what CoOp-style trainers and their configurations use; it rejects the rest by name;
- checkpoints hold tensors and plain values only and are loaded with `weights_only=True`;
- a warm-up scheduler saves its successor's state, so that a resumed run continues the learning-rate schedule;
- no model is wrapped in `DataParallel`;
- DATALOADER.NUM_WORKERS follows the cores by default, and training processes stay over epochs;
- TensorBoard is used where it is installed and is not needed otherwise;
- the logger never closes the console.
"""

import importlib
import sys
from collections.abc import Iterable
from types import ModuleType

from gram_meta import hooks
from gram_meta.errors import GramError

# Each module, with the names of Dassl's modules that it stands for; parents come before children.
MODULES = {
    "utils": "utils utils.tools utils.logger utils.meters utils.registry utils.torchtools",
    "config": "config config.defaults",
    "data": "data data.data_manager data.samplers",
    "datasets": "data.datasets data.datasets.build data.datasets.base_dataset",
    "transforms": "data.transforms data.transforms.transforms",
    "optim": "optim optim.optimizer optim.lr_scheduler",
    "evaluation": "evaluation evaluation.build evaluation.evaluator metrics metrics.accuracy",
    "engine": "engine engine.build engine.trainer",
}


def module(name: str) -> ModuleType:
    """Import the module that stands for Dassl's `name` (`dassl.data.samplers`)."""
    part = name.removeprefix("dassl").removeprefix(".")
    own = next((own for own, names in MODULES.items() if part in names.split()), part)
    return importlib.import_module(f"{__name__}.{own}" if own else __name__)


def answer_as_dassl() -> None:
    """Make this package and its modules importable as `dassl`, `dassl.engine`, ... (hook `answer-as-dassl`)."""
    if not hooks.is_on("answer-as-dassl"):
        return
    sys.modules.setdefault("dassl", sys.modules[__name__])
    for names in MODULES.values():
        for name in names.split():
            parent, _, child = f"dassl.{name}".rpartition(".")
            known = sys.modules.setdefault(f"dassl.{name}", module(name))
            if not hasattr(sys.modules[parent], child):
                setattr(sys.modules[parent], child, known)


def not_built_in(key: str, value: object, known: Iterable[str]) -> GramError:
    """Return the error for a value that the built-in engine does not know, and the real Dassl perhaps does."""
    return GramError(
        f"{key} is {value!r}; the built-in engine knows {', '.join(known) or 'none'}. The real Dassl has more: "
        "pip install --no-build-isolation --no-deps -e Dassl.pytorch"
    )
