"""The work of an embedding run, written down before it begins.

Every shard of the source is read once, by one process: unusable rows are counted, images are numbered in the order of
their first appearance, and the remaining pairs are cut into parts. A part is one row group of its shard's index, so a
continued run finds the same parts, and any process can work on any part. Image ids are local to a shard; a shard's
global offset is the sum of the earlier counts, so no process needs all names in memory.
"""

import hashlib
import json
import logging
import shutil
from bisect import bisect_right
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gram_meta.corpus.loading import run_ahead
from gram_meta.corpus.open_shards import check_shard
from gram_meta.corpus.sources.rows import Place, Shard
from gram_meta.errors import GramError, in_one_line
from gram_meta.files import Count, atomic_write, read_json, write_json
from gram_meta.processes import ALONE, ProcessGroup
from gram_meta.progress import SharedBar

log = logging.getLogger(__name__)

PLAN = "plan.json"
PLAN_FORMAT = 2
# `location` and the columns after it are set in the row in which an image first appears, and null in the others.
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


class _Counts(TypedDict):
    """The type of a shard's counts."""

    rows: Count
    images: Count
    skipped: dict[str, Count]
    bounds: list[Count]
    sizes: list[Count]
    shard_bytes: dict[str, Count]


class _Plan(_Counts):
    """The type of plan.json."""

    pairs: Count
    first_parts: list[Count]


class Index:
    """The usable pairs in the order of their source, in parts.

    Attributes:
        rows: rows of the source. pairs, images: usable pairs, distinct images among them.
        skipped: rows left out, by reason.
        bounds: (parts + 1,) the images from bounds[k] up to bounds[k + 1] first appear in part k.
        sizes: (parts,) pairs of each.
        first_parts: (shards of the source + 1,) shard s has the parts from first_parts[s] up to first_parts[s + 1].
        shard_bytes: the size of every tar or Parquet file that contains images; {} if each image is its own file.

    Raises:
        GramError: the plan is damaged.
    """

    def __init__(self, folder: Path) -> None:
        plan = read_json(folder / PLAN, _Plan)
        self.folder = folder
        self.rows: int = plan["rows"]
        self.pairs: int = plan["pairs"]
        self.images: int = plan["images"]
        self.skipped: dict[str, int] = plan["skipped"]
        self.bounds: list[int] = plan["bounds"]
        self.sizes: list[int] = plan["sizes"]
        self.first_parts: list[int] = plan["first_parts"]
        self.shard_bytes: dict[str, int] = plan["shard_bytes"]
        self._open: tuple[int, pq.ParquetFile] | None = None  # parts are mostly read in their order
        ends = len(self.bounds) - 1, self.first_parts[-1:], self.bounds[-1:]
        sums = sum(self.sizes), sum(self.skipped.values())
        if (*ends, *sums) != (self.parts, [self.parts], [self.images], self.pairs, self.rows - self.pairs):
            raise GramError(
                f"{folder / PLAN}: expected counts that agree, found others; delete {folder}, and start again"
            )

    @property
    def parts(self) -> int:
        return len(self.sizes)

    def summary(self) -> str:
        """Return the counts in words."""
        skipped = "".join(f", {reason}: {count}" for reason, count in self.skipped.items())
        return f"{self.rows} rows: {self.pairs} pairs of {self.images} images{skipped}"

    def read(self, part: int, *columns: str) -> pa.Table:
        """Return columns of `SCHEMA` for the pairs of a part; `image` is the global image id.

        Raises `GramError` if the shard's index is missing or damaged.
        """
        shard = bisect_right(self.first_parts, part) - 1
        path = _index_path(self.folder, shard)
        try:
            if self._open is None or self._open[0] != shard:
                self.close()
                self._open = shard, pq.ParquetFile(path)
            row_group = part - self.first_parts[shard]
            table = self._open[1].read_row_group(row_group, columns=list(columns), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            found = f"{in_one_line(error)}; delete {self.folder} and start again"
            raise GramError(f"{path}: expected the index of a shard, found {found}") from None
        if "image" in columns:
            offset = self.bounds[self.first_parts[shard]]
            table = table.set_column(columns.index("image"), "image", pc.add(table["image"], offset))
        return table

    def images_of(self, part: int) -> pa.Table:
        """Return columns location, shard, offset, size of the images that first appear in a part."""
        table = self.read(part, "location", "shard", "offset", "size")
        return table.filter(table["location"].is_valid())

    def places_of(self, part: int) -> list[Place]:
        """Return the places of the images that first appear in a part."""
        columns = self.images_of(part).to_pydict()
        return [Place(*place) for place in zip(*columns.values(), strict=True)]

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


def write_index(
    shards: list[Shard],
    root: Path,
    folder: Path,
    part_size: int,
    group: ProcessGroup = ALONE,
    workers: int = 0,
    progress: bool = False,
) -> Index:
    """Read the shards of a source once and write their index, or continue where an earlier run was interrupted.

    `plan.json` marks the index as complete. The processes of `group` share the shards, and each process shares its own
    among its workers; a source with a single shard is read by rank 0. Memory: one part, and about 200 bytes per
    distinct image of a shard.

    Args:
        root: the folder that the images' places are relative to. folder: where the index is written.

    Raises:
        GramError: the source cannot be read; a worker process died.
    """
    if not group.first(lambda: _is_written(folder)):
        mine = group.share(group.first(lambda: _without_index(folder, len(shards))))
        workers = min(workers, len(mine)) if len(mine) > 1 else 0
        write = partial(_write_shard, shards, root, folder, part_size)
        advice = "run the same command again, with fewer workers if memory was short"
        with SharedBar(group, len(shards), "shard", progress and len(shards) > 1) as bar:
            for _ in run_ahead(write, mine, workers, advice):
                bar.add(1)
            group.wait(bar.show)
        group.first(lambda: _write_plan(folder, len(shards)))
    return Index(folder)


def _is_written(folder: Path) -> bool:
    """Return whether the index is complete; one of an earlier version is removed, together with its parts."""
    if not (folder / PLAN).exists():
        return False
    if read_json(folder / PLAN, dict[str, Any]).get("format") == PLAN_FORMAT:
        return True
    log.info("%s: was begun by an earlier version, which cut parts differently: starting again", folder)
    shutil.rmtree(folder)
    return False


def _index_path(folder: Path, shard: int) -> Path:
    return folder / "index" / f"{shard:06d}.parquet"


def _without_index(folder: Path, shards: int) -> list[int]:
    """Return the shards without an index; the folder is listed, as network file systems cache missing names."""
    existing = {path.name for path in (folder / "index").glob("*.json")}
    return [shard for shard in range(shards) if f"{shard:06d}.json" not in existing]


def _write_shard(shards: list[Shard], root: Path, folder: Path, part_size: int, number: int) -> None:
    """Write the index of shard `number`, then its counts, which mark it as complete."""
    ids: dict[bytes, int] = {}  # digest of an image's location -> its id in this shard
    skipped: Counter[str] = Counter()
    files: set[str] = set()
    bounds, sizes = [0], []
    columns: tuple[list[Any], ...] = tuple([] for _ in SCHEMA)
    with atomic_write(_index_path(folder, number)) as file, pq.ParquetWriter(file, SCHEMA) as writer:
        for row in chain(shards[number].rows(), [None]):  # None: the end
            if row is not None and row.skip:
                skipped[row.skip] += 1
            elif row is not None:
                digest = hashlib.blake2b(row.location.encode("utf-8", "surrogateescape"), digest_size=16).digest()
                place = row.place if digest not in ids else (None, None, None, None)
                image = ids.setdefault(digest, len(ids))
                for column, value in zip(columns, (image, row.caption, *place), strict=True):
                    column.append(value)
                files.add(row.shard)
            if columns[0] and (row is None or len(columns[0]) == part_size):
                writer.write_table(pa.table(list(columns), schema=SCHEMA), row_group_size=len(columns[0]))
                bounds.append(len(ids))
                sizes.append(len(columns[0]))
                for column in columns:
                    column.clear()
    counts = {
        "rows": skipped.total() + sum(sizes),
        "images": len(ids),
        "skipped": skipped,
        "bounds": bounds,
        "sizes": sizes,
        "shard_bytes": {name: check_shard(root / name, None) for name in sorted(files - {""})},
    }
    with atomic_write(_index_path(folder, number).with_suffix(".json"), "w") as file:
        json.dump(counts, file)


def _write_plan(folder: Path, shards: int) -> None:
    """Add up the counts of all shards."""
    skipped: Counter[str] = Counter()
    plan: dict[str, Any] = {"format": PLAN_FORMAT, "rows": 0, "bounds": [0], "sizes": [], "first_parts": [0]}
    plan["shard_bytes"] = {}
    for shard in range(shards):
        counts = read_json(_index_path(folder, shard).with_suffix(".json"), _Counts)
        images = plan["bounds"][-1]
        plan["rows"] += counts["rows"]
        plan["bounds"] += [images + bound for bound in counts["bounds"][1:]]
        plan["sizes"] += counts["sizes"]
        plan["first_parts"].append(len(plan["sizes"]))
        plan["shard_bytes"].update(counts["shard_bytes"])
        skipped.update(counts["skipped"])
    plan |= {"pairs": sum(plan["sizes"]), "images": plan["bounds"][-1], "skipped": dict(sorted(skipped.items()))}
    write_json(folder / PLAN, plan)
