"""A CoOp-style checkout: its own train.py, run with this project's trainers, datasets and options added."""

import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from gram_meta import hooks
from gram_meta.files import expand_home

OWN_FOLDERS = ("clip", "datasets", "trainers")  # of a checkout; installed packages have these names too

DASSL = re.compile(r"^\s*(from|import)\s+dassl\b", re.MULTILINE)


def find_train_py(folder: str | Path = ".") -> Path | None:
    """Return the train.py of a CoOp-style checkout in this folder (it imports Dassl and builds a trainer), or None.

    This project's own train.py does neither itself.
    """
    script = Path(folder, "train.py")
    try:
        text = script.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return script.resolve() if DASSL.search(text) and "build_trainer" in text else None


def train_py_for(flags: Sequence[str]) -> Path | None:
    """Return the train.py of the checkout that `gram train FLAGS` runs, and print it on stderr; None: run our own."""
    if {"-h", "--help"} & set(flags) or not hooks.is_on("checkout-train-py"):
        return None
    script = find_train_py()
    if script is not None:
        print(f"gram train: {script}, with the trainers and options of gram_meta added", file=sys.stderr)
    return script


def run(script: Path, flags: Sequence[str]) -> int:
    """Run a script of a checkout as `python SCRIPT FLAGS` would, with every hook installed before it."""
    from gram_meta.coop.command_line import CommandLine
    from gram_meta.coop.register import install  # imports Dassl and torch; `gram --help` does without

    flags = expand_home(list(flags))
    sys.argv = [str(script), *flags]
    if hooks.is_on("checkout-folders"):
        folder = str(script.resolve().parent)
        sys.path.insert(0, folder)
        _forget_namesakes(folder)
    install(CommandLine.parse(flags))
    runpy.run_path(str(script), run_name="__main__")
    return 0


def _forget_namesakes(folder: str) -> None:
    """Remove modules from `sys.modules` that have the name of a folder of the checkout and would hide it."""
    for name in OWN_FOLDERS:
        module = sys.modules.get(name)
        if module is None or not Path(folder, name).is_dir():
            continue
        places = [str(Path(place).resolve()) for place in getattr(module, "__path__", [])]
        if str(Path(folder, name).resolve()) not in places:
            for key in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
                del sys.modules[key]
