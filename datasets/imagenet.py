"""ImageNet, and the four shifted test sets of it.

Each has class folders and a `classnames.txt` with lines "n01440764 tench". Labels number the folders in the order of
their names; images are listed in that order too, so subsets do not depend on the file system.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gram_meta.corpus.sources.classes import CLASSNAMES, images_in, read_classnames, subfolders
from gram_meta.datasets.base import Published, SplitDataset, check_splits, define
from gram_meta.datasets.benchmarks import DRIVE
from gram_meta.datasets.few_shot import Entry, Splits
from gram_meta.engine import register_dataset
from gram_meta.errors import GramError

COPY = "a copy of imagenet/classnames.txt"
NAMES_URL = f"{DRIVE}1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF/view"


@register_dataset
class ImageNet(SplitDataset):
    """The validation set is the test set, as is usual; it also serves for validation, and all of it is used."""

    dataset_dir = "imagenet"
    few_shot_parts = ("train",)
    source = "class folders in images/train"
    published = Published(
        counts=(1000, 1281167, None, 50000),
        sources={"images/train, images/val": "https://image-net.org/index.php", CLASSNAMES: NAMES_URL},
        note="images/val needs class folders too (n01440764, ...), as images/train has them",
    )

    @classmethod
    def read(cls, path: Path) -> Splits:
        images, names = path / cls.image_dir, _names(path, cls)
        train, test = (_listed(images, part, names) for part in ("train", "val"))
        splits = {"train": train, "val": [], "test": test}
        for part, other in (("train", "val"), ("val", "train")):
            classes, others = ({folder.name for folder in subfolders(images / part)} for part in (part, other))
            if missing := sorted(classes - others):
                raise GramError(
                    f"{images / other}: expected the class folders of {part}, found no {missing[0]} "
                    f"({len(missing)} of {len(classes)} are missing)"
                )
        check_splits(splits, path)
        return splits

    @classmethod
    def fingerprint(cls, path: Path, splits: Splits) -> str:
        """Return the hash of the classes alone, so that subsets stay valid when images are added to a class."""
        classes = sorted({(label, name) for _, label, name in splits["train"]})
        return hashlib.sha256(json.dumps(classes).encode()).hexdigest()

    def data(self, images: Path, splits: Splits) -> dict[str, Any]:
        data = super().data(images, splits)
        return {**data, "val": data["test"]}


class ShiftedImageNet(SplitDataset):
    """A test set: its images also serve as the training images from which Dassl takes the class names."""

    few_shot_parts = ()

    @classmethod
    def read(cls, path: Path) -> Splits:
        images = path / cls.image_dir
        entries = cls.entries(images, _names(path, cls))
        splits = {"train": [], "val": [], "test": entries}
        check_splits({**splits, "train": entries}, images)
        return splits

    @classmethod
    def entries(cls, images: Path, names: Mapping[str, str]) -> list[Entry]:
        """Return the images; labels number the existing folders: 200 in ImageNet-A and -R, which have 200 classes."""
        return _listed(images, "", names)

    def __init__(self, cfg: Any) -> None:
        group = cfg.DATASET.SUBSAMPLE_CLASSES
        if group != "all":
            raise GramError(
                f"DATASET.SUBSAMPLE_CLASSES is {group!r}; expected 'all', as {type(self).__name__} is a test set of "
                "all its classes"
            )
        super().__init__(cfg)

    def data(self, images: Path, splits: Splits) -> dict[str, Any]:
        test = super().data(images, splits)["test"]
        return {"train_x": test, "test": test}


@register_dataset
class ImageNetV2(ShiftedImageNet):
    """New photographs; the folders 0 ... 999 are line numbers of classnames.txt."""

    dataset_dir = "imagenetv2"
    image_dir = "imagenetv2-matched-frequency-format-val"
    published = Published(
        counts=(1000, None, None, 10000),
        sources={
            image_dir: "https://s3-us-west-2.amazonaws.com/imagenetv2public/imagenetv2-matched-frequency.tar.gz",
            CLASSNAMES: COPY,
        },
        note="authors' page: https://github.com/modestyachts/ImageNetV2",
    )

    @classmethod
    def entries(cls, images: Path, names: Mapping[str, str]) -> list[Entry]:
        entries: list[Entry] = []
        for label, name in enumerate(names.values()):
            folder = images / str(label)
            if not folder.is_dir():
                raise GramError(f"{folder}: expected the images of {name!r}, found no such folder")
            entries += _images(images, folder, label, name)
        return entries


def _test_set(name: str, doc: str, folders: tuple[str, str], classes: int, images: int, address: str) -> Any:
    """Register a test set; `folders` are `dataset_dir` and `image_dir`."""
    published = Published((classes, None, None, images), {folders[1]: address, CLASSNAMES: COPY})
    places = {"dataset_dir": folders[0], "image_dir": folders[1]}
    return define(__name__, name, doc, ShiftedImageNet, **places, published=published)


ImageNetSketch = _test_set(
    *("ImageNetSketch", "Drawings.", ("imagenet-sketch", "images")),
    *(1000, 50889, "https://github.com/HaohanWang/ImageNet-Sketch"),
)
ImageNetA = _test_set(
    *("ImageNetA", "Photographs that classifiers got wrong, of 200 classes.", ("imagenet-adversarial", "imagenet-a")),
    *(200, 7500, "https://github.com/hendrycks/natural-adv-examples"),
)
ImageNetR = _test_set(
    *("ImageNetR", "Paintings, toys and other renditions, of 200 classes.", ("imagenet-rendition", "imagenet-r")),
    *(200, 30000, "https://github.com/hendrycks/imagenet-r"),
)


def _names(folder: Path, dataset: type[SplitDataset]) -> dict[str, str]:
    path = folder / CLASSNAMES
    if not path.is_file():
        where = dataset.published.sources[CLASSNAMES]
        raise GramError(f'{path}: expected lines of "n01440764 tench", found no such file; CoOp has it from {where}')
    return read_classnames(path)


def _listed(images: Path, part: str, names: Mapping[str, str]) -> list[Entry]:
    """Return the images in class folders; labels number the folders."""
    base = images / part
    if not base.is_dir():
        raise GramError(f"{base}: expected class folders like {next(iter(names))}, found no such folder")
    folders = subfolders(base)
    if not folders:
        raise GramError(
            f"{base}: expected class folders like {next(iter(names))}, found none; images that lie there side by side "
            "have to be sorted into their classes' folders"
        )
    entries: list[Entry] = []
    for label, folder in enumerate(folders):
        if folder.name not in names:
            raise GramError(f"{folder}: expected a class folder that {CLASSNAMES} names, found another")
        entries += _images(images, folder, label, names[folder.name])
    return entries


def _images(images: Path, folder: Path, label: int, name: str) -> list[Entry]:
    place = folder.relative_to(images).as_posix()
    found = [(f"{place}/{image}", label, name) for image in images_in(folder)]
    if not found:
        raise GramError(f"{folder}: expected images of {name!r}, found none")
    return found
