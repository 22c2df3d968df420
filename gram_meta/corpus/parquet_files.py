"""Opening Parquet files, and the columns in them that hold images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gram_meta.errors import GramError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


def open_parquet(path: Path) -> pq.ParquetFile:
    """A Parquet file, its footer read; `GramError` for another kind of file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        found = " ".join(str(error).split())[:200]
        raise GramError(f"{path}: expected a Parquet file, found {found}") from None


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_struct(kind: pa.DataType) -> bool:
    """Whether a type is a struct with the bytes of an image in it."""
    import pyarrow as pa

    if not pa.types.is_struct(kind):
        return False
    at = kind.get_field_index("bytes")
    return at >= 0 and _is_binary(kind.field(at).type)


def holds_images(schema: pa.Schema, image: int) -> bool:
    """Whether a column holds images, as bytes or in a struct."""
    kind = schema.field(image).type
    return is_struct(kind) or _is_binary(kind)


def leaf_of(schema: pa.Schema, image: int) -> str:
    """The name that Parquet gives the column of bytes."""
    name = schema.names[image]
    return f"{name}.bytes" if is_struct(schema.field(image).type) else name
