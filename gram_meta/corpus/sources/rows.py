"""What every reader of a source yields: image-text pairs, or the reason why one cannot be used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from gram_meta.corpus.places import Place

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
DAMAGED = "damaged shard"


class Row(NamedTuple):
    """One image-text pair as its source has it, or (in `skip`) the reason why it cannot be used."""

    location: str
    caption: str
    skip: str = ""
    shard: str = ""  # with offset and size: of `Place`
    offset: int = 0
    size: int = 0

    @property
    def place(self) -> Place:
        """Where the image lies."""
        return Place(self.location, self.shard, self.offset, self.size)


class Shard(NamedTuple):
    """A part of a source that can be read by itself; no image of it is in another one.

    Attributes:
        name: the file, relative to the image root; "" for a source that is one piece.
        rows: reads its rows, always in the same order. May be sent to another process.
    """

    name: str
    rows: Callable[[], Iterator[Row]]


def checked(location: str | None, caption: str | None) -> Row:
    """A row with a normalised location and single spaces in its caption, or the reason to skip it."""
    location = (location or "").strip()
    caption = " ".join((caption or "").split())
    if not location or "\0" in location:
        return Row(location, caption, NO_IMAGE)
    if not caption:
        return Row(location, caption, EMPTY_CAPTION)
    if is_broken(location) or is_broken(caption):  # file names need not be UTF-8
        return Row("", "", BAD_UTF8)
    if len(caption) > MAX_CAPTION:
        return Row(location, "", LONG_CAPTION)
    return Row(os.path.normpath(location), caption)


def is_broken(text: str) -> bool:
    """Whether a text was read from bytes that are not UTF-8 (with `surrogateescape`)."""
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)
