"""A dataset that a CoOp-style split file describes: `split_zhou_<Name>.json` beside a folder of images.

The file holds {"train": [[path, label, class name], ...], "val": [...], "test": [...]} with paths relative to the
folder of images. Datasets without such a file read something else into the same form.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from gram_meta.datasets.few_shot import Entry, FewShot, Splits, as_entries
from gram_meta.engine import DatasetBase, Datum
from gram_meta.errors import GramError
from gram_meta.files import read_json, sha256_file

SUBSAMPLES = ("all", "base", "new")
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Published:
    """Facts about a published dataset, which `gram check-data` compares with.

    Attributes:
        counts: numbers of classes, and of train, val and test images; None: unknown.
        sources: file or folder -> the address at which its authors, or CoOp, offer it.
        note: further advice on getting it.
    """

    counts: tuple[int | None, int | None, int | None, int | None] = (None, None, None, None)
    sources: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


class SplitDataset(DatasetBase):
    """Base class: subclasses name `dataset_dir` (under DATASET.ROOT), `image_dir` and `split_file` (in `dataset_dir`).

    A dataset without a split file overrides `read`, which then gets the dataset's folder. A dataset without
    `few_shot_parts` is only for testing.

    Attributes:
        few_shot: {"path", "sha256"} of the few-shot subset; both are empty without one, path also if it was not stored.
    """

    dataset_dir = ""
    image_dir = "images"  # "": paths start from the dataset's folder
    split_file = ""
    few_shot_dir = "split_fewshot"  # another one if several datasets share a split file
    few_shot_parts: tuple[str, ...] = ("train", "val")
    source = "lists"  # for messages: what `read` reads if there is no split file
    named_by = ""  # for messages: the file that names the images, if it is neither of these
    published: ClassVar[Published] = Published()

    def __init__(self, cfg: Any) -> None:
        name, shots = type(self).__name__, cfg.DATASET.NUM_SHOTS
        folder = Path(os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT)), self.dataset_dir)
        if not folder.is_dir():
            raise GramError(f"{folder}: expected the folder of {name} under DATASET.ROOT, found no such folder")
        path = folder / self.split_file
        splits = self.read(path)
        self.few_shot = {"path": "", "sha256": ""}
        if shots >= 1 and self.few_shot_parts:
            splits, self.few_shot = self.files(path, splits).subset(splits, shots, cfg.SEED)
        elif shots >= 1:
            print(f"Note: {name} is for testing alone; DATASET.NUM_SHOTS {shots} means nothing to it")
        splits = subsample(splits, cfg.DATASET.SUBSAMPLE_CLASSES)
        super().__init__(**self.data(folder / self.image_dir, splits))

    @classmethod
    def read(cls, path: Path) -> Splits:
        """Return the splits that the split file describes; `path` is the dataset's folder if it has no such file."""
        url = cls.published.sources.get(cls.split_file)
        return read_split(path, f"; CoOp offers it at {url} (gram check-data says what else is missing)" if url else "")

    @classmethod
    def look(cls, path: Path) -> Splits:
        """Return what `read` returns, without writing a file."""
        return cls.read(path)

    @classmethod
    def fingerprint(cls, path: Path, splits: Splits) -> str:
        """Return the SHA-256 of what few-shot subsets are drawn from."""
        if path.is_file():
            return sha256_file(path)
        drawn_from = [splits[part] for part in cls.few_shot_parts]
        return hashlib.sha256(json.dumps(drawn_from).encode()).hexdigest()

    @classmethod
    def files(cls, path: Path, splits: Splits) -> FewShot:
        """Return where this dataset's few-shot subsets are kept."""
        folder = path.parent if path.is_file() else path
        return FewShot(
            folder / cls.few_shot_dir,
            folder / cls.image_dir,
            path.name if path.is_file() else cls.source,
            cls.fingerprint(path, splits),
            cls.few_shot_parts,
        )

    def data(self, images: Path, splits: Splits) -> dict[str, list[Datum]]:
        """Return the arguments of Dassl's DatasetBase."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Dassl warns before it fails
                train, val, test = ([_datum(images, entry) for entry in splits[part]] for part in PARTS)
        except AssertionError:  # Datum looks for its image
            _check_images(splits, images, self.named_by or self.split_file or self.source)
            raise
        return {"train_x": train, "val": val, "test": test}


def read_split(path: Path, advice: str = "") -> Splits:
    """Read and check a split file; `advice` ends the message if there is none."""
    if not path.is_file():
        raise GramError(f"{path}: expected a split file in CoOp's format, found no such file{advice}")
    raw = read_json(path)
    if not isinstance(raw, dict) or not {"train", "test"} <= set(raw):
        raise GramError(f'{path}: expected {{"train": ..., "val": ..., "test": ...}}, found other contents')
    try:
        splits = {part: as_entries(raw.get(part, [])) for part in PARTS}
    except (TypeError, ValueError):
        raise GramError(f"{path}: expected rows of [path, label, class name], found another row") from None
    check_splits(splits, path)
    return splits


def check_splits(splits: Splits, path: Path) -> None:
    """Raise `GramError` (naming `path`) unless labels run from 0, and each has training images and one name."""
    for part in ("train", "test"):
        if not splits[part]:
            raise GramError(f"{path}: expected images in {part!r}, found none")
    known = {label for _, label, _ in splits["train"]}
    if known != set(range(len(known))):
        raise GramError(f"{path}: expected training labels 0 to {len(known) - 1}, found {_some(known)}")
    for part in ("val", "test"):
        if unknown := {label for _, label, _ in splits[part]} - known:
            raise GramError(f"{path}: {part!r} has labels without a training image ({_some(unknown)})")
    names: dict[int, str] = {}
    for entries in splits.values():
        for image, label, name in entries:
            if names.setdefault(label, name) != name:
                raise GramError(
                    f"{path}: expected one class name for label {label}, found {names[label]!r} and {name!r} ({image})"
                )


def subsample(splits: Splits, group: str) -> Splits:
    """Keep the first half of the classes (base; the larger one), the second half (new), or all, labelled from 0."""
    if group not in SUBSAMPLES:
        raise GramError(f"DATASET.SUBSAMPLE_CLASSES is {group!r}; expected one of {', '.join(SUBSAMPLES)}")
    if group == "all":
        return splits
    labels = sorted({label for _, label, _ in splits["train"]})
    half = math.ceil(len(labels) / 2)
    print(f"SUBSAMPLE {group.upper()} CLASSES!")
    chosen = labels[:half] if group == "base" else labels[half:]
    if not chosen:
        raise GramError(f"DATASET.SUBSAMPLE_CLASSES {group}: a dataset of {len(labels)} class has none of them")
    relabelled = {label: new for new, label in enumerate(chosen)}
    return {
        part: [(image, relabelled[label], name) for image, label, name in entries if label in relabelled]
        for part, entries in splits.items()
    }


def _check_images(splits: Splits, images: Path, source: str) -> None:
    """Raise `GramError` if images are missing."""
    named = [entry[0] for entries in splits.values() for entry in entries]
    missing = [image for image in named if not (images / image).is_file()]
    if missing:
        raise GramError(
            f"{images / missing[0]}: {source} names this image, found no such file "
            f"({len(missing)} of {len(named)} images are missing)"
        ) from None


def _datum(images: Path, entry: Entry) -> Datum:
    image, label, name = entry
    return Datum(impath=os.fspath(images / image), label=label, classname=name)


def _some(labels: set[int]) -> str:
    shown = sorted(labels)
    return ", ".join(map(str, shown[:5])) + (", ..." if len(shown) > 5 else "")
