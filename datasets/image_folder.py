"""ImageFolder: your own images, a folder per class, under DATASET.ROOT/DATASET.FOLDER.

The folder has folders of splits (`train`, `Test`, `valid`, ...) with class folders each, or class folders alone. In the
second case half of each class's images are for training, a fifth for validation and the rest for testing; the split is
drawn with a fixed seed and kept in `split.json`.
"""

import os
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gram_meta.corpus.sources.classes import (
    CLASSNAMES,
    SPLIT_NAMES,
    class_name,
    images_below,
    images_in,
    read_classnames,
    same_names,
    subfolders,
)
from gram_meta.corpus.sources.rows import is_broken
from gram_meta.datasets.base import PARTS, SplitDataset, check_splits, read_split
from gram_meta.datasets.few_shot import Entry, Splits
from gram_meta.engine import register_dataset
from gram_meta.errors import GramError
from gram_meta.files import write_json

SPLIT = "split.json"  # in CoOp's format; the user may also provide it
SHARES = {"train": 0.5, "val": 0.2}  # of each class, as CoOp splits datasets whose authors have not
SPLIT_SEED = 1
FEW_SHOT = SplitDataset.few_shot_dir


@register_dataset
class ImageFolder(SplitDataset):
    """Classes are folders with images in or below them, named by the folder or by a `classnames.txt`."""

    image_dir = ""
    source = "class folders"
    named_by = SPLIT  # images listed from class folders exist

    def __init__(self, cfg: Any) -> None:
        if not cfg.DATASET.FOLDER:
            raise GramError(
                "DATASET.FOLDER is ''; expected the folder with your class folders, as it is called under DATASET.ROOT"
            )
        root = os.path.expanduser(cfg.DATASET.ROOT)
        self.dataset_dir = os.path.relpath(unwrap(Path(root, cfg.DATASET.FOLDER)), root)
        super().__init__(cfg)

    @classmethod
    def read(cls, path: Path) -> Splits:
        splits, is_drawn = _look(path)
        if is_drawn:
            _store(path / SPLIT, splits)
        return splits

    @classmethod
    def look(cls, path: Path) -> Splits:
        return _look(path)[0]


def unwrap(path: Path) -> Path:
    """Return the folder that holds the classes or the splits: `path`, or a folder that stands alone in it."""
    while path.is_dir() and not any((path / name).is_file() for name in (SPLIT, CLASSNAMES)):
        folders = _class_folders(path)
        if len(folders) != 1 or folders[0].name.lower() in SPLIT_NAMES or not _holds_classes(folders[0]):
            break
        path = folders[0]
    return path


def _look(path: Path) -> tuple[Splits, bool]:
    """Return the splits, and whether they were drawn here; print what was understood."""
    names = read_classnames(path / CLASSNAMES) if (path / CLASSNAMES).is_file() else None
    if (path / SPLIT).is_file():
        splits, how = read_split(path / SPLIT), SPLIT
        _note_new(path, splits)
    elif set(folders := _split_folders(path)) > {"train"}:
        splits = _read_parts(path, folders, names)
        how = "folders " + ", ".join(folders[part].name for part in PARTS if part in folders)
    else:
        base = unwrap(folders.get("train", path))
        _check_inside(_class_folders(base))
        splits, how = _divide(_listed(path, base, names)), ""
    check_splits(splits, path)
    classes = {str(label): name for _, label, name in sorted(splits["train"], key=lambda entry: entry[1])}
    if set(map(str.lower, classes.values())) <= set(SPLIT_NAMES):
        raise GramError(
            f"{path / SPLIT}: expected classes, found the names of splits ({', '.join(classes.values())}); remove it "
            "to split anew"
        )
    if len(classes) < 2:
        raise GramError(f"{path}: expected at least two classes, found {classes['0']} alone")
    first = ", ".join(list(classes.values())[:5]) + (", ..." if len(classes) > 5 else "")
    counts = ", ".join(f"{part} {len(splits[part])}" for part in splits if splits[part])
    print(f"{path}: {len(classes)} classes ({first}); images: {counts} ({how or 'split by a fixed rule'})")
    if same := same_names(classes):
        print(f"Note: {path}: {same}; no text tells them apart")
    return splits, not how


def _split_folders(path: Path) -> dict[str, Path]:
    """Return the folders of the splits in `path`; {}: its folders are classes, perhaps one of them called "train".

    Words around a split's name are accepted (seg_train, test-images), if all folders have such names. Folders that may
    be splits or classes, two folders of one split, or none of training images raise `GramError`.
    """
    folders = _class_folders(path)
    named = {folder: _split_of(folder.name) for folder in folders}
    meant = [folder for folder in folders if named[folder]]
    exact = [folder for folder in meant if folder.name.lower() in SPLIT_NAMES]
    splits = {named[folder]: folder for folder in meant}
    if not exact and not set(splits) > {"train"}:
        return {}  # bullet_train, crash_test
    if not any(map(_holds_classes, meant)) and (not exact or len(exact) == 1 < len(folders)):
        return {}  # a class among others, such as train beside bus
    if others := [folder.name for folder in folders if not named[folder]]:
        raise GramError(
            f"{path}: expected class folders, or folders of splits such as train and test alone, found {meant[0].name} "
            f"beside {others[0]}; move one of them away, or describe the split in {SPLIT}"
        )
    if len(splits) < len(meant) or "train" not in splits:
        raise GramError(
            f"{path}: expected one folder each of training, validation and test images, found "
            f"{', '.join(folder.name for folder in meant)}"
        )
    return splits


def _split_of(name: str) -> str:
    """Return the split that a folder's name means, "" if none."""
    words = re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+", name)  # trainImages, test_2
    found = {SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else ""


def _check_inside(classes: list[Path]) -> None:
    """Refuse class folders that hold splits; print a note about folders that every class holds."""
    inside = {folder: {inner.name for inner in _class_folders(folder)} for folder in classes}
    for folder, names in inside.items():
        if len({SPLIT_NAMES.get(name.lower()) for name in names} - {None}) > 1:
            raise GramError(
                f"{folder}: expected a class folder, found the splits {', '.join(sorted(names))} in it; expected "
                f"folders of splits with class folders in each, or a {SPLIT}"
            )
    common = set.intersection(*inside.values()) if len(inside) > 1 else set()
    if len(common) > 1:
        print(
            f"Note: each of the classes {classes[0].name}, {classes[1].name}, ... holds the folders "
            f"{', '.join(sorted(common)[:5])}; if those are the classes, name one of their folders as DATASET.FOLDER"
        )


def _holds_classes(path: Path) -> bool:
    return bool(_class_folders(path)) and not images_in(path)


def _read_parts(path: Path, folders: Mapping[str, Path], names: Mapping[str, str] | None) -> Splits:
    """Return the splits in their folders (without a test set, validation is it); labels number train's class
    folders."""
    listed: Splits = {"train": [], "val": [], "test": []}
    labels: dict[str, int] = {}
    for part in filter(folders.get, listed):
        inside = {folder.name for folder in _class_folders(folders[part])}
        base = folders[part] if inside & set(labels) else unwrap(folders[part])
        labels = labels or {folder.name: label for label, folder in enumerate(_class_folders(base))}
        listed[part] = _listed(path, base, names, labels)
    if "test" not in folders:
        listed["val"], listed["test"] = [], listed["val"]
    return listed


def _listed(
    path: Path, base: Path, names: Mapping[str, str] | None, labels: Mapping[str, int] | None = None
) -> list[Entry]:
    """Return the images in the class folders of `base`, with paths relative to `path`."""
    folders = _class_folders(base)
    if not folders:
        raise GramError(f"{base}: expected class folders with images, found none")
    others = [folder.name for folder in subfolders(base) if folder not in folders and folder.name != FEW_SHOT]
    if others:
        print(f"Note: {base}: folders without an image that can be read are left out: {', '.join(others)}")
    if labels is None:
        labels = {folder.name: label for label, folder in enumerate(folders)}
    entries: list[Entry] = []
    for folder in folders:
        if folder.name not in labels:
            raise GramError(f"{folder}: expected a class that has training images, found another")
        name = class_name(folder.name, names)
        if not name:
            wanted = "whose name has more than spaces and underscores" if names is None else f"that {CLASSNAMES} names"
            raise GramError(f"{folder}: expected a class folder {wanted}, found another")
        label = labels[folder.name]
        entries += [(image.relative_to(path).as_posix(), label, name) for image in images_below(folder)]
    if broken := [image for image, _, _ in entries if is_broken(image)]:
        raise GramError(f"{path / broken[0]}: expected a name in UTF-8, found another; rename the file or its folder")
    return entries


def _class_folders(base: Path) -> list[Path]:
    """Return the folders with an image in or below them; split_fewshot holds subsets, not a class."""
    folders = [folder for folder in subfolders(base) if folder.name != FEW_SHOT]
    return [folder for folder in folders if next(images_below(folder), None) is not None]


def _divide(entries: list[Entry]) -> Splits:
    """Split the images of each class by a fixed rule that depends on their names alone."""
    by_label: dict[int, list[Entry]] = {}
    for entry in entries:
        by_label.setdefault(entry[1], []).append(entry)
    splits: Splits = {"train": [], "val": [], "test": []}
    for group in by_label.values():
        name, count = group[0][2], len(group)
        if count < 2:
            raise GramError(f"{group[0][0]}: expected at least two images of {name!r}, to train and to test, found one")
        train = min(max(1, round(count * SHARES["train"])), count - 1)
        val = min(round(count * SHARES["val"]), count - train - 1)
        shuffled = random.Random(f"{SPLIT_SEED} {name}").sample(group, count)
        splits["train"] += sorted(shuffled[:train])
        splits["val"] += sorted(shuffled[train : train + val])
        splits["test"] += sorted(shuffled[train + val :])
    return splits


def _store(path: Path, splits: Splits) -> None:
    shares = ", ".join(f"{part}: {len(entries)}" for part, entries in splits.items())
    try:
        write_json(path, splits)
    except GramError as error:
        print(f"Note: {error}; images were split by the same rule ({shares})")
    else:
        print(f"Images were split ({shares}); the split is kept in {path}")


def _note_new(path: Path, splits: Splits) -> None:
    known = {image for entries in splits.values() for image, _, _ in entries}
    folders = subfolders(path)
    new = sum(image.relative_to(path).as_posix() not in known for folder in folders for image in images_below(folder))
    if new:
        print(f"Note: {path / SPLIT} does not know {new} images that are there; remove it to split anew")
