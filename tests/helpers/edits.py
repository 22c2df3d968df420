"""Wrong edits of JSON values."""

import copy

DEEP = []
for _ in range(300):
    DEEP = [DEEP]
VALUES = [None, "x", -1, 1e308, float("nan"), [], {}, True, DEEP]


def places(value, path=()):
    """Yield the path of every value; of a list, of the first two."""
    yield path
    keys = value if isinstance(value, dict) else range(min(len(value), 2)) if isinstance(value, list) else ()
    for key in keys:
        yield from places(value[key], (*path, key))


def replaced(value, path, new):
    """Return a copy of a JSON value with another value at a path."""
    edited = {"": copy.deepcopy(value)}
    node = edited
    for key in ("", *path)[:-1]:
        node = node[key]
    node[("", *path)[-1]] = new
    return edited[""]


def edits(value):
    """Yield copies of a JSON value with one value in it replaced, each with its path and the new value."""
    for path in places(value):
        for new in VALUES:
            yield path, new, replaced(value, path, new)
