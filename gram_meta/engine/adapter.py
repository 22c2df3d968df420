"""The choice between the installed Dassl and the built-in engine, and the access to the modules of the chosen one."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gram_meta import hooks
from gram_meta.errors import GramError

if TYPE_CHECKING:
    from gram_meta.engine.real import Fix

_backend = ""  # "real" or "builtin"; "" until it is chosen
_fixes: list[Fix] = []


def backend() -> str:
    """Return the backend in use, "real" or "builtin". The first call chooses and imports it.

    Raises `GramError` if GRAM_DASSL asks for a backend that cannot be had, or GRAM_HOOKS names an unknown hook.
    """
    global _backend
    if not _backend:
        hooks.check()
        _backend = _choose()
    return _backend


def fixes() -> list[Fix]:
    """Return every known fix of the real Dassl (`id`, `summary`, `applied`); the built-in engine has none."""
    backend()
    return list(_fixes)


def dassl_module(name: str) -> ModuleType:
    """Import the module that Dassl calls `name` (`dassl.engine`) from the backend in use."""
    if backend() == "builtin":
        from gram_meta.engine import builtin

        return builtin.module(name)
    return importlib.import_module(name)


def _choose() -> str:
    wish = os.environ.get("GRAM_DASSL", "auto") or "auto"
    ways: dict[str, Callable[[], str]] = {"auto": _import_either, "real": _import_real, "builtin": _import_builtin}
    if wish not in ways:
        raise GramError(f"GRAM_DASSL is {wish!r}; expected auto, builtin or real")
    return ways[wish]()


def _import_either() -> str:
    if not _has_real():
        return _import_builtin()
    try:
        return _import_real()
    except GramError as error:
        print(f"Note: {error}; the built-in engine steps in", file=sys.stderr)
        return _import_builtin()


def _import_real() -> str:
    global _fixes
    if not _has_real():
        raise GramError("GRAM_DASSL is 'real', but no package `dassl` can be imported; install it, or use builtin")
    from gram_meta.engine import real

    try:
        _fixes = real.import_fixed(_restore) if hooks.is_on("dassl-fixes") else real.import_as_it_is()
    except GramError:
        for name in [n for n in sys.modules if n == "dassl" or n.startswith("dassl.")]:
            del sys.modules[name]  # a half-imported package must not shadow the built-in one
        raise
    return "real"


def _import_builtin() -> str:
    if _has_real() and "dassl" in sys.modules:
        raise GramError("GRAM_DASSL is 'builtin', but the real `dassl` has been imported already in this process")
    from gram_meta.engine import builtin

    builtin.answer_as_dassl()
    return "builtin"


def _has_real() -> bool:
    """Return whether `dassl` is a package of its own (imported or importable), not the built-in engine's alias."""
    module = sys.modules.get("dassl")
    if module is not None:
        return module.__name__ == "dassl"
    spec = importlib.util.find_spec("dassl")
    return spec is not None and spec.origin is not None  # a folder without __init__.py is no package


def _restore(module: str, name: str) -> Any:
    """Unpickle an object of Dassl's in a spawned process: choose the backend there before the class is imported."""
    backend()
    cls = getattr(importlib.import_module(module), name)
    return cls.__new__(cls)
