"""A labelled collection: a folder of class folders, such as ImageNet and WebVision.

A class is a folder with images somewhere below it. Its name is that of the folder (with spaces for underscores), or
comes from a list of lines "folder class name", such as ImageNet's `classnames.txt`.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from unicodedata import normalize

from gram_meta.corpus.sources.format import OnePiece, Options, Peek, open_text
from gram_meta.corpus.sources.rows import IMAGE_SUFFIXES, Row, Source, checked, is_broken
from gram_meta.errors import GramError

log = logging.getLogger(__name__)

CLASSNAMES = "classnames.txt"
SPLIT_NAMES = {  # usual names of folders, in lower case
    f"{name}{end}": split
    for split, names in {
        "train": "train training trn",
        "val": "val valid validation validate dev",
        "test": "test testing tst eval evaluation",
    }.items()
    for name in names.split()
    for end in ("", "set")
}
MAX_DEPTH = 4  # levels below the collection that are searched for the folders of a list

NO_CLASS = "not in a class folder"
NOT_LISTED = "class folder without a name in the list"
NO_NAME = "class folder named by spaces or underscores"


class ClassFolders(OnePiece):
    """A folder of class folders; the pairs are (image, class name)."""

    name = "classes"
    title = "a folder of class folders"
    options = frozenset({"classnames"})

    def claims(self, path: Path, peek: Peek) -> bool:
        return False  # indistinguishable from a folder of images: the user has to name this format

    def open(self, path: Path, options: Options) -> Source:
        """Describe a folder of class folders; of a folder with `train/` or `images/train/`, these alone are read.

        The list of names is the given one; else a `classnames.txt` in the folder, or beside it or one level above if it
        names folders of this collection; without a list, the folders' names are the classes' names. Raises `GramError`
        for no folder, no class folders, or a list that does not fit them.
        """
        if not path.is_dir():
            raise GramError(f"{path}: expected a folder of class folders, found no folder")
        base = train_folder(path)
        if not subfolders(base):
            raise GramError(f"{base}: expected class folders, found none")
        root = base.resolve()
        inside = next((folder / CLASSNAMES for folder in (base, path) if (folder / CLASSNAMES).is_file()), None)
        given = options.classnames or inside
        if given is not None:
            depth = _depth(base, read_classnames(given))
            if depth is None:
                such = f"such as {subfolders(base)[0].name!r}"
                raise GramError(f"{given}: expected the names of folders below {base}, {such}, found none of them")
            return Source(root, self.name, root, classnames=given.resolve(), class_depth=depth)
        for folder in list(root.parents)[:2]:
            file = folder / CLASSNAMES
            if file.is_file() and (depth := _depth(base, read_classnames(file))) is not None:
                return Source(root, self.name, root, classnames=file.resolve(), class_depth=depth)
        return Source(root, self.name, root)

    def rows(self, source: Source) -> Iterator[Row]:
        """Yield the rows class by class, in the order of their folders' names."""
        names = read_classnames(source.classnames) if source.classnames else None
        *_, folders = _levels(source.path, source.class_depth)
        named = {folder: class_name(folder.name, names) for folder in folders}
        _log_classes(source, {folder.name: name for folder, name in named.items() if name})
        for folder in chain.from_iterable(_levels(source.path, source.class_depth - 1)):  # above the class folders
            for file in images_in(folder):
                yield Row((folder / file).relative_to(source.path).as_posix(), "", NO_CLASS)
        found, empty = False, []
        for folder, name in named.items():
            images = list(images_below(folder))
            for image in images:
                location = image.relative_to(source.path).as_posix()
                if not name:
                    yield Row(location, "", NOT_LISTED if names else NO_NAME)
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
    """Return the name of the class folder in an image's location relative to the collection."""
    return location.split("/")[depth - 1]


def class_name(folder: str, names: Mapping[str, str] | None = None) -> str:
    """Return the name of a class: the one in the list ("" if the list has none), or without a list the folder's."""
    if names is not None:
        return names.get(folder, "")
    return " ".join(folder.replace("_", " ").split())


def read_classnames(path: Path) -> dict[str, str]:
    """Return folder -> class name, in the order of the file's lines: "n01440764 tench", with a space or a tab.

    Raises `GramError` for no such file, a line without a name, or a folder named twice.
    """
    expected = f'lines of "folder class name", as in ImageNet\'s {CLASSNAMES}'
    names: dict[str, str] = {}
    for number, line in read_lines(path, expected):
        folder, _, name = line.partition("\t" if "\t" in line else " ")
        folder, name = folder.strip(), " ".join(name.split())
        if not name:
            raise GramError(f'{path}, line {number}: expected "folder class name", found {line[:60]!r}')
        if folder in names:
            raise GramError(f"{path}, line {number}: expected each folder once, found {folder!r} again")
        names[folder] = name
    if not names:
        raise GramError(f'{path}: expected lines of "folder class name", found none')
    return names


def read_lines(path: Path, expected: str) -> list[tuple[int, str]]:
    """Return the lines of a UTF-8 file that are not blank, stripped, with their numbers from 1.

    Raises `GramError` for no such file (the message names what was `expected`), or another encoding.
    """
    try:
        with open_text(path) as file:
            lines = file.read().splitlines()
    except OSError:
        raise GramError(f"{path}: expected {expected}, found no such file") from None
    if any(map(is_broken, lines)):
        raise GramError(f"{path}: expected UTF-8 text, found something else")
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def same_names(names: Mapping[str, str]) -> str:
    """Return which names several classes share, given class -> name; "" if there are none."""
    classes: dict[str, list[str]] = defaultdict(list)
    for folder, name in names.items():
        classes[normalize("NFC", name).lower()].append(folder)
    same = [f"{names[of_name[0]]!r} ({_some(of_name)})" for of_name in classes.values() if len(of_name) > 1]
    return f"classes of the same name: {_some(same)}" if same else ""


def train_folder(path: Path) -> Path:
    """Return `path`, or the folder of training images in it or in its `images/`, such as `train` and `Training`.

    A folder "train" that itself holds images is a class.
    """
    for base in filter(Path.is_dir, (path, path / "images")):
        for folder in subfolders(base):
            if SPLIT_NAMES.get(folder.name.lower()) == "train" and subfolders(folder) and not images_in(folder):
                return folder
    return path


def subfolders(folder: Path) -> list[Path]:
    """Return folders and links to folders in the order of their names, without hidden ones and __MACOSX."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not _is_hidden(entry.name) and entry.is_dir()]
    return [folder / name for name in sorted(names)]


def images_below(folder: Path, with_hidden: bool = False) -> Iterator[Path]:
    """Yield image files in the order of their names, folder by folder; links to folders below are not followed.

    `with_hidden`: also look into hidden folders and __MACOSX; hidden files are never yielded.
    """
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        if entry.is_dir(follow_symlinks=False):
            if with_hidden or not _is_hidden(entry.name):
                yield from images_below(Path(entry.path), with_hidden)
        elif is_image(entry.name) and not entry.is_dir():
            yield Path(entry.path)


def is_image(name: str) -> bool:
    """Return whether a file has the name of an image that is not hidden."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def images_in(folder: Path) -> list[str]:
    """Return the names of the image files directly in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if is_image(entry.name) and not entry.is_dir())


def _depth(base: Path, names: Mapping[str, str]) -> int | None:
    """Return how many levels below `base` the listed folders lie; None: they are not found."""
    for depth, folders in enumerate(_levels(base, MAX_DEPTH)):
        if depth and any(folder.name in names for folder in folders):
            return depth
    return None


def _levels(base: Path, depth: int) -> Iterator[list[Path]]:
    """Yield the folders of each level: `base` alone, its subfolders, and so on down to `depth`."""
    level = [base]
    yield level
    for _ in range(depth):
        level = [child for folder in level for child in subfolders(folder)]
        yield level


def _log_classes(source: Source, names: Mapping[str, str]) -> None:
    where = f"named by {source.classnames}" if source.classnames else "named by their folders"
    log.info("%s: %d classes %s", source.path, len(names), where)
    if same := same_names(names):
        log.warning("%s", same)


def _some(items: Iterable[str]) -> str:
    items = list(items)
    return ", ".join(items[:5]) + (", ..." if len(items) > 5 else "")
