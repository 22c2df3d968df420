"""Reading images by their places: a file, a member of a tar shard, or a row of a Parquet shard.

A store keeps the places of its images as columns of images.parquet, and `Places` reads any of them at random, as
meta-training with visual prompts needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from gram_meta.corpus.open_shards import PARQUET_SUFFIXES, PARQUETS, TARS, ParquetImages, TarFile
from gram_meta.corpus.sources.rows import Place
from gram_meta.errors import GramError
from gram_meta.images import (
    BOMB,
    BROKEN,
    DIGEST_BYTES,
    EMPTY,
    MAX_BYTES,
    MISSING,
    NOT_IMAGE,
    BadImage,
    decode_image,
    digest_of,
    file_content,
)

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

NOT_FINITE = "features not finite"
# A part file stores indices into this: append only.
REASONS = ("", MISSING, EMPTY, NOT_IMAGE, BROKEN, BOMB, NOT_FINITE)


class ImageReader:
    """Reads images by their places below the folder `root`. It is small and can be sent to worker processes.

    `shard_sizes` are the bytes of the shards when they were embedded, to detect changes; None: unknown.
    """

    def __init__(self, root: Path, shard_sizes: Mapping[str, int] | None = None) -> None:
        self.root = root
        self.shard_sizes = shard_sizes or {}

    def content(self, place: Place) -> bytes:
        """Return the bytes of the image file; raise `BadImage` with the reason why it cannot be used.

        Raises `GramError` if its shard is missing or has changed, so that none of its images can be trusted.
        """
        if not place.shard:
            return file_content(self.root / place.location)
        path, size = self.root / place.shard, self.shard_sizes.get(place.shard)
        content: bytes | None
        if path.suffix.lower() in PARQUET_SUFFIXES:
            content = PARQUETS.get((path, size), partial(ParquetImages, path, size)).read(place.offset, place.size)
        elif place.size > MAX_BYTES:
            raise BadImage(BOMB)
        else:
            content = TARS.get((path, size), partial(TarFile, path, size)).read(place.offset, place.size)
        if content is None:
            raise BadImage(MISSING)
        if not content:
            raise BadImage(EMPTY)
        if len(content) > MAX_BYTES:
            raise BadImage(BOMB)
        return content

    def image(self, place: Place) -> tuple[Image.Image, bytes]:
        """Return an image as upright 8-bit RGB, and the digest of its file's content; raise as `content` does."""
        content = self.content(place)
        return decode_image(content), digest_of(content)


@dataclass(frozen=True)
class Places:
    """The images of a store by their rows, without features and captions, so that it can be sent to workers."""

    reader: ImageReader
    locations: Sequence[str]  # m strings
    shards: Sequence[str] = ()  # the different shards
    shard_of: np.ndarray | None = None  # (m,) index into `shards`, -1: a file of its own; None: every image is
    offsets: np.ndarray | None = None  # (m,) as in `Place`, or None
    sizes: np.ndarray | None = None  # likewise

    def __len__(self) -> int:
        return len(self.locations)

    def place(self, row: int) -> Place:
        """Return the place of an image."""
        if self.shard_of is None or self.shard_of[row] < 0:
            return Place(self.locations[row])
        assert self.offsets is not None and self.sizes is not None  # the three are set together
        shard = self.shards[self.shard_of[row]]
        return Place(self.locations[row], shard, int(self.offsets[row]), int(self.sizes[row]))

    def image(self, row: int) -> Image.Image:
        """Return an image as upright 8-bit RGB; raises as `ImageReader.image`."""
        return decode_image(self.reader.content(self.place(row)))

    def name(self, row: int) -> str:
        """Return how a message names the image: its path, or its shard's path and its name in the shard."""
        return str(self.reader.root / self.locations[row])


class ImageBatch(NamedTuple):
    """What was read of a batch of images."""

    images: Tensor | None  # the usable images as (k, 3, H, W), None if there are none
    reasons: list[int]  # for every image, an index into `REASONS`; 0: usable
    digests: list[bytes]  # for every image, the digest of its file's content; zeros if it is not usable


class ImageFiles:
    """Reads batches of images as tensors, `transform` (image) -> (3, H, W); it can be sent to worker processes."""

    def __init__(self, reader: ImageReader, transform: Callable[[Image.Image], Tensor]) -> None:
        self.reader = reader
        self.transform = transform

    def read(self, places: Sequence[Place]) -> ImageBatch:
        """Read the images at these places; an image that cannot be used is left out, with its reason.

        Raises `GramError` if a shard is missing or has changed.
        """
        import torch

        images, reasons, digests = self.read_each(places, self._transformed)
        usable = [image for image in images if image is not None]
        return ImageBatch(torch.stack(usable) if usable else None, reasons, digests)

    def read_each(
        self, places: Sequence[Place], read: Callable[[Place], tuple[T, bytes]]
    ) -> tuple[list[T | None], list[int], list[bytes]]:
        """Return three lists with an entry for every image: see `read_one`."""
        images, reasons, digests = [], [], []
        for place in places:
            image, reason, digest = self.read_one(place, read)
            images.append(image)
            reasons.append(reason)
            digests.append(digest)
        return images, reasons, digests

    def read_one(self, place: Place, read: Callable[[Place], tuple[T, bytes]]) -> tuple[T | None, int, bytes]:
        """Return what `read` makes of an image, an index into `REASONS`, and the digest of its file's content."""
        try:
            image, digest = read(place)
            return image, 0, digest
        except BadImage as error:
            reason = str(error)
        except GramError:
            raise
        except Exception:  # noqa: BLE001 - the transform cannot process this image
            reason = BROKEN
        return None, REASONS.index(reason), bytes(DIGEST_BYTES)

    def _transformed(self, place: Place) -> tuple[Tensor, bytes]:
        image, digest = self.reader.image(place)
        return self.transform(image), digest
