"""Entering this project's trainers and datasets into Dassl's registries, so that they give way.

Dassl's `Registry` knows a class by its name alone, and a second class of that name is a KeyError. A checkout has a `CoOp`
and an `OxfordPets` of its own, and registers them before or after this project's. Whichever comes first, the checkout's
is what the name means afterwards.
"""

from __future__ import annotations

import importlib
from typing import Any

OWN = "_gram_own"  # attribute of a registry: names that mean a class of this project

own_trainers: dict[str, type] = {}  # this project's, by name, also where a checkout's own trainer has taken the name


def register_trainer(trainer: type) -> type:
    """Class decorator: add a trainer to the registry, unless a checkout has brought, or brings, its own of that name."""
    own_trainers[trainer.__name__] = trainer
    return enter(_registry("dassl.engine", "TRAINER_REGISTRY"), trainer)


def register_dataset(dataset: type) -> type:
    """Class decorator: add a dataset to the registry, unless a checkout has brought, or brings, its own of that name."""
    return enter(_registry("dassl.data.datasets", "DATASET_REGISTRY"), dataset)


def enter(registry: Any, cls: type) -> type:
    """Add `cls` to a registry of Dassl's, or of the built-in engine, in such a way that it gives way; returns `cls`."""
    own = _let_give_way(registry)
    name = cls.__name__
    if name in own or name not in registry.registered_names():
        registry.register(cls, force=True)
        own.add(name)  # after: registering takes it for a stranger's
    return cls


def own_names(registry: Any) -> set[str]:
    """Names in a registry that mean a class of this project."""
    return set(getattr(registry, OWN, ()))


def _let_give_way(registry: Any) -> set[str]:
    """Teach a registry to let others have the names of this project; returns these names, to be added to.

    The registry stays the same object, as others hold it already; its class becomes a subclass of what it was.
    """
    if not hasattr(registry, OWN):
        setattr(registry, OWN, set())
        registry.__class__ = _giving_way(type(registry))
    return getattr(registry, OWN)


def _giving_way(base: Any) -> Any:
    class GivingWay(base):
        def register(self, obj: Any = None, force: bool = False) -> Any:
            if obj is None:  # above a class: @REGISTRY.register()

                def decorator(decorated: Any) -> Any:
                    self.register(decorated, force)
                    return decorated

                return decorator
            own = getattr(self, OWN)
            result = super().register(obj, force=force or obj.__name__ in own)
            own.discard(obj.__name__)
            return result

    GivingWay.__name__ = GivingWay.__qualname__ = base.__name__
    return GivingWay


def _registry(module: str, name: str) -> Any:
    from gram_meta import engine

    engine.room()  # opens the door
    return getattr(importlib.import_module(module), name)
