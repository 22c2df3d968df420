"""Old module paths that documents of earlier versions name."""

import importlib
import sys
import warnings


def moved(old: str, *new: str) -> None:
    """Give the module `old` every name of the modules `new`, and warn whoever imports it."""
    sentence = f"{old} has moved to {' and '.join(new)}; the old path goes in version 0.3"
    warnings.warn(sentence, DeprecationWarning, stacklevel=3)
    for name in new:
        module = importlib.import_module(name)
        vars(sys.modules[old]).update({key: value for key, value in vars(module).items() if not key.startswith("__")})
