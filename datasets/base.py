"""A dataset that a CoOp-style split file describes: `split_zhou_<Name>.json` beside a folder of images.

The file holds {"train": [[path, label, class name], ...], "val": [...], "test": [...]} with paths relative to the
folder of images. Datasets without such a file read something else into the same form.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from gram_meta.datasets.few_shot import FewShot, Splits, as_entries
from gram_meta.engine import DatasetBase, Datum, register_dataset
from gram_meta.errors import GramError
from gram_meta.files import read_json, sha256_file
from gram_meta.images import find_problems, list_problems

SUBSAMPLES = ("all", "base", "new")
PARTS = ("train", "val", "test")
DECODED = 1000  # before training, a test set of at most so many images is decoded
HEADERS = 100_000  # and of a larger one, at most so many headers are read


@dataclass(frozen=True)
class Published:
    """Facts about a published dataset, which `gram check-data` compares with."""

    # numbers of classes, and of train, val and test images; None: unknown
    counts: tuple[int | None, int | None, int | None, int | None] = (None, None, None, None)
    # file or folder -> the address at which its authors, or CoOp, offer it
    sources: Mapping[str, str] = field(default_factory=dict)
    note: str = ""  # further advice on getting it


class SplitDataset(DatasetBase):
    """Base class: subclasses name `dataset_dir` (under DATASET.ROOT), `image_dir` and `split_file` (in `dataset_dir`).

    A dataset without a split file overrides `read`, which then gets the dataset's folder. A dataset without
    `few_shot_parts` is only for testing. `few_shot` is {"path", "sha256"} of the few-shot subset; both are empty
    without one, path also if it was not stored.
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
        self.folder = folder
        splits = self.read(path)
        if not cfg.DATASET.OUTSIDE_ROOT and (problem := outside(splits)):
            raise GramError(f"{path}: {problem}")
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
        folder, source = (path.parent, path.name) if path.is_file() else (path, cls.source)
        places = folder / cls.few_shot_dir, folder / cls.image_dir
        return FewShot(*places, source, cls.fingerprint(path, splits), cls.few_shot_parts)

    def data(self, images: Path, splits: Splits) -> dict[str, list[Datum]]:
        """Return the arguments of Dassl's DatasetBase."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Dassl warns before it fails
                train, val, test = (
                    [Datum(os.fspath(images / image), label, classname=name) for image, label, name in splits[part]]
                    for part in PARTS
                )
        except AssertionError:  # Datum looks for its image
            named = [entry[0] for part in PARTS for entry in splits[part]]
            missing = [image for image in named if not (images / image).is_file()]
            if not missing:
                raise
            raise GramError(
                f"{images / missing[0]}: {self._source()} names this image, found no such file ({len(missing)} of "
                f"{len(named)} images are missing); {self._remedy()}"
            ) from None
        return {"train_x": train, "val": val, "test": test}

    def check_images(self) -> None:
        """Look for broken images before training: decode few-shot images and a small test set, of others read headers.

        Raises `GramError` for images that cannot be used; it names them, and what to do.
        """
        drawn, test = [*(self.train_x or []), *(self.val or [])], list(self.test or [])
        if not self.few_shot["sha256"]:
            drawn, test = [], [*drawn, *test]
        others = {item.impath for item in test}
        whole = dict.fromkeys(item.impath for item in drawn)
        if len(others) <= DECODED:
            whole |= dict.fromkeys(others)
        header = sorted(others - set(whole))[:HEADERS]
        found = [*find_problems(map(Path, whole)), *find_problems(map(Path, header), header_only=True)]
        bad = list_problems([*whole, *header], found, self.folder / self.image_dir)
        if bad:
            raise GramError(f"{bad}; {self._remedy()}")

    def _source(self) -> str:
        """Return what names the images."""
        made = self.named_by if (self.folder / self.named_by).is_file() else ""
        return made or self.split_file or self.source

    def _remedy(self) -> str:
        """Return what to do about images that are missing or broken."""
        made = [name for name in (self.named_by, self.few_shot_dir) if name and (self.folder / name).exists()]
        if self.split_file or not made:
            return "restore them"
        return f"restore them, or remove them and {' and '.join(made)} in {self.folder}, which are then made anew"


def define(module: str, name: str, doc: str, base: type[SplitDataset] = SplitDataset, **facts: Any) -> Any:
    """Make and register a dataset of `module`: a subclass of `base` with these class attributes."""
    return register_dataset(type(name, (base,), {"__module__": module, "__doc__": doc, **facts}))


def read_split(path: Path, advice: str = "") -> Splits:
    """Read and check a split file; `advice` ends the message if there is none."""
    if not path.is_file():
        raise GramError(f"{path}: expected a split file in CoOp's format, found no such file{advice}")
    raw = read_json(path)
    if not isinstance(raw, dict) or not {"train", "test"} <= set(raw):
        raise GramError(f'{path}: expected {{"train": ..., "val": ..., "test": ...}}, found other contents')
    try:
        splits = {part: as_entries(raw.get(part, [])) for part in PARTS}
    except (TypeError, ValueError) as error:
        raise GramError(f"{path}: expected rows of [path, label, class name], found {error}") from None
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
            if not name.replace("_", " ").strip():
                raise GramError(f"{path}: expected a class name for label {label}, found {name!r} ({image})")
            if names.setdefault(label, name) != name:
                raise GramError(
                    f"{path}: expected one class name for label {label}, found {names[label]!r} and {name!r} ({image})"
                )


def outside(splits: Splits) -> str:
    """Return which images lie outside the folder by their paths, "" if none; links in the folder may lead anywhere."""
    named = [image for entries in splits.values() for image, _, _ in entries]
    found = [image for image in named if image.startswith("/") or ".." in image.split("/")]
    if not found:
        return ""
    count = f"{len(found)} of {len(named)} lead outside, which only DATASET.OUTSIDE_ROOT True allows"
    return f"expected paths of images in this folder, found {found[0]} ({count})"


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


def _some(labels: set[int]) -> str:
    shown = sorted(labels)
    return ", ".join(map(str, shown[:5])) + (", ..." if len(shown) > 5 else "")
