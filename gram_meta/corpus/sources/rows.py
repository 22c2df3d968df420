"""What every format yields: rows of a source, each an image-text pair or the reason why it cannot be used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

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
