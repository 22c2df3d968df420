"""The work of an embedding run, written down before it begins.

Every shard of the source is read once, by one process; rows that cannot be used are counted, images are numbered in
the order of their first appearance, and what is left is cut into parts. A part is one row group of its shard's index,
so a run that goes on after an interruption finds the same parts, and any process can work on any part. Numbers of
images begin at 0 in every shard; where a shard's begin in the store follows from the counts of those before it, so
nobody has to hold all names of a corpus at once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gram_meta.corpus.images import images_of
from gram_meta.corpus.open_shards import check_shard
from gram_meta.corpus.sources.rows import Place, Shard
from gram_meta.errors import GramError
from gram_meta.files import atomic_write, read_json, write_json
from gram_meta.processes import ALONE, ProcessGroup

log = logging.getLogger(__name__)

PLAN = "plan.json"
PLAN_FORMAT = 2
# `location` and what follows are filled in the row where an image appears for the first time, and null in the others.
SCHEMA = pa.schema(
    [
        ("image", pa.int64()),
        ("caption", pa.string()),
        ("location", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)


class Index:
    """Usable pairs in the order of their source, in parts.

    Attributes:
        rows: rows of the source. pairs, images: usable pairs, distinct images among them.
        skipped: rows left out, by reason.
        bounds: (parts + 1,) part k brings in the images from bounds[k] up to bounds[k + 1].
        sizes: (parts,) pairs of each.
        first_parts: (shards of the source + 1,) a shard's parts are those from first_parts[s] up to first_parts[s + 1].
        shard_bytes: the size of every tar or Parquet file that images are read from; {} where each is its own file.
    """

    def __init__(self, folder: Path) -> None:
        plan = read_json(folder / PLAN)
        self.folder = folder
        self.rows: int = plan["rows"]
        self.pairs: int = plan["pairs"]
        self.images: int = plan["images"]
        self.skipped: dict[str, int] = plan["skipped"]
        self.bounds: list[int] = plan["bounds"]
        self.sizes: list[int] = plan["sizes"]
        self.first_parts: list[int] = plan["first_parts"]
        self.shard_bytes: dict[str, int] = plan["shard_bytes"]
        self._open: tuple[int, pq.ParquetFile] | None = None  # parts are mostly asked for in their order

    @property
    def parts(self) -> int:
        return len(self.sizes)

    def pairs_of(self, part: int) -> tuple[np.ndarray, pa.ChunkedArray]:
        """Image numbers (n,) and captions of a part's pairs."""
        table = self._read(part, ["image", "caption"])
        shard = self._shard_of(part)
        return table["image"].to_numpy() + self.bounds[self.first_parts[shard]], table["caption"]

    def images_of(self, part: int) -> pa.Table:
        """Columns location, shard, offset, size of the images that a part brings in."""
        table = self._read(part, ["location", "shard", "offset", "size"])
        return table.filter(table["location"].is_valid())

    def places_of(self, part: int) -> list[Place]:
        """The images that a part brings in."""
        columns = self.images_of(part).to_pydict()
        return [Place(*place) for place in zip(*columns.values(), strict=True)]

    def _shard_of(self, part: int) -> int:
        return bisect_right(self.first_parts, part) - 1

    def _read(self, part: int, columns: list[str]) -> pa.Table:
        shard = self._shard_of(part)
        path = _index_path(self.folder, shard)
        try:
            if self._open is None or self._open[0] != shard:
                self.close()
                self._open = shard, pq.ParquetFile(path)
            group = part - self.first_parts[shard]
            return self._open[1].read_row_group(group, columns=columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            first = " ".join(str(error).split())[:200]
            raise GramError(
                f"{path}: expected the index of a shard, found {first}; delete {self.folder} and run the same command again"
            ) from None

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


def write_index(
    shards: list[Shard],
    root: Path,
    folder: Path,
    part_size: int,
    job: ProcessGroup = ALONE,
    workers: int = 0,
    progress: bool = False,
) -> Index:
    """Read the shards of a source once and write their index, or continue where an earlier run was interrupted.

    The processes of `job` share the shards, and each of them shares its own among its workers; a source in one piece is
    read by the first process. Memory: one part, and about 200 bytes per distinct image of a shard.

    Raises:
        GramError: of the source; a worker process died.
    """
    if not job.first(lambda: _is_written(folder)):
        missing = job.first(lambda: _without_index(folder, len(shards)))
        _write_shards(shards, job.share(missing), root, folder, part_size, job, workers, progress)
        job.first(lambda: _write_plan(folder, len(shards)))
    return Index(folder)


def _is_written(folder: Path) -> bool:
    """Whether the index is complete; one of an earlier version is removed, with the parts that were made from it."""
    if not (folder / PLAN).exists():
        return False
    if read_json(folder / PLAN).get("format") == PLAN_FORMAT:
        return True
    log.info("%s: begun by an earlier version, which cut parts otherwise: beginning anew", folder)
    shutil.rmtree(folder)
    return False


def _index_path(folder: Path, shard: int) -> Path:
    return folder / "index" / f"{shard:06d}.parquet"


def _without_index(folder: Path, shards: int) -> list[int]:
    """The shards that have no index yet; a folder is listed, as file systems over a network remember what was not there."""
    there = {path.name for path in (folder / "index").glob("*.json")}
    return [shard for shard in range(shards) if f"{shard:06d}.json" not in there]


def _write_shards(
    shards: list[Shard],
    mine: list[int],
    root: Path,
    folder: Path,
    part_size: int,
    job: ProcessGroup,
    workers: int,
    progress: bool,
) -> None:
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    here = _Shards(shards, root, folder, part_size)
    some = len(mine) > 1 and workers > 0
    loader: DataLoader[Any] = DataLoader(
        cast(Any, here), batch_size=None, sampler=mine, num_workers=min(workers, len(mine)) if some else 0
    )
    name = f"shards of run {next(_RUNS)}"
    with tqdm(total=len(shards), unit="shard", disable=not (progress and job.is_first and len(shards) > 1)) as bar:

        def show(more: int = 0) -> None:
            bar.update(job.count(name, more) - bar.n)

        for failure in images_of(loader, "run the same command again, with fewer workers if memory was short"):
            if failure is not None:
                raise failure
            show(1)
        job.wait(show)
        show()


_RUNS = itertools.count()  # every process of a job counts alike


class _Shards:
    """Map-style data set whose items are made by writing a shard's index: None, or what kept it from being written."""

    def __init__(self, shards: list[Shard], root: Path, folder: Path, part_size: int) -> None:
        self.shards, self.root, self.folder, self.part_size = shards, root, folder, part_size

    def __getitem__(self, number: int) -> Exception | None:
        try:
            _write_shard(self.shards[number], number, self.root, self.folder, self.part_size)
        except (GramError, OSError) as error:  # a loader would put its own words for it
            return error
        return None


def _write_shard(shard: Shard, number: int, root: Path, folder: Path, part_size: int) -> None:
    """Write the index of one shard, and the counts beside it that say that it is complete."""
    numbers: dict[bytes, int] = {}  # digest of an image's location -> its number in this shard
    skipped: Counter[str] = Counter()
    files: set[str] = set()
    bounds, sizes, rows = [0], [], 0
    columns: tuple[list[Any], ...] = tuple([] for _ in SCHEMA)
    with atomic_write(_index_path(folder, number)) as file, pq.ParquetWriter(file, SCHEMA) as writer:

        def close_part() -> None:
            writer.write_table(pa.table(list(columns), schema=SCHEMA), row_group_size=len(columns[0]))
            bounds.append(len(numbers))
            sizes.append(len(columns[0]))
            for column in columns:
                column.clear()

        for row in shard.rows():
            rows += 1
            if row.skip:
                skipped[row.skip] += 1
                continue
            digest = hashlib.blake2b(row.location.encode("utf-8", "surrogateescape"), digest_size=16).digest()
            place = row.place if digest not in numbers else (None, None, None, None)
            image = numbers.setdefault(digest, len(numbers))
            for column, value in zip(columns, (image, row.caption, *place), strict=True):
                column.append(value)
            files.add(row.shard)
            if len(columns[0]) == part_size:
                close_part()
        if columns[0]:
            close_part()
    counts = {
        "rows": rows,
        "images": len(numbers),
        "skipped": skipped,
        "bounds": bounds,
        "sizes": sizes,
        "shard_bytes": {name: check_shard(root / name, None) for name in sorted(files - {""})},
    }
    with atomic_write(_index_path(folder, number).with_suffix(".json"), "w") as file:
        json.dump(counts, file)


def _write_plan(folder: Path, shards: int) -> None:
    """Put the counts of all shards together."""
    skipped: Counter[str] = Counter()
    plan: dict[str, Any] = {
        "format": PLAN_FORMAT,
        "rows": 0,
        "bounds": [0],
        "sizes": [],
        "first_parts": [0],
        "shard_bytes": {},
    }
    for counts in _counts(folder, shards):
        images = plan["bounds"][-1]
        plan["rows"] += counts["rows"]
        plan["bounds"] += [images + bound for bound in counts["bounds"][1:]]
        plan["sizes"] += counts["sizes"]
        plan["first_parts"].append(len(plan["sizes"]))
        plan["shard_bytes"].update(counts["shard_bytes"])
        skipped.update(counts["skipped"])
    plan |= {"pairs": sum(plan["sizes"]), "images": plan["bounds"][-1], "skipped": dict(sorted(skipped.items()))}
    write_json(folder / PLAN, plan)


def _counts(folder: Path, shards: int) -> Iterator[dict[str, Any]]:
    for shard in range(shards):
        yield read_json(_index_path(folder, shard).with_suffix(".json"))
