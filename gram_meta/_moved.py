"""Old module paths that documents of earlier versions name."""

from __future__ import annotations

import importlib
import sys
import warnings


def moved(old: str, new: str) -> None:
    """Let the module path `old` mean the module `new`, and warn whoever imports it."""
    warnings.warn(f"{old} has moved to {new}; the old path goes in version 0.3", DeprecationWarning, stacklevel=4)
    sys.modules[old] = importlib.import_module(new)
