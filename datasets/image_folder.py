"""ImageFolder: your own images, a folder per class, under DATASET.ROOT/DATASET.FOLDER.

The folder has `train/` and `test/` (and `val/`) with class folders each, or class folders alone. In the second case
half of each class's images are for training, a fifth for validation and the rest for testing; the split is drawn with a
fixed seed and kept in `split.json`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gram_meta.corpus.sources.classes import (
    CLASSNAMES,
    class_name,
    images_below,
    images_in,
    read_classnames,
    same_names,
    subfolders,
)
from gram_meta.datasets.base import SplitDataset, check_splits, read_split
from gram_meta.datasets.few_shot import Entry, Splits
from gram_meta.engine import register_dataset
from gram_meta.errors import GramError
from gram_meta.files import write_json

SPLIT = "split.json"  # in CoOp's format; the user may also provide it
SHARES = {"train": 0.5, "val": 0.2}  # of each class, as CoOp splits datasets whose authors have not
SPLIT_SEED = 1


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
        self.dataset_dir = cfg.DATASET.FOLDER
        super().__init__(cfg)

    @classmethod
    def read(cls, path: Path) -> Splits:
        is_new = not (path / SPLIT).is_file() and not _is_split(path)
        splits = cls.look(path)
        if is_new:
            _store(path / SPLIT, splits)
        return splits

    @classmethod
    def look(cls, path: Path) -> Splits:
        names = read_classnames(path / CLASSNAMES) if (path / CLASSNAMES).is_file() else None
        if (path / SPLIT).is_file():
            splits = read_split(path / SPLIT)
            _note_new(path, splits)
        elif _is_split(path):
            splits = _read_parts(path, names)
        else:
            splits = _divide(_listed(path, _class_root(path), names))
        check_splits(splits, path)
        if same := same_names({str(label): name for _, label, name in splits["train"]}):
            print(f"Note: {path}: {same}; no text tells them apart")
        return splits


def _is_split(path: Path) -> bool:
    """Return whether `train/` and `test/` or `val/` are folders of class folders, and not classes themselves."""
    return _holds_classes(path / "train") and any(_holds_classes(path / part) for part in ("test", "val"))


def _holds_classes(path: Path) -> bool:
    return path.is_dir() and bool(subfolders(path)) and not images_in(path)


def _class_root(path: Path) -> Path:
    """Return `path`, or its folder `train/` if that is its only folder and has class folders."""
    only_train = [folder.name for folder in subfolders(path)] in (["train"], ["split_fewshot", "train"])
    return path / "train" if only_train and _holds_classes(path / "train") else path


def _read_parts(path: Path, names: Mapping[str, str] | None) -> Splits:
    """Return the splits of train/, val/ and test/ (without test/, val/ is it); labels number train/'s class folders."""
    labels = {folder.name: label for label, folder in enumerate(_class_folders(path / "train"))}
    listed: Splits = {"train": [], "val": [], "test": []}
    for part in listed:
        if (path / part).is_dir():
            listed[part] = _listed(path, path / part, names, labels)
    if not (path / "test").is_dir():
        listed["val"], listed["test"] = [], listed["val"]
    return listed


def _listed(
    path: Path, base: Path, names: Mapping[str, str] | None, labels: Mapping[str, int] | None = None
) -> list[Entry]:
    """Return the images in the class folders of `base`, with paths relative to `path`."""
    folders = _class_folders(base)
    if not folders:
        raise GramError(f"{base}: expected class folders with images, found none")
    if labels is None:
        labels = {folder.name: label for label, folder in enumerate(folders)}
    entries: list[Entry] = []
    for folder in folders:
        if folder.name not in labels:
            raise GramError(f"{folder}: expected a class that has training images, found another")
        name = class_name(folder.name, names)
        if not name:
            raise GramError(f"{folder}: expected a class folder that {CLASSNAMES} names, found another")
        label = labels[folder.name]
        entries += [(image.relative_to(path).as_posix(), label, name) for image in images_below(folder)]
    return entries


def _class_folders(base: Path) -> list[Path]:
    """Return the folders with an image in or below them; split_fewshot holds subsets, not a class."""
    folders = [folder for folder in subfolders(base) if folder.name != "split_fewshot"]
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
    except OSError as error:
        print(f"Note: {path} cannot be written ({error.strerror}); images were split by the same rule ({shares})")
    else:
        print(f"Images were split ({shares}); the split is kept in {path}")


def _note_new(path: Path, splits: Splits) -> None:
    known = {image for entries in splits.values() for image, _, _ in entries}
    folders = subfolders(path)
    new = sum(image.relative_to(path).as_posix() not in known for folder in folders for image in images_below(folder))
    if new:
        print(f"Note: {path / SPLIT} does not know {new} images that are there; remove it to split anew")
