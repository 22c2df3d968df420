"""Somebody's CoOp-style checkout: its own train.py, run with this project's trainers, datasets and config keys added."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

OWN_FOLDERS = ("clip", "datasets", "trainers")  # of a checkout; installed packages have these names too

DASSL = re.compile(r"^\s*(from|import)\s+dassl\b", re.MULTILINE)


def find_train_py(folder: str | Path = ".") -> Path | None:
    """The train.py of a CoOp-style checkout in this folder: one that imports Dassl and builds a trainer; else None.

    This project's own train.py does neither itself.
    """
    script = Path(folder, "train.py")
    try:
        text = script.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return script.resolve() if DASSL.search(text) and "build_trainer" in text else None


def train_py_for(flags: Sequence[str]) -> Path | None:
    """The train.py that `gram train FLAGS` runs, said on stderr: that of the checkout it is started in; None: our own."""
    script = None if {"-h", "--help"} & set(flags) else find_train_py()
    if script is not None:
        print(f"gram train: {script}, with the trainers and options of gram_meta added", file=sys.stderr)
    return script


def run(script: Path, flags: Sequence[str]) -> int:
    """Run a script of a checkout as `python SCRIPT FLAGS` would, with the plugin imported before it."""
    folder = str(script.resolve().parent)
    sys.argv = [str(script), *flags]
    sys.path.insert(0, folder)
    _forget_namesakes(folder)
    import gram_meta.plugin  # noqa: F401, registers

    runpy.run_path(str(script), run_name="__main__")
    return 0


def _forget_namesakes(folder: str) -> None:
    """A module that is called like a folder of the checkout and has been imported already would hide it."""
    for name in OWN_FOLDERS:
        module = sys.modules.get(name)
        if module is None or not Path(folder, name).is_dir():
            continue
        places = [str(Path(place).resolve()) for place in getattr(module, "__path__", [])]
        if str(Path(folder, name).resolve()) not in places:
            for key in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
                del sys.modules[key]
