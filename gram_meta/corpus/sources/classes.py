"""A labelled collection: a folder of class folders, as ImageNet and WebVision come.

A class is a folder with images somewhere below it; its name is the folder's (underscores become spaces), or stands in
a list of lines "folder name of the class", such as ImageNet's `classnames.txt`.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from gram_meta.corpus.sources.rows import IMAGE_SUFFIXES, Row, checked
from gram_meta.corpus.sources.source import Source
from gram_meta.errors import GramError

log = logging.getLogger(__name__)

CLASSNAMES = "classnames.txt"
TRAIN_FOLDERS = ("train", "images/train")  # where training images lie in a collection that has splits
MAX_DEPTH = 4  # levels below the collection at which folders of a list are looked for

NO_CLASS = "not in a class folder"
NOT_LISTED = "class folder without a name in the list"


def open_classes(path: Path, classnames: Path | None = None) -> Source:
    """A folder of class folders as a source of pairs (image, class name).

    Args:
        path: the folder; where it has `train/` or `images/train/` with class folders, these alone are read.
        classnames: the list of names; None: a `classnames.txt` in the folder, or beside it or one level above if it
            names folders of this collection; without one, folders' names.

    Raises:
        GramError: no folder, no class folders, or a list that does not fit them.
    """
    if not path.is_dir():
        raise GramError(f"{path}: expected a folder of class folders, found no folder")
    base = train_folder(path)
    if not subfolders(base):
        raise GramError(f"{base}: expected class folders, found none")
    source = Source(base.resolve(), "classes", base.resolve())
    inside = next((folder / CLASSNAMES for folder in (base, path) if (folder / CLASSNAMES).is_file()), None)
    given = classnames or inside
    if given is not None:
        depth = _depth(base, read_classnames(given))
        if depth is None:
            raise GramError(
                f"{given}: expected the names of folders below {base}, such as "
                f"{subfolders(base)[0].name!r}, found none of them"
            )
        return _with_names(source, given, depth)
    for folder in list(base.resolve().parents)[:2]:
        file = folder / CLASSNAMES
        if file.is_file() and (depth := _depth(base, read_classnames(file))) is not None:
            return _with_names(source, file, depth)
    return source


def class_rows(source: Source) -> Iterator[Row]:
    """Rows of a source of class folders, class by class in the order of their folders' names."""
    names = read_classnames(source.classnames) if source.classnames else None
    folders = _class_folders(source.path, source.class_depth)
    named = {folder: class_name(folder.name, names) for folder in folders}
    _say(source, {folder.name: name for folder, name in named.items() if name})
    for image in _strays(source.path, source.class_depth):
        yield Row(image.relative_to(source.path).as_posix(), "", NO_CLASS)
    found, empty = False, []
    for folder, name in named.items():
        images = list(images_below(folder))
        for image in images:
            location = image.relative_to(source.path).as_posix()
            if not name:
                yield Row(location, "", NOT_LISTED)
                continue
            found = True
            yield checked(location, name)
        if not images:
            empty.append(folder.name)
    if empty:
        log.warning("class folders without an image (%d): %s", len(empty), _some(empty))
    if not found:
        raise GramError(f"{source.path}: expected images in class folders, found none")


def class_of(location: str, depth: int) -> str:
    """The class folder's name in an image's location relative to the collection."""
    return location.split("/")[depth - 1]


def class_name(folder: str, names: Mapping[str, str] | None = None) -> str:
    """The name of a class: what the list says of its folder ("" where it says nothing), or the folder's own."""
    if names is not None:
        return names.get(folder, "")
    return " ".join(folder.replace("_", " ").split())


def read_classnames(path: Path) -> dict[str, str]:
    """Folder -> class name, in the order of the file's lines: "n01440764 tench"; a tab may stand for the space.

    Raises:
        GramError: no such file, a line without a name, a folder named twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError:
        raise GramError(
            f'{path}: expected lines of "folder class name", as in ImageNet\'s {CLASSNAMES}, found no such file'
        ) from None
    except UnicodeDecodeError as error:
        raise GramError(f"{path}: expected UTF-8 text, found something else ({error})") from None
    names: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        folder, _, name = line.strip().partition("\t" if "\t" in line.strip() else " ")
        folder, name = folder.strip(), " ".join(name.split())
        if not name:
            raise GramError(f'{path}, line {number}: expected "folder class name", found {line.strip()[:60]!r}')
        if folder in names:
            raise GramError(f"{path}, line {number}: expected each folder once, found {folder!r} again")
        names[folder] = name
    if not names:
        raise GramError(f'{path}: expected lines of "folder class name", found none')
    return names


def same_names(names: Mapping[str, str]) -> str:
    """Which class names are borne by several classes, given class -> name; "" where none is."""
    classes: dict[str, list[str]] = defaultdict(list)
    for folder, name in names.items():
        classes[name.lower()].append(folder)
    same = [f"{names[of_name[0]]!r} ({_some(of_name)})" for of_name in classes.values() if len(of_name) > 1]
    return f"classes of the same name: {_some(same)}" if same else ""


def train_folder(path: Path) -> Path:
    """`path`, or the folder of training images in it; a class called "train" holds images itself and is none."""
    for name in TRAIN_FOLDERS:
        folder = path / name
        if folder.is_dir() and subfolders(folder) and not images_in(folder):
            return folder
    return path


def subfolders(folder: Path) -> list[Path]:
    """Folders and links to folders in the order of their names; hidden ones and __MACOSX are none."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not _is_hidden(entry.name) and entry.is_dir()]
    return [folder / name for name in sorted(names)]


def images_below(folder: Path) -> Iterator[Path]:
    """Image files in the order of their names, folder by folder; links to folders below are not followed."""
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        if _is_hidden(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from images_below(Path(entry.path))
        elif is_image(entry.name) and not entry.is_dir():
            yield Path(entry.path)


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def images_in(folder: Path) -> list[str]:
    """Names of the image files directly in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if is_image(entry.name) and not entry.is_dir())


def _with_names(source: Source, classnames: Path, depth: int) -> Source:
    return Source(source.path, source.kind, source.image_root, classnames=classnames.resolve(), class_depth=depth)


def _depth(base: Path, names: Mapping[str, str]) -> int | None:
    """How many levels below `base` the listed folders lie; None: nowhere."""
    level = [base]
    for depth in range(1, MAX_DEPTH + 1):
        level = [child for folder in level for child in subfolders(folder)]
        if any(folder.name in names for folder in level):
            return depth
    return None


def _class_folders(base: Path, depth: int) -> list[Path]:
    level = [base]
    for _ in range(depth):
        level = [child for folder in level for child in subfolders(folder)]
    return level


def _strays(base: Path, depth: int) -> Iterator[Path]:
    """Images above the class folders."""
    level = [base]
    for _ in range(depth):
        for folder in level:
            yield from (folder / name for name in images_in(folder))
        level = [child for folder in level for child in subfolders(folder)]


def _say(source: Source, names: Mapping[str, str]) -> None:
    where = f"named by {source.classnames}" if source.classnames else "named by their folders"
    log.info("%s: %d classes %s", source.path, len(names), where)
    if same := same_names(names):
        log.warning("%s", same)


def _some(items: Iterable[str]) -> str:
    items = list(items)
    return ", ".join(items[:5]) + (", ..." if len(items) > 5 else "")
