"""Opening Parquet files, and the columns in them that hold images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gram_meta.errors import GramError, in_one_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

PARQUET_SUFFIXES = (".parquet", ".pq")


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
