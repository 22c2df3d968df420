"""The interface of a source format, and what formats share: how they recognise, find and choose their files.

To add a format, write a module with a class that has the members of `Format`, and add an instance of it to
`gram_meta.corpus.sources.FORMATS`.
"""

import csv
import json
import logging
import os
from codecs import BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TextIO

from gram_meta.corpus.open_shards import is_parquet
from gram_meta.corpus.sources.patterns import expand, is_pattern
from gram_meta.corpus.sources.rows import Row, Shard, Source
from gram_meta.errors import GramError

log = logging.getLogger(__name__)

TRAIN = ("train", "restval")  # the splits that are read if the user names none
# Folders that usually hold the images of a file of captions, relative to its own folder or the one above.
IMAGE_FOLDERS = (
    *("", "images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr8k_images", "flickr30k_images"),
    *("flickr30k-images", "train2014", "val2014", "train2017", "val2017"),
)
TRIED = 200  # images looked for in each folder
TEXT_SUFFIXES = (".tsv", ".tab", ".csv", ".txt", ".token")
LABELS = {
    "image_column": "an image column",
    "caption_column": "a caption column",
    "image_root": "an image root",
    "classnames": "a list of class names",
    "split": "a split",
    "image_name": "a rule for image names",
}


@dataclass(frozen=True)
class Options:
    """What a user may specify about a source besides its path (see `open_source`); None: the format's default."""

    image_column: str | None = None
    caption_column: str | None = None
    image_root: Path | None = None
    classnames: Path | None = None
    split: str | None = None
    image_name: str | None = None

    def given(self) -> list[str]:
        """Return the names of the options that are set."""
        return [field.name for field in fields(self) if getattr(self, field.name)]


class Peek:
    """What is at a path; everything is read when a format first asks for it, and only once."""

    def __init__(self, path: Path, options: Options) -> None:
        self.path = path
        self.options = options

    @cached_property
    def files(self) -> list[Path]:
        """The tar or Parquet files that the path is, contains or matches (`shard_files`)."""
        return shard_files(self.path)

    @cached_property
    def suffix(self) -> str:
        """The suffix of the file at the path, in lower case; "" if there is no file."""
        return self.path.suffix.lower() if self.path.is_file() else ""

    @property
    def is_text(self) -> bool:
        """Whether the path is a text file by its suffix."""
        return self.suffix in TEXT_SUFFIXES

    @cached_property
    def first_line(self) -> str:
        """The first line of a text file; "" for anything else."""
        return first_lines(self.path, 1)[0] if self.is_text else ""

    @cached_property
    def json(self) -> Any:
        """The content of a `.json` file; None for anything else."""
        return load_json(self.path) if self.suffix == ".json" else None


class Format(Protocol):
    """A format of image-text pairs, with its name for `--format`, title for messages, and fields of `Options`."""

    name: str
    title: str
    options: frozenset[str]

    def claims(self, path: Path, peek: Peek) -> bool:
        """Return whether the path looks like this format; the first format of `FORMATS` that claims it is taken."""
        ...

    def open(self, path: Path, options: Options) -> Source:
        """Describe the source at `path`; raise `GramError` if the path is not of this format."""
        ...

    def shards(self, source: Source) -> list[Shard]:
        """Return the parts of the source in their order; together they hold all rows."""
        ...


class OnePiece:
    """A format whose sources have one shard."""

    def rows(self, source: Source) -> Iterator[Row]:
        """Yield the rows of a source."""
        raise NotImplementedError

    def shards(self, source: Source) -> list[Shard]:
        return [Shard("", partial(self.rows, source))]


def existing_file(path: Path, title: str) -> Path:
    """Return the absolute path of a file; raise `GramError` if there is none."""
    if not path.is_file():
        raise GramError(f"{path}: expected {title}, found {found_at(path)}")
    return path.resolve()


def found_at(path: Path) -> str:
    """Return how a message names what is at a path."""
    return "a folder" if path.is_dir() else "a file" if path.exists() else "nothing there"


def shard_files(path: Path) -> list[Path]:
    """Return the tar or Parquet files that `path` is, contains (also in `data/`, as on the hub) or matches."""
    if path.is_dir():
        for folder in (path, path / "data"):
            entries = sorted(folder.iterdir()) if folder.is_dir() else []
            for is_kind in (is_tar, is_parquet):
                if files := [file for file in entries if is_kind(file) and file.is_file()]:
                    return files
        return []
    if is_pattern(path):
        return expand(path)
    return [path] if path.is_file() and (is_tar(path) or is_parquet(path)) else []


def named_shards(path: Path, is_kind: Callable[[Path], bool], title: str) -> list[Path]:
    """Return the absolute paths of the shards of one kind at `path`; raise `GramError` if there are none."""
    files = [Path(os.path.abspath(file)) for file in shard_files(path) if is_kind(file)]
    if not files:
        raise GramError(f"{path}: expected {title}, found {'none in there' if path.exists() else 'nothing'}")
    return files


def common_folder(files: list[Path], given: Path | None) -> Path:
    """Return the given image root, or the deepest folder that contains all files."""
    return given.resolve() if given else Path(os.path.commonpath([file.parent for file in files]))


def is_tar(path: Path) -> bool:
    """Return whether a file has the name of a tar shard, compressed or not."""
    name = path.name.lower()
    return not name.startswith(".") and (name.endswith((".tar", ".tgz")) or ".tar." in name)


def open_text(path: Path) -> TextIO:
    """Open a file of UTF-8 or, if it begins with such a mark, UTF-16 or UTF-32.

    Broken UTF-8 is read without an error, and can be counted in the row that has it.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    for encoding, marks in (("utf-32", (BOM_UTF32_LE, BOM_UTF32_BE)), ("utf-16", (BOM_UTF16_LE, BOM_UTF16_BE))):
        if start.startswith(marks):
            return open(path, encoding=encoding, errors="replace", newline="")
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


def read_rows(path: Path) -> list[list[str]]:
    """Return the cells of a TSV or a .csv file line by line, without empty lines; lines may differ in length."""
    with open_text(path) as file:
        if path.suffix.lower() == ".csv":
            return [row for row in csv.reader(file) if row]
        return [line.rstrip("\r\n").split("\t") for line in file if line.strip()]


def first_lines(path: Path, count: int) -> list[str]:
    """Return the first lines of a text file without their ends; a very long line is cut."""
    with open_text(path) as file:
        return [file.readline(1 << 16).rstrip("\r\n") for _ in range(count)]


def load_json(path: Path) -> Any:
    """Return the content of a JSON file; raise `GramError` if it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise GramError(f"{path}: expected JSON, found something else ({error})") from None


# --- where the images of a file of captions lie -------------------------------------------------------------


def find_images(path: Path, given: Path | None, forms: Mapping[str, Sequence[str]]) -> tuple[Path, str]:
    """Return the folder that image names start from, and the form of names of which most were found there.

    Looks up TRIED names of each form in the folders that usually hold such images: in `given`, or (None) beside the
    file and one level above it. The folder that has most of them is chosen. Raises `GramError` if no image was found.
    """
    bases = [given] if given else [path.parent, path.parent.parent]
    folders = [folder for base in bases for name in IMAGE_FOLDERS if (folder := base / name).is_dir()]
    best, most = None, 0
    for folder in dict.fromkeys(folders):
        for form, names in forms.items():
            hits = sum((folder / name).is_file() for name in _spread(names))
            if hits > most:
                best, most = (folder, form), hits
    if best is None:
        first = next((name for names in forms.values() for name in names), "")
        tried = ", ".join(str(folder) for folder in bases)
        found = f"found none of {TRIED} that were looked for; name their folder with --image-root"
        raise GramError(f"{path}: expected its images, such as {first}, below {tried}, {found}")
    log.info("%s: images are in %s", path, best[0])
    return best[0].resolve(), best[1]


def _spread(names: Sequence[str]) -> Iterable[str]:
    """Return up to TRIED names, spread over the whole list, that are safe to look up."""
    some = names[:: max(1, len(names) // TRIED)][:TRIED]
    return [name for name in some if "\0" not in name and len(name) < 1000]


# --- splits -------------------------------------------------------------------------------------------------


def choose_split(path: Path, found: Counter[str], given: str | None) -> str | None:
    """Return the splits to read, separated by commas; None: all.

    Without `--split` only training data is read: captions of test images in a meta-corpus are a leak.

    Args:
        found: split -> number of images; "" for images without a split.
        given: as `--split`, `all` for every split; None: train (and restval, which the Karpathy split of COCO adds to
            it) if there is one, else all.
    """
    named = {split: count for split, count in found.items() if split}
    if given == "all":
        return None
    if given:
        missing = [split for split in given.split(",") if split not in named]
        if missing:
            has = ", ".join(f"{split} ({count})" for split, count in named.items()) or "none"
            raise GramError(f"{path}: expected the split {missing[0]!r}, found {has}; --split all takes every one")
        return given
    chosen = [split for split in TRAIN if split in named]
    if "train" not in chosen:
        return None
    rest = [split for split in named if split not in chosen]
    if rest:
        log.info("%s: split %s taken, not %s (--split all takes every one)", path, ", ".join(chosen), ", ".join(rest))
    return ",".join(chosen)


def is_chosen(split: str, chosen: str | None) -> bool:
    """Return whether `split` is one of the splits to read."""
    return chosen is None or split in chosen.split(",")
