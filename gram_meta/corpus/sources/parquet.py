"""Parquet files of pairs: with paths of images, or with images inside, as Hugging Face's `datasets` writes them.

Images inside are a column of bytes, or of structs of `bytes` and `path`, each of which may be null. If the file's own
statistics report no null, rows are read without the bytes.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gram_meta.corpus.open_shards import holds_images, is_parquet, is_struct, leaf_of, open_parquet
from gram_meta.corpus.sources.format import Options, Peek, choose_split, common_folder, is_chosen, named_shards
from gram_meta.corpus.sources.rows import BAD_UTF8, NO_IMAGE, UNREADABLE, Row, Shard, Source, checked, relative_name
from gram_meta.corpus.sources.tables import CAPTION_COLUMNS, IMAGE_COLUMNS, find_column
from gram_meta.errors import GramError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

log = logging.getLogger(__name__)

INSIDE_COLUMNS = ("jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes")  # besides the usual names
NUMBERED = re.compile(r"captions?_?\d+")  # caption_0 ... caption_4
TEXT_OF = ("raw", "caption", "text")  # where the text stands in a list of structs: COCO's and Flickr's sentences
PART = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?\.parquet")  # SPLIT-00000-of-00005.parquet
LARGE_GROUP = 16 << 20  # bytes of images in a row group
ROWS_AT_ONCE = 4096
IMAGES_AT_ONCE = 32  # rows, where bytes have to be looked at


class Parquet:
    """Parquet files with paths of images, or with the images inside."""

    name = "parquet"
    title = "Parquet files"
    options = frozenset({"image_column", "caption_column", "image_root", "split"})

    def claims(self, path: Path, peek: Peek) -> bool:
        if not peek.files or not all(map(is_parquet, peek.files)):
            return False
        # Beside folders of images, img2dataset writes Parquet files of metadata.
        return not path.is_dir() or any(_has_images(file, peek.options.image_column) for file in peek.files)

    def open(self, path: Path, options: Options) -> Source:
        files = named_shards(path, is_parquet, self.title)
        split = choose_split(path, Counter(map(_split_of, files)), options.split)
        files = [file for file in files if is_chosen(_split_of(file), split)]
        root = common_folder(files, options.image_root)
        columns = options.image_column, options.caption_column
        footers = [_footer(file, options.image_column) for file in files]
        if footers[0].largest > LARGE_GROUP:
            log.warning(
                "%s: row groups of up to %d MB; to read one image at random, a whole row group is read (meta-training "
                "with visual prompts is faster from smaller row groups, or from tars)",
                files[0],
                footers[0].largest >> 20,
            )
        if len(files) == 1 and path.is_file() and not footers[0].inside:
            return Source(files[0], self.name, root, *columns)  # a table of paths
        return Source(Path(os.path.abspath(path)), self.name, root, *columns, files=tuple(files), split=split)

    def shards(self, source: Source) -> list[Shard]:
        """Return a shard for each file if all images are inside; else a single one, as paths could repeat an image."""
        files = source.files or (source.path,)
        names = [relative_name(source.image_root, file) for file in files]
        if not all(_footer(file, source.image_column).all_inside for file in files):
            return [Shard("", partial(_file_rows, source, *names))]
        return [Shard(name, partial(_file_rows, source, name)) for name in names]


class Footer(NamedTuple):
    """What a footer says: whether images are inside, all of them, and the most bytes of images in a row group."""

    inside: bool
    all_inside: bool
    largest: int


class Columns(NamedTuple):
    """The numbers of a file's columns of images and captions."""

    image: int
    inside: bool  # whether the image column holds images; else it holds paths
    captions: list[int]  # each value is one caption, or a list of them


def _has_images(path: Path, image_column: str | None) -> bool:
    """Return whether images are inside; False for another kind of file, which is reported when it is read."""
    try:
        return _footer(path, image_column).inside
    except GramError:
        return False


def _footer(path: Path, image_column: str | None) -> Footer:
    """Read the footer of a file; raise `GramError` for another kind of file, or no column of images or paths."""
    with open_parquet(path) as file:
        schema = file.schema_arrow
        image = find_image(path, schema, image_column)
        if not holds_images(schema, image):
            return Footer(False, False, 0)
        chunks = [_chunk(file, group, leaf_of(schema, image)) for group in range(file.num_row_groups)]
        # A null in a column of bytes is no image at all; beside a struct of nulls, `path` may name a file.
        all_inside = not is_struct(schema.field(image).type) or not any(map(_may_have_nulls, chunks))
        return Footer(True, all_inside, max((chunk.total_uncompressed_size for chunk in chunks if chunk), default=0))


def _split_of(path: Path) -> str:
    """Return the split of a Hugging Face data set that a file belongs to: "train" for train-00000-of-00005.parquet."""
    found = PART.fullmatch(path.name)
    return found[1] if found else ""


# --- columns ------------------------------------------------------------------------------------------------


def find_image(path: Path, schema: pa.Schema, given: str | None) -> int:
    """Return the column of images or paths: the given one, one with a usual name, or the only struct of bytes."""
    usual = [*IMAGE_COLUMNS, *INSIDE_COLUMNS]
    names = [name.lower() for name in schema.names]
    if not given and not any(name in names for name in usual):
        structs = [number for number in range(len(names)) if is_struct(schema.field(number).type)]
        if len(structs) == 1:
            return structs[0]
    image = find_column(path, schema.names, given, usual, "image")
    kind = schema.field(image).type
    if not (_is_text(kind) or holds_images(schema, image)):
        raise GramError(f"{path}: expected images, or their paths, in column {schema.names[image]!r}, found {kind}")
    return image


def _captions(path: Path, schema: pa.Schema, given: str | None) -> list[int]:
    numbered = [number for number, name in enumerate(schema.names) if NUMBERED.fullmatch(name.lower())]
    usual = any(name.lower() in CAPTION_COLUMNS for name in schema.names)
    if numbered and not usual and not given:
        return numbered
    return [find_column(path, schema.names, given, CAPTION_COLUMNS, "caption")]


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _may_have_nulls(chunk: Any) -> bool:
    counts = chunk and chunk.statistics
    return not counts or not counts.has_null_count or counts.null_count > 0


def _chunk(file: pq.ParquetFile, group: int, leaf: str) -> Any:
    """Return the metadata of a column in a row group, or None."""
    row_group = file.metadata.row_group(group)
    columns = map(row_group.column, range(row_group.num_columns))
    return next((column for column in columns if column.path_in_schema == leaf), None)


# --- rows ---------------------------------------------------------------------------------------------------


def _file_rows(source: Source, *names: str) -> Iterator[Row]:
    """Yield the rows of files; of a damaged row group all rows are unreadable."""
    import pyarrow as pa

    for name in names:
        path = source.image_root / name
        with open_parquet(path) as file:
            schema = file.schema_arrow
            image = find_image(path, schema, source.image_column)
            columns = Columns(image, holds_images(schema, image), _captions(path, schema, source.caption_column))
            first = 0
            for group in range(file.num_row_groups):
                rows, read = file.metadata.row_group(group).num_rows, 0
                try:
                    for locations, captions in _batches(file, group, columns):
                        for location, of_image in zip(locations, captions, strict=True):
                            yield from _row(name, columns, first + read, location, of_image)
                            read += 1
                except (pa.ArrowException, OSError):  # damaged pages
                    yield from [Row("", "", UNREADABLE)] * (rows - read)
                first += rows


def _batches(file: pq.ParquetFile, group: int, columns: Columns) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield locations (True: the image is inside) and captions of a row group, some rows at a time."""
    schema = file.schema_arrow
    captions = [schema.names[number] for number in columns.captions]
    name, leaf = schema.names[columns.image], leaf_of(schema, columns.image)
    if not columns.inside:
        wanted, at_once = [name], ROWS_AT_ONCE
    elif _may_have_nulls(_chunk(file, group, leaf)):
        wanted, at_once = [name], IMAGES_AT_ONCE
    else:
        wanted, at_once = [], ROWS_AT_ONCE
    for batch in file.iter_batches(at_once, [group], [*wanted, *captions], use_threads=False):
        texts = [_values(batch.column(caption)) for caption in captions]
        of_images = texts[0] if len(texts) == 1 else [list(some) for some in zip(*texts, strict=True)]
        if wanted:
            yield (_inside_or_path if columns.inside else _values)(batch.column(name)), of_images
        else:
            yield [True] * batch.num_rows, of_images


def _inside_or_path(column: pa.Array) -> list[Any]:
    """Return for each row True if it has the bytes, else its path, else None."""
    import pyarrow as pa

    if not pa.types.is_struct(column.type):
        return [True if is_valid else None for is_valid in column.is_valid().to_pylist()]
    fields = dict(zip(column.type.names, column.flatten(), strict=True))  # a null struct has null fields
    paths = _values(fields["path"]) if "path" in fields else [None] * len(column)
    have_bytes = fields["bytes"].is_valid().to_pylist()
    return [True if inside else path for inside, path in zip(have_bytes, paths, strict=True)]


def _row(name: str, columns: Columns, number: int, location: Any, captions: Any) -> Iterator[Row]:
    """Yield a row of the file: one pair, or one for each caption of a list."""
    for caption in captions if isinstance(captions, list) and captions else [captions]:
        if isinstance(caption, dict):
            caption = next((caption[key] for key in TEXT_OF if key in caption), None)
        if location is None:
            yield Row("", "", NO_IMAGE)
        elif isinstance(location, bytes) or isinstance(caption, bytes):
            yield Row("", "", BAD_UTF8)
        elif location is True:
            row = checked(f"{name}/{number}", _text(caption))
            yield row._replace(shard=name, offset=number, size=columns.image)
        else:
            yield checked(location, _text(caption))


def _text(caption: Any) -> str | None:
    return None if caption is None or caption == [] else str(caption)


def _values(column: Any) -> list[Any]:
    """Return the Python values of an Arrow column; a string that is not UTF-8 becomes b""."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [b""] if len(column) == 1 else [_values(column[row : row + 1])[0] for row in range(len(column))]
