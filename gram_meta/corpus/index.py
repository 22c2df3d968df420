"""The work of an embedding run, written down before it begins.

The source is read once, rows that cannot be used are counted, images are numbered in the order of their first
appearance, and what is left is cut into parts. A part is one row group of `index.parquet`, so a run that goes
on after an interruption finds the same parts, and any process can work on any part.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gram_meta.corpus.readers import Source
from gram_meta.files import atomic_write, read_json, write_json

# `location` is filled in the row where an image appears for the first time, and null in the others.
SCHEMA = pa.schema([("image", pa.int64()), ("caption", pa.string()), ("location", pa.string())])


class Index:
    """Usable pairs in the order of their source, in parts.

    Attributes:
        rows: rows of the source. pairs, images: usable pairs, distinct images among them.
        skipped: rows left out, by reason.
        bounds: (parts + 1,) part k brings in the images from bounds[k] up to bounds[k + 1].
    """

    def __init__(self, folder: Path) -> None:
        plan = read_json(folder / "plan.json")
        self.path = folder / "index.parquet"
        self.rows: int = plan["rows"]
        self.pairs: int = plan["pairs"]
        self.images: int = plan["images"]
        self.skipped: dict[str, int] = plan["skipped"]
        self.bounds: list[int] = plan["bounds"]
        self.sizes: list[int] = plan["sizes"]

    @property
    def parts(self) -> int:
        return len(self.sizes)

    def pairs_of(self, part: int) -> tuple[np.ndarray, list[str]]:
        """Image numbers (n,) and captions of a part's pairs."""
        table = self._read(part, ["image", "caption"])
        return table["image"].to_numpy(), table["caption"].to_pylist()

    def locations_of(self, part: int) -> list[str]:
        """Locations of the images that a part brings in."""
        return self._read(part, ["location"])["location"].drop_null().to_pylist()

    def _read(self, part: int, columns: list[str]) -> pa.Table:
        with pq.ParquetFile(self.path) as file:
            return file.read_row_group(part, columns=columns, use_threads=False)


def write_index(source: Source, folder: Path, part_size: int) -> Index:
    """Read `source` once and write its index; the file `plan.json` says that it is complete.

    Memory: one part, and about 200 bytes per distinct image.
    """
    numbers: dict[bytes, int] = {}  # digest of an image's location -> its number
    skipped: Counter[str] = Counter()
    bounds, sizes, rows = [0], [], 0
    images: list[int] = []
    captions: list[str] = []
    locations: list[str | None] = []
    with atomic_write(folder / "index.parquet") as file, pq.ParquetWriter(file, SCHEMA) as writer:

        def close_part() -> None:
            writer.write_table(
                pa.table([images, captions, locations], schema=SCHEMA), row_group_size=len(images)
            )
            bounds.append(len(numbers))
            sizes.append(len(images))
            for column in (images, captions, locations):
                column.clear()

        for row in source.rows():
            rows += 1
            if row.skip:
                skipped[row.skip] += 1
                continue
            digest = hashlib.blake2b(row.location.encode("utf-8", "surrogateescape"), digest_size=16).digest()
            is_new = digest not in numbers
            images.append(numbers.setdefault(digest, len(numbers)))
            captions.append(row.caption)
            locations.append(row.location if is_new else None)
            if len(images) == part_size:
                close_part()
        if images:
            close_part()
    plan = {
        "rows": rows,
        "pairs": sum(sizes),
        "images": len(numbers),
        "skipped": dict(sorted(skipped.items())),
        "bounds": bounds,
        "sizes": sizes,
    }
    write_json(folder / "plan.json", plan)
    return Index(folder)
