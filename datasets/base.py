"""A dataset that a CoOp-style split file describes: `split_zhou_<Name>.json` beside a folder of images.

The file holds {"train": [[path, label, class name], ...], "val": [...], "test": [...]} with paths relative to the
folder of images. Few-shot subsets are drawn as CoOp draws them and stored in the same form, relative paths and all, as
`split_fewshot/shot_<n>-seed_<s>.json`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from gram_meta.engine import DatasetBase, Datum
from gram_meta.errors import GramError
from gram_meta.files import read_json, sha256_file, write_json

Entry = tuple[str, int, str]  # path relative to the folder of images, label, class name
Splits = dict[str, list[Entry]]  # "train", "val", "test"

SUBSAMPLES = ("all", "base", "new")
MAX_VAL_SHOTS = 4  # CoOp's: validation never takes more than this many images of a class


class SplitDataset(DatasetBase):
    """Subclasses name `dataset_dir` (under DATASET.ROOT), `image_dir` and `split_file` (in `dataset_dir`).

    Attributes:
        few_shot: {"path", "sha256"} of the few-shot subset; empty without one, path empty where it was not stored.
    """

    dataset_dir = ""
    image_dir = "images"
    split_file = ""
    few_shot_dir = "split_fewshot"  # of its own where several datasets share a split file

    def __init__(self, cfg: Any) -> None:
        folder = Path(os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT)), self.dataset_dir)
        name = type(self).__name__
        if not folder.is_dir():
            raise GramError(
                f"{folder}: expected the folder of {name} under DATASET.ROOT, found no such folder"
            )
        split_path = folder / self.split_file
        splits = self.read(split_path)
        self.few_shot = {"path": "", "sha256": ""}
        if cfg.DATASET.NUM_SHOTS >= 1:
            splits, self.few_shot = few_shot(
                splits, split_path, cfg.DATASET.NUM_SHOTS, cfg.SEED, self.few_shot_dir
            )
        splits = subsample(splits, cfg.DATASET.SUBSAMPLE_CLASSES)
        images = folder / self.image_dir
        _check_images(splits, images, split_path)
        train, val, test = (
            [_datum(images, entry) for entry in splits[part]] for part in ("train", "val", "test")
        )
        super().__init__(train_x=train, val=val, test=test)

    def read(self, path: Path) -> Splits:
        """The splits that the file describes."""
        return read_split(path)


def read_split(path: Path) -> Splits:
    """Read and check a split file."""
    if not path.is_file():
        raise GramError(f"{path}: expected a split file in CoOp's format, found no such file")
    raw = read_json(path)
    if not isinstance(raw, dict) or not {"train", "test"} <= set(raw):
        raise GramError(f'{path}: expected {{"train": ..., "val": ..., "test": ...}}, found other contents')
    try:
        splits = {
            part: [(str(image), int(label), str(name)) for image, label, name in raw.get(part, [])]
            for part in ("train", "val", "test")
        }
    except (TypeError, ValueError):
        raise GramError(f"{path}: expected rows of [path, label, class name], found another row") from None
    for part in ("train", "test"):
        if not splits[part]:
            raise GramError(f"{path}: expected images in {part!r}, found none")
    known = {label for _, label, _ in splits["train"]}
    if known != set(range(len(known))):
        raise GramError(f"{path}: expected training labels 0 to {len(known) - 1}, found {_some(known)}")
    for part in ("val", "test"):
        if strange := {label for _, label, _ in splits[part]} - known:
            raise GramError(f"{path}: {part!r} has labels without a training image ({_some(strange)})")
    return splits


def few_shot(
    splits: Splits, split_path: Path, shots: int, seed: int, folder: str = "split_fewshot"
) -> tuple[Splits, dict[str, str]]:
    """The same splits with `shots` training images per class (validation: at most 4), and which file says so.

    An existing file is used. Otherwise the subset is drawn and stored; where the folder cannot be written, or the seed
    is not fixed, it stays in memory.
    """
    path = split_path.parent / folder / f"shot_{shots}-seed_{seed}.json"
    source = sha256_file(split_path)
    if seed >= 0 and path.is_file():
        print(f"Loading preprocessed few-shot data from {path}")
        stored = read_json(path)
        if stored.get("split_sha256") != source:
            raise GramError(
                f"{path}: was drawn from another {split_path.name} than the one beside it; remove it to draw anew"
            )
        drawn = {part: [tuple(row) for row in stored[part]] for part in ("train", "val")}
        return {**splits, **drawn}, {"path": os.fspath(path), "sha256": sha256_file(path)}
    # the stream of `random` right after Dassl has seeded it, without touching the global generator
    draw = random.Random(seed) if seed >= 0 else random
    print(f"Creating a {shots}-shot dataset")
    drawn = {
        "train": _draw(splits["train"], shots, draw),
        "val": _draw(splits["val"], min(shots, MAX_VAL_SHOTS), draw),
    }
    contents = {"format": 1, "shots": shots, "seed": seed, "split_sha256": source, **drawn}
    facts = {"path": "", "sha256": hashlib.sha256(json.dumps(contents).encode()).hexdigest()}
    if seed >= 0:
        try:
            write_json(path, contents)
        except OSError as error:
            print(f"Note: {path} cannot be written ({error.strerror}); the few-shot data stays in memory")
        else:
            print(f"Saving preprocessed few-shot data to {path}")
            facts = {"path": os.fspath(path), "sha256": sha256_file(path)}
    return {**splits, **drawn}, facts


def subsample(splits: Splits, group: str) -> Splits:
    """Keep the first half of the classes (base; the larger one), the second half (new), or all; labels from 0."""
    if group not in SUBSAMPLES:
        raise GramError(f"DATASET.SUBSAMPLE_CLASSES is {group!r}; expected one of {', '.join(SUBSAMPLES)}")
    if group == "all":
        return splits
    labels = sorted({label for _, label, _ in splits["train"]})
    half = math.ceil(len(labels) / 2)
    print(f"SUBSAMPLE {group.upper()} CLASSES!")
    chosen = labels[:half] if group == "base" else labels[half:]
    if not chosen:
        raise GramError(
            f"DATASET.SUBSAMPLE_CLASSES {group}: a dataset of {len(labels)} class has none of them"
        )
    relabelled = {label: new for new, label in enumerate(chosen)}
    return {
        part: [(image, relabelled[label], name) for image, label, name in entries if label in relabelled]
        for part, entries in splits.items()
    }


def _draw(entries: list[Entry], shots: int, draw: Any) -> list[Entry]:
    """`shots` entries of each label, labels in the order of their first entry; a label with fewer gives all."""
    by_label: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_label[entry[1]].append(entry)
    drawn: list[Entry] = []
    for group in by_label.values():
        drawn.extend(draw.sample(group, shots) if len(group) >= shots else group)
    return drawn


def _check_images(splits: Splits, images: Path, split_path: Path) -> None:
    named = [entry[0] for entries in splits.values() for entry in entries]
    missing = [image for image in named if not (images / image).is_file()]
    if missing:
        raise GramError(
            f"{images / missing[0]}: {split_path.name} names this image, found no such file "
            f"({len(missing)} of {len(named)} images are missing)"
        )


def _datum(images: Path, entry: Entry) -> Datum:
    image, label, name = entry
    return Datum(impath=os.fspath(images / image), label=label, classname=name)


def _some(labels: set[int]) -> str:
    shown = sorted(labels)
    return ", ".join(map(str, shown[:5])) + (", ..." if len(shown) > 5 else "")
