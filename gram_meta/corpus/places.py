"""Where an image lies: a file, a member of a tar shard, or a row of a Parquet shard; and reading it from there.

Readers give each image a `Place`. A store keeps them as columns of images.parquet, and `Places` reads any image of a
store at random: meta-training with visual prompts draws them so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gram_meta.corpus.images import BOMB, BROKEN, EMPTY, MAX_BYTES, MISSING, BadImage, file_content, with_digest
from gram_meta.corpus.open_shards import PARQUETS, TARS, ParquetImages, TarFile
from gram_meta.corpus.parquet_files import PARQUET_SUFFIXES
from gram_meta.corpus.sources.rows import Place


class ImageReader:
    """Reads images of `Place`s below a folder. Small, and may be copied into worker processes.

    Attributes:
        root: folder that locations and shards are relative to.
        shard_sizes: shard -> its bytes when it was embedded, to see that it is still the same; None: not known.
    """

    def __init__(self, root: Path, shard_sizes: Mapping[str, int] | None = None) -> None:
        self.root = root
        self.shard_sizes = shard_sizes or {}

    def content(self, place: Place) -> bytes:
        """The bytes of the image file.

        Raises:
            BadImage: not there, empty, or too large to be a photograph.
            GramError: its shard is not there, or has changed: no image of it can be trusted.
        """
        if place.shard:
            return self._from_shard(place)
        return file_content(self.root / place.location)

    def image(self, place: Place) -> tuple[Image.Image, bytes]:
        """An image as upright 8-bit RGB (`images.decode_image`), and a digest (16 bytes) of its file's content.

        Raises:
            BadImage: with its reason.
            GramError: as `content`.
        """
        return with_digest(self.content(place))

    def _from_shard(self, place: Place) -> bytes:
        path, size = self.root / place.shard, self.shard_sizes.get(place.shard)
        if path.suffix.lower() in PARQUET_SUFFIXES:
            return _from_parquet(PARQUETS.get((path, size), lambda: ParquetImages(path, size)), place)
        if not place.size:
            raise BadImage(EMPTY)
        if place.size > MAX_BYTES:
            raise BadImage(BOMB)
        tar = TARS.get((path, size), lambda: TarFile(path, size))
        try:
            return tar.read(place.offset, place.size)
        except OSError:  # the disk has lost this piece
            raise BadImage(BROKEN) from None


def _from_parquet(file: ParquetImages, place: Place) -> bytes:
    import pyarrow as pa

    try:
        content = file.read(place.offset, place.size)
    except (pa.ArrowException, OSError):  # a damaged row group
        raise BadImage(BROKEN) from None
    if content is None:
        raise BadImage(MISSING)
    if not content:
        raise BadImage(EMPTY)
    if len(content) > MAX_BYTES:
        raise BadImage(BOMB)
    return content


@dataclass(frozen=True)
class Places:
    """The images of a store by their rows: all that a worker process needs of it, no features and no captions.

    Attributes:
        locations: m strings. shards: the different shards. shard_of: (m,) index into `shards`, -1: a file of its own;
            None: all of them are. offsets, sizes: (m,) as in `Place`, or None.
    """

    reader: ImageReader
    locations: Sequence[str]
    shards: Sequence[str] = ()
    shard_of: np.ndarray | None = None
    offsets: np.ndarray | None = None
    sizes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.locations)

    def place(self, row: int) -> Place:
        if self.shard_of is None or self.shard_of[row] < 0:
            return Place(self.locations[row])
        assert self.offsets is not None and self.sizes is not None  # they come together
        shard = self.shards[self.shard_of[row]]
        return Place(self.locations[row], shard, int(self.offsets[row]), int(self.sizes[row]))

    def image(self, row: int) -> tuple[Image.Image, bytes]:
        """As `ImageReader.image`."""
        return self.reader.image(self.place(row))

    def name(self, row: int) -> str:
        """What a message calls the image: its path, or its shard's path and its name in there."""
        return str(self.reader.root / self.locations[row])
