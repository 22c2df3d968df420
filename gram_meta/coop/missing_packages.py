"""A checkout's trainer that lacks a package does not stop the others (hook `missing-packages`).

A CoOp-style train.py imports every trainer of its checkout, whichever is asked for. ProMetaR's needs learn2learn, whose
last release cannot be built for Python 3.11 and later; without this hook its train.py ends at that import.
"""

import re
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from gram_meta import hooks
from gram_meta.coop.command_line import CommandLine

OF_A_CHECKOUT = re.compile(r"trainers\.\w+")


def skip_missing_packages(command_line: CommandLine) -> None:
    """Let `import trainers.x` print a note about a missing package if `--trainer` names a trainer of another file."""
    for finder in sys.meta_path:
        if isinstance(finder, _Finder):
            finder.trainer = command_line.trainer
            return
    if hooks.is_on("missing-packages"):
        sys.meta_path.insert(0, _Finder(command_line.trainer))


class _Finder(MetaPathFinder):
    def __init__(self, trainer: str) -> None:
        self.trainer = trainer

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not OF_A_CHECKOUT.fullmatch(name):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None and spec.origin:
            spec.loader = _Loader(spec.loader, self.trainer)
        return spec


class _Loader(Loader):
    """A loader that turns a missing package into a note, unless the module holds the trainer that was asked for."""

    def __init__(self, loader: Any, trainer: str) -> None:
        self.loader, self.trainer = loader, trainer

    def __getattr__(self, name: str) -> Any:  # tracebacks and pickles read attributes of the loader
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self.loader.exec_module(module)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if not package or _is_importable(package) or not self.trainer or self._defines_trainer(module.__name__):
                raise
            lacks = f"needs the package {package}, which is not here; its trainers are left out"
            print(f"Note: {module.__name__} {lacks}", file=sys.stderr)

    def _defines_trainer(self, name: str) -> bool:
        source = self.loader.get_source(name) or ""
        return re.search(rf"^class {re.escape(self.trainer)}\b", source, re.MULTILINE) is not None


def _is_importable(package: str) -> bool:
    """Return whether the package itself exists, so that the missing module is an error of another kind."""
    return package in sys.modules or PathFinder.find_spec(package) is not None
