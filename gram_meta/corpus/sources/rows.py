"""A source of image-text pairs as plain data, and its rows: each a pair, or the reason why it cannot be used."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gram_meta.errors import GramError
from gram_meta.files import sha256_file

IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"]
)
MAX_CAPTION = 10_000  # characters; a longer one is not a caption but a sign of a broken file

NO_IMAGE = "no image name"
NO_CAPTION_FILE = "no caption file"
EMPTY_CAPTION = "empty caption"
LONG_CAPTION = "caption too long"
BAD_UTF8 = "bad UTF-8"
COLUMN_COUNT = "wrong column count"
UNREADABLE = "unreadable row"
NO_MEMBER = "no image in the sample"
DUPLICATE = "duplicate key"
EXTRA_IMAGE = "another image of the sample"
DAMAGED = "damaged shard"


class Place(NamedTuple):
    """Where one image lies.

    Attributes:
        location: the image's name, unique in its corpus: a path relative to the image root, or absolute. For an image
            in a shard: the shard's path, a slash, and the member's name or the row's number.
        shard: the tar or Parquet file that holds it, as a path like `location`; "" if the image is a file of its own.
        offset: in a tar, the byte at which the image begins; in a Parquet file, its row.
        size: in a tar, the number of bytes; in a Parquet file, the number of the image column.
    """

    location: str
    shard: str = ""
    offset: int = 0
    size: int = 0


class Row(NamedTuple):
    """One row of a source: an image-text pair, or in `skip` the reason why it cannot be used.

    `shard`, `offset` and `size` are those of `Place`.
    """

    location: str
    caption: str
    skip: str = ""
    shard: str = ""
    offset: int = 0
    size: int = 0

    @property
    def place(self) -> Place:
        """The place of the image."""
        return Place(self.location, self.shard, self.offset, self.size)


class Shard(NamedTuple):
    """A part of a source that can be read by itself; its images occur in no other shard."""

    name: str  # the file, relative to the image root; "" if the source is a single shard
    rows: Callable[[], Iterator[Row]]  # reads the rows, always in the same order. It can be pickled


def checked(location: str | None, caption: str | None) -> Row:
    """Return a row with a normalised location and single spaces in its caption, or with the reason to skip it."""
    location = location or ""
    caption = " ".join((caption or "").split())
    if not location.strip() or "\0" in location:
        return Row(location, caption, NO_IMAGE)
    if not caption:
        return Row(location, caption, EMPTY_CAPTION)
    if is_broken(location) or is_broken(caption):  # file names need not be UTF-8
        return Row("", "", BAD_UTF8)
    if len(caption) > MAX_CAPTION:
        return Row(location, "", LONG_CAPTION)
    return Row(os.path.normpath(location), caption)


def is_broken(text: str) -> bool:
    """Return whether a text was decoded (with `surrogateescape`) from bytes that are not UTF-8."""
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


@dataclass(frozen=True)
class Source:
    """What `open_source` found out about a path. It can be pickled and sent to other processes."""

    path: Path  # the folder, file or pattern
    kind: str  # the name of its format (`Format.name`)
    image_root: Path  # the folder that relative image paths, and the names of shards, start from
    image_column: str | None = None  # as the user named them; None: columns with one of the usual names
    caption_column: str | None = None
    classnames: Path | None = None  # for class folders, the file with their names
    class_depth: int = 1  # how many levels below `path` they lie
    files: tuple[Path, ...] = ()  # the files in their order, if the source has several or is made of shards
    split: str | None = None  # the splits to read, separated by commas; None: all
    # for `cc3m`, how image files are named (`conceptual.RULES`); for `karpathy`, whether `filepath` is part of the name
    naming: str | None = None

    def identity(self) -> dict[str, Any]:
        """Return what must stay the same for an interrupted run to be continued.

        A file that names images is identified by its SHA-256; shards, which may be hundreds of gigabytes, by their
        names and sizes; a folder of images by the names, sizes and times of the files that its format reads.
        """
        content = None if self.files or self.path.is_dir() else sha256_file(self.path)
        identity: dict[str, Any] = {
            "path": str(self.path),
            "kind": self.kind,
            "sha256": content,
            "image_root": str(self.image_root),
            "image_column": self.image_column,
            "caption_column": self.caption_column,
        }
        if self.kind in LISTED:
            identity["listing"] = listing(self.path, LISTED[self.kind], with_hidden=self.kind == "folder")
        if self.kind == "classes":
            names = self.classnames
            identity["class_depth"] = self.class_depth
            identity["classnames"] = {"path": str(names), "sha256": sha256_file(names)} if names else None
        if self.split or self.naming:
            identity["split"], identity["naming"] = self.split, self.naming
        if self.files:
            identity["shard_count"] = len(self.files)
            identity["shards"] = {relative_name(self.image_root, file): _size(file) for file in self.files}
        return identity


LISTED = {"folder": IMAGE_SUFFIXES | {".txt"}, "classes": IMAGE_SUFFIXES}  # what formats of folders read, by suffix


def listing(root: Path, suffixes: frozenset[str], with_hidden: bool) -> str:
    """Return the SHA-256 of the names, sizes (bytes) and modification times (ns) of the files below a folder.

    Reads no file: a million take some ten seconds on a local disk. Links to folders are followed, each folder once.

    Args:
        suffixes: of the files, in lower case. with_hidden: whether hidden folders count; hidden files never do.
    """
    digest, seen = hashlib.sha256(), set()
    for folder, below, names in os.walk(root, followlinks=True):
        found, start = os.stat(folder), os.path.relpath(folder, root)
        if (place := (found.st_dev, found.st_ino)) in seen:
            below.clear()
            continue
        seen.add(place)
        below[:] = sorted(name for name in below if with_hidden or name[0] != ".")
        for name in sorted(names):
            if name[0] != "." and os.path.splitext(name)[1].lower() in suffixes:
                digest.update(os.fsencode(f"{start}/{name} {_size_and_time(folder, name)}\0"))
    return digest.hexdigest()


def _size_and_time(folder: str, name: str) -> str:
    try:
        found = os.stat(f"{folder}/{name}")
    except OSError:
        return "unreadable"  # a broken link
    return f"{found.st_size} {found.st_mtime_ns}"


def relative_name(root: Path, file: Path) -> str:
    """Return a file's path relative to `root`, or its absolute path if it does not lie below `root`."""
    return (file.relative_to(root) if file.is_relative_to(root) else file).as_posix()


def _size(shard: Path) -> int:
    try:
        return shard.stat().st_size
    except OSError:
        raise GramError(f"{shard}: expected a shard, found nothing there any more") from None
