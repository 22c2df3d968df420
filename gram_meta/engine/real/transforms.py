"""Fix of Dassl's augmentation policies: B5 (`np.int`, which NumPy dropped in 1.24)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from gram_meta.engine.real.fix import Fix

DROPPED = {"int": int, "float": float, "bool": bool, "object": object}  # removed alias -> its type


def fixes() -> list[Fix]:
    return [Fix("B5", "randaugment and the augmentation policies run", _lacks_np_int, _add_np_int)]


def _lacks_np_int() -> bool:
    return any(not _runs(probe) for _, probe in _probes())


def _add_np_int() -> None:
    """Give the modules that use `np.int` a NumPy with the old names; NumPy itself is not changed."""
    for module, probe in _probes():
        if not _runs(probe):
            module.np = _OldNumpy(module.np)


def _probes() -> list[tuple[Any, Callable[[], Any]]]:
    """Return the two modules, each with a call that needs `np.int`."""
    from PIL import Image

    randaugment: Any = importlib.import_module("dassl.data.transforms.randaugment")
    autoaugment: Any = importlib.import_module("dassl.data.transforms.autoaugment")
    image = Image.new("RGB", (2, 2))
    return [(randaugment, lambda: randaugment.SolarizeAdd(image)), (autoaugment, autoaugment.ImageNetPolicy)]


def _runs(probe: Callable[[], Any]) -> bool:
    try:
        probe()
    except AttributeError:
        return False
    return True


class _OldNumpy(ModuleType):
    """NumPy with the aliases of Python types that it once had."""

    def __init__(self, numpy: ModuleType) -> None:
        super().__init__("numpy")
        self._numpy = numpy

    def __getattr__(self, name: str) -> Any:
        if name in DROPPED:
            return DROPPED[name]
        return getattr(self._numpy, name)
