"""A checkout's trainers that lack a package: not a reason for the others not to run.

A CoOp-style train.py imports every trainer of its checkout, whichever is asked for. ProMetaR's needs learn2learn, whose
last release cannot be built for Python 3.11 and later, so that there its train.py ends before it has begun.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from gram_meta.coop.defaults import flag

OF_A_CHECKOUT = re.compile(r"trainers\.\w+")


def do_without_their_packages() -> None:
    """From now on `import trainers.x` without a package that it needs is a note, where `--trainer` asks for another."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not OF_A_CHECKOUT.fullmatch(fullname):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None and spec.origin:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Another loader, under which a missing package is a note."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:  # what tracebacks and pickles ask for
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self.loader.exec_module(module)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            asked = flag("--trainer")
            if not package or _there(package) or not asked or self._holds(module.__name__, asked):
                raise
            print(
                f"Note: {module.__name__} needs the package {package}, which is not here; its trainers are left out",
                file=sys.stderr,
            )

    def _holds(self, name: str, trainer: str) -> bool:
        source = self.loader.get_source(name) or ""
        return bool(trainer) and re.search(rf"^class {re.escape(trainer)}\b", source, re.MULTILINE) is not None


def _there(package: str) -> bool:
    """Whether a package of this name is there, and only something in it is missing: an error of another kind."""
    return package in sys.modules or PathFinder.find_spec(package) is not None
