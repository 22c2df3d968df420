"""The registration of this project's trainers, datasets and options with Dassl: what `import gram_meta.plugin` does.

`trainers/` and `datasets/` stand at the top of the repository and are installed inside the package. This is the one
place in the package that imports them.
"""

import importlib
import importlib.util
import os
import pkgutil
import sys
from pathlib import Path
from types import ModuleType, TracebackType

from gram_meta import hooks
from gram_meta.coop.command_line import CommandLine
from gram_meta.coop.defaults import extend_defaults
from gram_meta.coop.missing_packages import skip_missing_packages
from gram_meta.errors import GramError

PACKAGES = ("gram_meta.trainers", "gram_meta.datasets")


def install(command_line: CommandLine | None = None) -> None:
    """Install every hook that is on, then import every trainer and dataset; a second call changes nothing.

    Args:
        command_line: the flags of the running train.py; None: those of the first call, at first the process's own.
    """
    show_bad_input_in_one_line()
    command_line = extend_defaults(command_line)
    for name in PACKAGES:
        package = _package(name)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{name}.{module.name}")
    skip_missing_packages(command_line)


def show_bad_input_in_one_line() -> None:
    """Let an uncaught `GramError` end the program with its one sentence, without a traceback, as `gram` does.

    Every other exception keeps its traceback. A program that has set its own `sys.excepthook` keeps that.
    """
    if sys.excepthook is sys.__excepthook__ and hooks.is_on("excepthook"):
        sys.excepthook = _excepthook


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, GramError):
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _package(name: str) -> ModuleType:
    """Import the installed package, or, in a checkout that is not installed, the folder of that name at its top."""
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return importlib.import_module(name)
    folder = Path(__file__).resolve().parents[2] / name.rpartition(".")[2]
    places = [str(folder)]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=places)
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    return package
