"""Names for classes and functions."""

from __future__ import annotations

from typing import Any

from gram_meta.engine.builtin.utils.tools import get_most_similar_str_to_a_from_b

__all__ = ["Registry"]


class Registry:
    """A table from `__name__` to object.

    `@REGISTRY.register()` above a class, or `REGISTRY.register(Class)`, enters it; `REGISTRY.get(name)` finds it.
    A name that is taken is a KeyError unless `force`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._obj_map: dict[str, Any] = {}

    def register(self, obj: Any = None, force: bool = False) -> Any:
        if obj is None:

            def decorator(decorated: Any) -> Any:
                self._enter(decorated, force)
                return decorated

            return decorator
        self._enter(obj, force)
        return None

    def _enter(self, obj: Any, force: bool) -> None:
        if obj.__name__ in self._obj_map and not force:
            raise KeyError(f'"{obj.__name__}" is registered in "{self._name}" already')
        self._obj_map[obj.__name__] = obj

    def get(self, name: str) -> Any:
        if name not in self._obj_map:
            nearest = get_most_similar_str_to_a_from_b(name, self.registered_names())
            raise KeyError(f'"{name}" is not registered in "{self._name}" (nearest: "{nearest}")')
        return self._obj_map[name]

    def registered_names(self) -> list[str]:
        return list(self._obj_map)
