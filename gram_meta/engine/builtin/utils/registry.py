"""Names for classes and functions."""

from __future__ import annotations

from typing import Any

from gram_meta.engine.builtin.utils.tools import check_availability, get_most_similar_str_to_a_from_b

__all__ = ["Registry"]


class Registry:
    """Maps the `__name__` of a class or function to it.

    `@REGISTRY.register()` above a class, or `REGISTRY.register(Class)`, enters it; `REGISTRY.get(name)` finds it.
    A name that is taken is a KeyError unless `force`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._obj_map: dict[str, Any] = {}

    def register(self, obj: Any = None, force: bool = False) -> Any:
        def enter(entry: Any) -> Any:
            if entry.__name__ in self._obj_map and not force:
                raise KeyError(f'"{entry.__name__}" is registered in "{self._name}" already')
            self._obj_map[entry.__name__] = entry
            return entry

        if obj is None:
            return enter
        enter(obj)
        return None

    def get(self, name: str) -> Any:
        if name not in self._obj_map:
            nearest = get_most_similar_str_to_a_from_b(name, self.registered_names())
            raise KeyError(f'"{name}" is not registered in "{self._name}" (nearest: "{nearest}")')
        return self._obj_map[name]

    def registered_names(self) -> list[str]:
        return list(self._obj_map)


def build(registry: Any, what: str, name: str, verbose: bool, *args: Any, **kwargs: Any) -> Any:
    """Call the entry `name` of a registry with the arguments; print `what` and the name where `verbose`."""
    check_availability(name, registry.registered_names())
    if verbose:
        print(f"{what}: {name}")
    return registry.get(name)(*args, **kwargs)
