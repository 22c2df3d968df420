"""Fixes of faults that show while Dassl is imported: B6 (needs wilds), B7 (mutes logging), B8 (needs TensorBoard).

Two modules of Dassl are filled in another way during their import, only where they would fail. `sys.modules` gets no
entry under the name of a missing package, because other code may ask whether that package is installed.
"""

import ast
import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from gram_meta.engine.real.fix import Fix
from gram_meta.errors import GramError

WILDS = "dassl.data.datasets.dg.wilds"
TENSORBOARD = "torch.utils.tensorboard"
PIP_NAMES = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml", "cv2": "opencv-python"}

Filler = Callable[[ModuleType, Callable[[], None]], None]  # called with a module and the function that would execute it

_without_wilds = False
_without_tensorboard = False


def import_dassl(restore: Callable[[str, str], Any]) -> list[Fix]:
    """Import `dassl.engine`, and so all that trainers use; return B6, B7 and B8. Raise `GramError` if that fails."""
    level = logging.root.manager.disable
    # a Dassl that was imported before has muted logging, to the level that it sets
    muted = f"{WILDS}.wilds_base" in sys.modules and level == logging.WARNING
    try:
        with clear_errors(), _filled_by({WILDS: _fill_wilds, "dassl.engine.trainer": _fill_trainer}):
            import_engine()
    except GramError:
        logging.disable(level)
        raise
    level = logging.NOTSET if muted else level
    return [
        Fix(
            "B7",
            "logging is not muted for the whole process",
            lambda: logging.root.manager.disable != level,
            lambda: logging.disable(level),
        ),
        Fix("B6", "Dassl imports without the package wilds", lambda: _without_wilds, lambda: _fix_workers(restore)),
        Fix("B8", "Dassl trains without TensorBoard", lambda: _without_tensorboard, lambda: None),
    ]


def import_engine() -> None:
    importlib.import_module("dassl.engine")


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn any error of the import into a `GramError` that names the cause."""
    try:
        yield
    except Exception as error:  # also what an old Dassl, or a fork of it, does that a new Python or torch refuses
        raise GramError(_why_not(error)) from error


def _why_not(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != "dassl":
        return f"the installed Dassl needs the package {error.name}, which is not here: {_pip(error.name)}"
    return f"the installed Dassl does not import ({type(error).__name__}: {error})"


def _pip(module: str) -> str:
    package = module.partition(".")[0]
    return f"python -m pip install {PIP_NAMES.get(package, package)}"


def _fill_wilds(module: ModuleType, fill: Callable[[], None]) -> None:
    """Import the datasets of WILDS; where that fails, register placeholders that say why when one is asked for."""
    global _without_wilds
    try:
        fill()
    except Exception as error:  # wilds, or a package that wilds or its readers need, is missing or broken
        for name in [name for name in sys.modules if name.startswith(f"{WILDS}.")]:
            del sys.modules[name]
        _register_placeholders(module, error)
        _without_wilds = True


def _register_placeholders(module: ModuleType, error: Exception) -> None:
    registry = importlib.import_module("dassl.data.datasets.build").DATASET_REGISTRY
    if isinstance(error, ModuleNotFoundError) and error.name:
        reason = f"needs the package {error.name}, which is not here: {_pip(error.name)}"
    else:
        reason = f"does not import ({type(error).__name__}: {error})"
    for name in _registered_classes(Path(str(module.__file__)).parent):
        if name not in registry.registered_names():
            placeholder = type(name, (), {"__init__": _refuse(name, reason), "__module__": module.__name__})
            registry.register(placeholder)
            setattr(module, name, placeholder)


def _refuse(name: str, reason: str) -> Callable[..., None]:
    def __init__(self: Any, cfg: Any) -> None:
        raise GramError(f"DATASET.NAME is {name!r}: this dataset of WILDS {reason}")

    return __init__


def _registered_classes(folder: Path) -> list[str]:
    """Return the classes that the files of a folder register as datasets; the files are parsed, not imported."""
    names = []
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any(
                "DATASET_REGISTRY" in ast.dump(decorator) for decorator in node.decorator_list
            ):
                names.append(node.name)
    return names


def _fix_workers(restore: Callable[[str, str], Any]) -> None:
    """Let a spawned loader process (macOS, Windows), which imports Dassl anew, apply the fixes first."""

    def reduce(wrapper: Any) -> Any:
        # the class by its name: pickling the class itself would import Dassl first
        return restore, (type(wrapper).__module__, type(wrapper).__qualname__), wrapper.__dict__

    importlib.import_module("dassl.data.data_manager").DatasetWrapper.__reduce__ = reduce


class SummaryWriter:
    """Replaces TensorBoard's writer where that is not installed: prints so once, and writes nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        print("TensorBoard is not installed: no scalars are written")

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def _fill_trainer(module: ModuleType, fill: Callable[[], None]) -> None:
    """Import Dassl's trainers, which import TensorBoard's writer by name."""
    global _without_tensorboard
    try:
        importlib.import_module(TENSORBOARD)
    except Exception:
        before = {name: sys.modules[name] for name in (TENSORBOARD,) if name in sys.modules}
        stand_in: Any = ModuleType(TENSORBOARD)
        stand_in.SummaryWriter = SummaryWriter
        sys.modules[TENSORBOARD] = stand_in
        try:
            fill()
        finally:
            del sys.modules[TENSORBOARD]
            sys.modules.update(before)
        _without_tensorboard = True
    else:
        fill()


class _Finder(MetaPathFinder):
    """Finds the modules of `fillers` in the ordinary way, and lets their filler execute them."""

    def __init__(self, fillers: dict[str, Filler]) -> None:
        self.fillers = fillers

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        filler = self.fillers.get(name)
        spec = None if filler is None else PathFinder.find_spec(name, path, target)
        if filler is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module
        loader: Any = spec.loader
        loader.exec_module = lambda module: filler(module, lambda: execute(module))
        return spec


@contextmanager
def _filled_by(fillers: dict[str, Filler]) -> Iterator[None]:
    finder = _Finder(fillers)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
