"""Names with braces or wildcards that stand for several files: `{00000..00331}.tar`, `cc3m-train-*.tar`."""

import glob
import os
import re
from pathlib import Path

from gram_meta.errors import GramError

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST = 1_000_000  # files that one name may stand for


def is_pattern(path: Path) -> bool:
    """Return whether a name has braces or wildcards, and is not that of an existing file or folder."""
    return not path.exists() and any(sign in str(path) for sign in "*?[{")


def expand(path: Path) -> list[Path]:
    """Return the files that match a pattern: braces in the order of their numbers, wildcards in the order of names.

    Raises `GramError` if a file of a brace range is missing, or no file matches a wildcard.
    """
    files: list[Path] = []
    for name in _expand_braces(str(path)):
        if any(sign in name for sign in "*?[") and not os.path.exists(name):
            files += [Path(found) for found in sorted(glob.glob(name)) if os.path.isfile(found)]
        else:
            files.append(Path(name))
    missing = [file for file in files if not file.is_file()]
    if missing:
        rest = f" and {len(missing) - 1} more of {len(files)} not there either" if len(missing) > 1 else ""
        raise GramError(f"{path}: expected the file {missing[0]}, found nothing there{rest}")
    if not files:
        raise GramError(f"{path}: expected files of such names, found none")
    return list(dict.fromkeys(files))


def _expand_braces(name: str) -> list[str]:
    """Return every name that braces stand for: {a,b} and {00..10}, whose numbers keep their width."""
    match = BRACES.search(name)
    if match is None:
        return [name]
    before, after = name[: match.start()], name[match.end() :]
    names = [whole for value in _values(name, match[1]) for whole in _expand_braces(before + value + after)]
    if len(names) > MOST:
        raise GramError(f"{name}: expected at most {MOST} files, found more")
    return names


def _values(name: str, inside: str) -> list[str]:
    numbers = RANGE.fullmatch(inside)
    if not numbers:
        if "," not in inside:
            raise GramError(f"{name}: expected braces such as {{00000..00331}} or {{a,b}}, found {{{inside}}}")
        return inside.split(",")
    first, last = numbers.groups()
    width = len(first) if len(first) == len(last) or first.startswith("0") else 0
    step = 1 if int(first) <= int(last) else -1
    if abs(int(last) - int(first)) >= MOST:
        raise GramError(f"{name}: expected at most {MOST} files, found {{{inside}}}")
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
