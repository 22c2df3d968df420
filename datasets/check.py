"""The checks of `gram check-data`: which datasets are in a folder, what is missing or wrong, and where to get it."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml

from gram_meta.config import ELEVEN, SHIFTED, did_you_mean, find_config
from gram_meta.datasets.base import PARTS, SplitDataset, outside
from gram_meta.datasets.few_shot import Splits
from gram_meta.datasets.image_folder import ImageFolder, unwrap
from gram_meta.datasets.pickles import read_pickle
from gram_meta.errors import GramError
from gram_meta.files import read_json
from gram_meta.images import find_problems
from gram_meta.progress import progress_bar

FINE, MISSING, WRONG = "fine", "missing", "wrong"

PAPER = ELEVEN + SHIFTED  # `gram check-data` checks them if no datasets are named


@dataclass
class Finding:
    """The result of checking one dataset."""

    name: str  # of its config
    folder: str  # its expected folder
    state: str = FINE  # `FINE`, `MISSING` or `WRONG`
    classes: int | None = None  # number found; None if they could not be read
    images: dict[str, int] = field(default_factory=dict)  # numbers found by part
    # the published numbers that are known: {"classes": 100, "train": 4128, ...}
    expected: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # a sentence each
    notes: list[str] = field(default_factory=list)  # harmless facts
    sources: dict[str, str] = field(default_factory=dict)  # file or folder -> its address


def data_root(root: str) -> Path:
    """Return the absolute path of --root; raise `GramError` if it is no folder."""
    path = Path(os.path.abspath(os.path.expanduser(root)))
    if not path.is_dir():
        raise GramError(f"{path}: expected the folder that holds the datasets' folders, found no such folder")
    return path


def split_names(words: Sequence[str] | None) -> list[str]:
    """Return the names of --datasets, which may be separated by commas too."""
    return [name for word in words or () for name in word.split(",") if name]


def known_datasets() -> list[str]:
    """Return the names of the configs of all datasets that have a folder of their own: the paper's first."""
    names = [config for config, name in _configs() if name != "ImageFolder"]
    return sorted(names, key=lambda name: (name not in PAPER, name))


def find_datasets(root: Path, names: Sequence[str]) -> list[tuple[str, type[SplitDataset]]]:
    """Find datasets by the names of their configs or classes, or of folders under `root`; others are a `GramError`."""
    classes = {cls.__name__: cls for cls in _subclasses(SplitDataset)}
    configs = {config: classes[name] for config, name in _configs() if name in classes and name != "ImageFolder"}
    by_name = {name.lower(): (config, cls) for config, cls in configs.items() for name in (config, cls.__name__)}
    found = []
    for name in names:
        if name.lower() in by_name:
            found.append(by_name[name.lower()])
        elif (root / name).is_dir():
            folder = os.path.relpath(unwrap(root / name), root)
            found.append((name, type("ImageFolder", (ImageFolder,), {"dataset_dir": folder})))
        else:
            raise GramError(
                f"--datasets {name}: expected the name of a dataset or of a folder in {root}, found neither"
                f"{did_you_mean(name, configs)}"
            )
    return found


def check(root: Path, name: str, dataset: type[SplitDataset], deep: bool = False, workers: int = 8) -> Finding:
    """Check one dataset; `deep` opens every image, in `workers` threads, else images are only counted."""
    folder = root / dataset.dataset_dir
    published = dataset.published
    found = Finding(name, os.fspath(folder), sources=dict(published.sources))
    numbers = zip(("classes", *PARTS), published.counts, strict=True)
    found.expected = {what: number for what, number in numbers if number is not None}
    if not folder.is_dir():
        found.state = MISSING
        found.problems.append(f"{folder}: no such folder")
    else:
        _check_folder(found, folder, dataset, workers if deep else 0)
        found.state = WRONG if found.problems else FINE
    if published.note and found.state != FINE:
        found.notes.append(published.note)
    return found


def _check_folder(found: Finding, folder: Path, dataset: type[SplitDataset], workers: int) -> None:
    path, images = folder / dataset.split_file, folder / dataset.image_dir
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            splits = dataset.look(path)
    except GramError as error:
        found.problems.append(str(error))
        if dataset.split_file and not images.is_dir():
            found.problems.append(f"{images}: expected the folder of images, found no such folder")
        return
    found.notes += [line.removeprefix("Note: ") for line in printed.getvalue().splitlines()]
    found.classes = len({label for part in PARTS for _, label, _ in splits[part]})
    found.images = {part: len(splits[part]) for part in PARTS if splits[part]}
    for what, number in found.expected.items():
        count = found.classes if what == "classes" else len(splits[what])
        if count != number:
            kind = "classes" if what == "classes" else f"{what} images"
            found.problems.append(f"{path}: expected {number} {kind}, found {count}")
    named = [image for part in PARTS for image, _, _ in splits[part]]
    if not images.is_dir():
        found.problems.append(f"{images}: expected the folder of images, found no such folder")
        return
    if problem := outside(splits):
        found.problems.append(f"{path}: {problem}")
    if missing := _missing(images, named):
        found.problems.append(f"{images}: {len(missing)} of {len(named)} images are missing, such as {missing[0]}")
        named = sorted(set(named) - set(missing))
    if workers:
        found.problems += _broken(images, named, workers)
    _check_few_shot(found, folder, path, splits, dataset)
    if (folder / "preprocessed.pkl").is_file():
        found.notes.append(
            f"{folder / 'preprocessed.pkl'} is a cache of CoOp's own code and is not read here; remove it when images "
            "have moved or changed"
        )


def _missing(images: Path, named: Sequence[str]) -> list[str]:
    """Return the missing images; each folder is listed once."""

    @cache
    def files_in(folder: str) -> set[str]:
        with suppress(OSError), os.scandir(images / folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
        return set()

    return [image for image in named if os.path.basename(image) not in files_in(os.path.dirname(image))]


def _broken(images: Path, named: Sequence[str], workers: int) -> list[str]:
    """Return a sentence for each reason why images cannot be used, with all these images."""
    bad: dict[str, list[str]] = {}
    results = find_problems((images / image for image in named), workers=workers)
    bar = progress_bar(results, total=len(named), unit="image", desc=images.name, leave=False)
    for image, why in zip(named, bar, strict=True):
        if why:
            bad.setdefault(why, []).append(image)
    return [f"{images}: {why}: {len(found)}: {', '.join(found)}" for why, found in sorted(bad.items())]


def _check_few_shot(found: Finding, folder: Path, path: Path, splits: Splits, dataset: type[SplitDataset]) -> None:
    stored = sorted((folder / dataset.few_shot_dir).glob("shot_*-seed_*.*"))
    fingerprint = dataset.fingerprint(path, splits) if stored else ""
    for file in stored:
        try:
            if file.suffix == ".json":
                contents = read_json(file)
                if not isinstance(contents, dict) or contents.get("split_sha256") != fingerprint:
                    found.problems.append(
                        f"{file}: was drawn from other images or another split file; remove it to draw anew"
                    )
            elif file.suffix == ".pkl":
                records = [record for part in read_pickle(file).values() for record in part]
                if records and not os.path.isfile(records[0][0]):
                    found.notes.append(
                        f"{file} names images where they are not ({records[0][0]}); the next run that uses it renews it"
                    )
        except GramError as error:
            found.notes.append(str(error))


def _subclasses(cls: type) -> Iterator[type]:
    subclass: type
    for subclass in cls.__subclasses__():
        if subclass.__module__.startswith("gram_meta.datasets."):
            yield subclass
            yield from _subclasses(subclass)


def _configs() -> Iterator[tuple[str, str]]:
    """Yield the name of each dataset's config and of its class."""
    for path in sorted(find_config("caltech101", "datasets").parent.glob("*.yaml")):
        yield path.stem, yaml.safe_load(path.read_text(encoding="utf-8"))["DATASET"]["NAME"]
