"""Break of Dassl's augmentation policies: B5 (`np.int`, which NumPy dropped in 1.24)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from gram_meta.engine.real.repair import Repair

DROPPED = {"int": int, "float": float, "bool": bool, "object": object}  # the names, and what they meant


def repairs() -> list[Repair]:
    return [Repair("B5", "randaugment and the augmentation policies run", _np_int_is_gone, _give_np_int)]


def _np_int_is_gone() -> bool:
    return any(not _runs(probe) for _, probe in _probes())


def _give_np_int() -> None:
    """The modules that ask for it see NumPy with the names it had; NumPy itself is left as it is."""
    for module, probe in _probes():
        if not _runs(probe):
            module.np = _OldNumpy(module.np)


def _probes() -> list[tuple[Any, Callable[[], Any]]]:
    """The two modules, and something that each cannot do without `np.int`."""
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
    """NumPy, and in it the Python types that it once named."""

    def __init__(self, numpy: ModuleType) -> None:
        super().__init__("numpy")
        self._numpy = numpy

    def __getattr__(self, name: str) -> Any:
        if name in DROPPED:
            return DROPPED[name]
        return getattr(self._numpy, name)
