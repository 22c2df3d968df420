"""One line brings this project's trainers, datasets and options into a CoOp-style train.py: `import gram_meta.plugin`.

It may stand before or after the imports of Dassl and of the checkout's own trainers and datasets. What the checkout
registers under a name that this project has too (`CoOp`, `VPT`, `OxfordPets`) is what that name means; its `clip`,
`trainers` and `datasets` are the ones that are imported. docs/guide/checkout.md tells the whole of it.

    python -m gram_meta.plugin SCRIPT ARGUMENTS     any script of a checkout, with this line before its first

`trainers/` and `datasets/` stand at the top of the repository and are installed inside the package. This is the one
place in the package that imports them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from pathlib import Path
from types import ModuleType, TracebackType

from gram_meta.coop.defaults import extend_defaults
from gram_meta.coop.missing_packages import do_without_their_packages
from gram_meta.errors import GramError

PACKAGES = ("gram_meta.trainers", "gram_meta.datasets")


def register() -> None:
    """Add the options, and import every trainer and dataset of this project; doing it again changes nothing."""
    extend_defaults()
    for name in PACKAGES:
        package = _package(name)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{name}.{module.name}")


def say_bad_input_in_a_line() -> None:
    """Let an uncaught `GramError` end the program with its one sentence, without a traceback, as `gram` does.

    Every other exception, and a program with an `excepthook` of its own, stays as it is.
    """
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _excepthook


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, GramError):
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


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
do_without_their_packages()
say_bad_input_in_a_line()

if __name__ == "__main__":
    from gram_meta.coop import checkout

    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: python -m gram_meta.plugin SCRIPT ARGUMENTS; expected a script that is there")
    sys.exit(checkout.run(Path(sys.argv[1]), sys.argv[2:]))
