"""Bring this project's trainers and datasets into Dassl's registries: `import gram_meta.plugin`.

`trainers/` and `datasets/` stand at the top of the repository and are installed inside the package. This is the one
place in the package that imports them.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

PACKAGES = ("gram_meta.trainers", "gram_meta.datasets")


def register() -> None:
    """Import every trainer and dataset of this project; doing it again changes nothing."""
    for name in PACKAGES:
        package = _package(name)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{name}.{module.name}")


def _package(name: str) -> ModuleType:
    """The installed package, or, in a checkout that is not installed, the folder of that name at its top."""
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return importlib.import_module(name)
    folder = Path(__file__).resolve().parents[1] / name.rpartition(".")[2]
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    return package


register()
