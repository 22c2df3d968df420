"""The registration of this project's trainers and datasets in Dassl's registries, such that they give way.

Dassl's `Registry` knows a class by its name alone, and a second class of that name is a KeyError. A checkout has a
`CoOp` and an `OxfordPets` of its own, and registers them before or after this project's. In either order, the name then
means the checkout's class. This is the hook `give-way`; without it, this project's classes are ordinary entries.
"""

from typing import Any

from gram_meta import hooks
from gram_meta.engine.adapter import dassl_module

OWN = "_gram_own"  # attribute of a registry: names that mean a class of this project

own_trainers: dict[str, type] = {}  # this project's, by name, also where a checkout's own trainer has taken the name


def register_trainer(trainer: type) -> type:
    """Register a trainer (class decorator), unless a checkout has, or later registers, its own of that name."""
    own_trainers[trainer.__name__] = trainer
    return enter(dassl_module("dassl.engine").TRAINER_REGISTRY, trainer)


def register_dataset(dataset: type) -> type:
    """Register a dataset (class decorator), unless a checkout has, or later registers, its own of that name."""
    return enter(dassl_module("dassl.data.datasets").DATASET_REGISTRY, dataset)


def enter(registry: Any, cls: type) -> type:
    """Add `cls` to a registry of Dassl or of the built-in engine such that it gives way; return `cls`."""
    own = _let_give_way(registry) if hooks.is_on("give-way") else own_names(registry)
    name = cls.__name__
    if name in own or name not in registry.registered_names():
        registry.register(cls, force=True)
        own.add(name)  # afterwards, because `GivingWay.register` removes the name
    return cls


def own_names(registry: Any) -> set[str]:
    """Return the names in a registry that mean a class of this project."""
    return set(getattr(registry, OWN, ()))


def _let_give_way(registry: Any) -> set[str]:
    """Let others take this project's names in a registry, which stays the same object; return these names."""
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
