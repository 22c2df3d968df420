"""Shards that a process has open, to read single images from; their number is bounded.

The caches belong to the process, so an `ImageReader` stays small and can be sent to worker processes. A forked process
starts with empty caches; tars are read with `os.pread`, which uses no file position that threads or processes could
share.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from gram_meta.errors import GramError, in_one_line
from gram_meta.images import BROKEN, BadImage

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

T = TypeVar("T")

PARQUET_SUFFIXES = (".parquet", ".pq")
MAX_OPEN = 64  # files; the usual limit of a process is 1,024
MAX_GROUPS = 256 << 20  # bytes of images, in row groups of Parquet files


class Cache(Generic[T]):
    """A thread-safe cache of the most recently used objects, with a total weight of at most `most` (but at least one).

    An object that is dropped is not closed: a thread that still reads from it keeps it alive.
    """

    def __init__(self, most: int, weight: Callable[[T], int] = lambda made: 1) -> None:
        self.most, self.weight = most, weight
        self.lock = threading.Lock()
        self.held: OrderedDict[object, T] = OrderedDict()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._clear)

    def get(self, key: object, make: Callable[[], T]) -> T:
        """Return the object of a key; `make` creates it if the cache does not have it."""
        with self.lock:
            if key in self.held:
                self.held.move_to_end(key)
                return self.held[key]
        made = make()
        with self.lock:
            made = self.held.setdefault(key, made)
            while len(self.held) > 1 and sum(map(self.weight, self.held.values())) > self.most:
                self.held.popitem(last=False)
        return made

    def _clear(self) -> None:  # another thread may have held the lock when the process was forked
        self.lock = threading.Lock()
        self.held = OrderedDict()


class TarFile:
    """An open tar shard."""

    def __init__(self, path: Path, size: int | None) -> None:
        self.path = path
        self.size = check_shard(path, size)
        self.file = open(path, "rb", buffering=0)

    def read(self, offset: int, size: int) -> bytes:
        """Return the `size` bytes from `offset`; raise `BadImage` if the disk fails, `GramError` for fewer."""
        try:
            content = pread(self.file.fileno(), size, offset)
        except OSError:
            raise BadImage(BROKEN) from None
        if len(content) < size:
            raise GramError(changed(self.path, f"at least {offset + size} bytes", f"{self.size}"))
        return content


def pread(descriptor: int, size: int, offset: int) -> bytes:
    """Return `size` bytes from `offset`, fewer only at the file's end: on some file systems one read returns less."""
    content = os.pread(descriptor, size, offset)
    while len(content) < size and (more := os.pread(descriptor, size - len(content), offset + len(content))):
        content += more
    return content


def check_shard(path: Path, size: int | None) -> int:
    """Return the size of a shard; raise `GramError` if there is none, or if its size is not `size` (None: any)."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise GramError(f"{path}: expected the shard that was embedded, found {error.strerror}") from None
    if size is not None and found != size:
        raise GramError(changed(path, f"{size} bytes", f"{found}"))
    return found


def changed(path: Path, expected: str, found: str) -> str:
    """Return the message about a shard that has changed."""
    return f"{path}: expected the shard that was embedded, of {expected}, found {found}: it has changed since"


class ParquetImages:
    """An open Parquet shard with images inside, which are read one row group at a time."""

    def __init__(self, path: Path, size: int | None) -> None:
        self.path = path
        self.size = check_shard(path, size)
        self.lock = threading.Lock()  # pyarrow's reader serves one thread at a time
        self.file = open_parquet(path)
        groups = [self.file.metadata.row_group(group).num_rows for group in range(self.file.num_row_groups)]
        self.first = [0, *accumulate(groups)]  # row group -> its first row

    def read(self, row: int, column: int) -> bytes | None:
        """Return the bytes in a row of the image column with this number, None for a null.

        Raises `BadImage` for a damaged row group, `GramError` for no such row, or no images in this column.
        """
        import pyarrow as pa

        schema = self.file.schema_arrow
        if not (0 <= row < self.first[-1] and column < len(schema.names) and holds_images(schema, column)):
            name = repr(schema.names[column]) if column < len(schema.names) else f"number {column}"
            found = f"{self.first[-1]} rows of {schema.names}"
            raise GramError(changed(self.path, f"an image in row {row} of column {name}", found))
        group = bisect_right(self.first, row) - 1
        try:
            images = GROUPS.get((self.path, self.size, column, group), lambda: self._group(group, column))
        except (pa.ArrowException, OSError):
            raise BadImage(BROKEN) from None
        return images[row - self.first[group]].as_py()

    def _group(self, group: int, column: int) -> pa.ChunkedArray:
        schema = self.file.schema_arrow
        with self.lock:
            table = self.file.read_row_group(group, columns=[leaf_of(schema, column)], use_threads=False)
        images = table.column(0)
        return images if schema.names[column] == leaf_of(schema, column) else images.flatten()[0]


TARS: Cache[TarFile] = Cache(MAX_OPEN)
PARQUETS: Cache[ParquetImages] = Cache(MAX_OPEN)
GROUPS: Cache[pa.ChunkedArray] = Cache(MAX_GROUPS, lambda images: images.nbytes)


# --- Parquet files ------------------------------------------------------------------------------------------


def is_parquet(path: Path) -> bool:
    """Return whether a file has the name of a Parquet file."""
    return path.suffix.lower() in PARQUET_SUFFIXES and not path.name.startswith(".")


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file and read its footer; raise `GramError` for another kind of file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise GramError(f"{path}: expected a Parquet file, found {in_one_line(error)}") from None


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_struct(kind: pa.DataType) -> bool:
    """Return whether a type is a struct that contains the bytes of an image."""
    import pyarrow as pa

    if not pa.types.is_struct(kind):
        return False
    at = kind.get_field_index("bytes")
    return at >= 0 and _is_binary(kind.field(at).type)


def holds_images(schema: pa.Schema, image: int) -> bool:
    """Return whether a column holds images, as bytes or as structs."""
    kind = schema.field(image).type
    return is_struct(kind) or _is_binary(kind)


def leaf_of(schema: pa.Schema, image: int) -> str:
    """Return the name that Parquet gives the column of bytes."""
    name = schema.names[image]
    return f"{name}.bytes" if is_struct(schema.field(image).type) else name
