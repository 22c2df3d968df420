"""Where image-text pairs come from: shards, folders and files of many formats, and which of them a path holds.

Every reader yields `Row`s in a fixed order and never fails on a bad row: the row comes out with the reason
why it cannot be used, so that the caller can count it.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gram_meta.corpus.patterns import expand, is_pattern
from gram_meta.corpus.rows import (
    BAD_UTF8,
    COLUMN_COUNT,
    EMPTY_CAPTION,
    IMAGE_SUFFIXES,
    NO_CAPTION_FILE,
    UNREADABLE,
    Row,
    Shard,
    checked,
)
from gram_meta.corpus.tars import refuse_compressed, shard_rows
from gram_meta.errors import GramError
from gram_meta.files import PathLike, sha256_file

IMAGE_COLUMNS = ("image", "image_path", "path", "filename", "file_name", "filepath", "file")
CAPTION_COLUMNS = ("caption", "captions", "text", "title")
KINDS = {
    ".tsv": "tsv",
    ".tab": "tsv",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".tar": "webdataset",
}
FORMATS = ("auto", "classes", "webdataset")


@dataclass(frozen=True)
class Source:
    """A source of pairs.

    Attributes:
        path: the folder, file or pattern.
        kind: `webdataset` (tar shards), `folder`, `classes` (a folder of class folders), `tsv`, `csv` or `parquet`.
        image_root: folder that relative image paths, and the names of shards, start from.
        image_column, caption_column: as given (None: found by their usual names).
        classnames: of class folders, the list of their names. class_depth: how many levels below `path` they lie.
        files: the shards, in their order, of a source that has shards.
    """

    path: Path
    kind: str
    image_root: Path
    image_column: str | None = None
    caption_column: str | None = None
    classnames: Path | None = None
    class_depth: int = 1
    files: tuple[Path, ...] = ()

    def rows(self) -> Iterator[Row]:
        """All rows, always in the same order."""
        if self.kind == "webdataset":
            return (row for shard in self.shards() for row in shard.rows())
        if self.kind == "folder":
            return _folder_rows(self.path)
        if self.kind == "classes":
            from gram_meta.corpus.classes import class_rows

            return class_rows(self)
        if self.kind == "parquet":
            return _parquet_rows(self)
        return _table_rows(self)

    def shards(self) -> list[Shard]:
        """The parts that can be read by themselves, in their order; `rows` is their rows, one after the other."""
        if self.kind == "webdataset":
            names = [self._name(file) for file in self.files]
            return [Shard(name, partial(shard_rows, self.image_root, name, self.caption_column)) for name in names]
        return [Shard("", self.rows)]

    def identity(self) -> dict[str, Any]:
        """What has to stay the same when an interrupted run goes on.

        Of one file, its SHA-256; of shards, which may be hundreds of gigabytes, their names and sizes.
        """
        content = None if self.files or self.path.is_dir() else sha256_file(self.path)
        identity: dict[str, Any] = {
            "path": str(self.path),
            "kind": self.kind,
            "sha256": content,
            "image_root": str(self.image_root),
            "image_column": self.image_column,
            "caption_column": self.caption_column,
        }
        if self.kind == "classes":
            names = self.classnames
            identity["class_depth"] = self.class_depth
            identity["classnames"] = {"path": str(names), "sha256": sha256_file(names)} if names else None
        if self.files:
            identity["shard_count"] = len(self.files)
            identity["shards"] = {self._name(file): _size(file) for file in self.files}
        return identity

    def _name(self, file: Path) -> str:
        return file.relative_to(self.image_root).as_posix()


def _size(shard: Path) -> int:
    try:
        return shard.stat().st_size
    except OSError:
        raise GramError(f"{shard}: expected a shard, found nothing there any more") from None


def open_source(
    path: PathLike,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_root: PathLike | None = None,
    format: str = "auto",
    classnames: PathLike | None = None,
) -> Source:
    """Look at `path` and say what kind of source it is.

    Args:
        path: a folder of WebDataset shards (`.tar`) or one of them; a folder (images with a same-named `.txt` beside
            them, one caption a line), or a `.tsv`, `.csv` or `.parquet` file with an image column and a caption column.
            Several shards can also be named by a pattern: `{00000..00331}.tar`, `*.tar`.
        image_column, caption_column: their names in the file's header; for TSV and CSV also their numbers,
            counted from 1, in a file without a header. None: the usual names (`IMAGE_COLUMNS`,
            `CAPTION_COLUMNS`). In tar shards, `caption_column` is as in `tars.shard_rows`.
        image_root: folder that relative image paths start from; None: the folder of the file.
        format: `classes` reads `path` as a folder of class folders, a labelled collection (`classes.open_classes`);
            `auto` does not.
        classnames: of class folders, the file that names them.

    Raises:
        GramError: nothing there, or another kind of file.
    """
    path = Path(path).expanduser()
    if format not in FORMATS:
        raise GramError(f"format: expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, found {format!r}")
    if format == "classes":
        if image_column or caption_column or image_root:
            raise GramError(
                f"{path}: image and caption columns and an image root do not belong to class folders"
            )
        from gram_meta.corpus.classes import open_classes

        return open_classes(path, Path(classnames).expanduser() if classnames else None)
    if classnames:
        raise GramError(
            f"{classnames}: a list of class names belongs to a folder of class folders (--format classes)"
        )
    shards = _tar_shards(path)
    if shards or format == "webdataset":
        if image_column or image_root:
            raise GramError(f"{path}: an image column and an image root do not belong to tar shards")
        return _webdataset(path, shards, caption_column)
    if path.is_dir():
        if image_column or caption_column or image_root:
            raise GramError(
                f"{path}: image and caption columns and an image root belong to a file, found a folder"
            )
        return Source(path.resolve(), "folder", path.resolve())
    if not path.is_file():
        raise GramError(f"{path}: expected a folder or a .tsv, .csv or .parquet file, found nothing there")
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise GramError(
            f"{path}: expected a folder or a .tsv, .csv or .parquet file, found {path.suffix or 'no suffix'}"
        )
    root = Path(image_root).expanduser() if image_root else path.parent
    if not root.is_dir():
        raise GramError(f"{root}: expected the folder that image paths start from, found no folder")
    return Source(path.resolve(), kind, root.resolve(), image_column, caption_column)


def _tar_shards(path: Path) -> list[Path]:
    """The tar files that `path` is, holds, or stands for."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if _is_tar(file))
    if is_pattern(path):
        return [file for file in expand(path) if _is_tar(file)]
    return [path] if path.is_file() and _is_tar(path) else []


def _is_tar(path: Path) -> bool:
    name = path.name.lower()
    return not name.startswith(".") and (name.endswith((".tar", ".tgz")) or ".tar." in name)


def _webdataset(path: Path, shards: list[Path], caption_column: str | None) -> Source:
    if not shards:
        raise GramError(f"{path}: expected WebDataset shards (.tar files), found none")
    files = tuple(Path(os.path.abspath(shard)) for shard in shards)
    with open(files[0], "rb") as file:
        refuse_compressed(files[0], file.read(6))
    root = Path(os.path.commonpath([file.parent for file in files]))
    return Source(
        Path(os.path.abspath(path)), "webdataset", root, caption_column=caption_column, files=files
    )


# --- folder -------------------------------------------------------------------------------------------------


def _folder_rows(root: Path) -> Iterator[Row]:
    found = False
    for image in _images_below(root):
        location = image.relative_to(root).as_posix()
        try:
            content = image.with_suffix(".txt").read_bytes()
        except OSError:
            yield Row(location, "", NO_CAPTION_FILE)
            continue
        found = True
        lines = [line for line in content.splitlines() if line.strip()]
        if not lines:
            yield Row(location, "", EMPTY_CAPTION)
        for line in lines:
            try:
                yield checked(location, line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield Row(location, "", BAD_UTF8)
    if not found:
        raise GramError(
            f"{root}: expected images with a same-named .txt beside them, found none{_tables_in(root)}"
        )


def _images_below(folder: Path) -> Iterator[Path]:
    """Image files in the order of their names, folder by folder; links to folders are not followed."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from _images_below(Path(entry.path))
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and not entry.name.startswith("."):
                yield Path(entry.path)


def _tables_in(root: Path) -> str:
    tables = sorted(path.name for path in root.iterdir() if path.suffix.lower() in KINDS)
    if tables:
        return f"; it holds {', '.join(tables[:3])}: name that file instead"
    return "; for a folder of class folders, give --format classes"


# --- TSV and CSV --------------------------------------------------------------------------------------------


def _table_rows(source: Source) -> Iterator[Row]:
    # surrogateescape lets a line with broken UTF-8 through, to be seen and counted alone.
    with open(source.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        records = _tsv_records(file) if source.kind == "tsv" else _csv_records(file)
        columns = _numbered(source)
        if columns is None:
            header = next(records, None)
            if not header:
                raise GramError(
                    f"{source.path}: expected a header line, found {'none' if header is None else 'no text'}"
                )
            columns = _named(source, header)
            width = len(header)
        else:
            width = None  # no header: the first readable row says how many columns there are
        for record in records:
            if record is None:
                yield Row("", "", UNREADABLE)
                continue
            if not any(record):
                continue  # a blank line is no row
            width = width or len(record)
            if len(record) != width or max(columns) >= width:
                yield Row("", "", COLUMN_COUNT)
                continue
            yield checked(record[columns[0]], record[columns[1]])


def _tsv_records(file: Any) -> Iterator[list[str] | None]:
    """Tab-separated without quoting, as web-caption files are: a caption may begin with a quotation mark."""
    for line in file:
        yield line.rstrip("\r\n").split("\t")


def _csv_records(file: Any) -> Iterator[list[str] | None]:
    """Comma-separated with quoting; None for a record that breaks the rules of quoting."""
    records = csv.reader(file, strict=True)
    while True:
        try:
            yield next(records)
        except StopIteration:
            return
        except csv.Error:
            yield None


def _numbered(source: Source) -> tuple[int, int] | None:
    """Column indices when both columns were given as numbers from 1: then the file has no header."""
    given = (source.image_column, source.caption_column)
    if all(name is not None and name.isdecimal() and int(name) > 0 for name in given):
        return int(given[0]) - 1, int(given[1]) - 1  # type: ignore[arg-type]
    return None


def _named(source: Source, header: Sequence[str]) -> tuple[int, int]:
    image = _find(source.path, header, source.image_column, IMAGE_COLUMNS, "image")
    return image, _find(source.path, header, source.caption_column, CAPTION_COLUMNS, "caption")


def _find(path: Path, header: Sequence[str], given: str | None, usual: Sequence[str], what: str) -> int:
    names = [name.strip().lower() for name in header]
    for name in [given.lower()] if given else usual:
        if name in names:
            return names.index(name)
    expected = repr(given) if given else f"named {', '.join(usual[:-1])} or {usual[-1]}"
    found = ", ".join(name.strip()[:40] for name in header[:12])
    raise GramError(f"{path}: expected a column {expected}, found {found}; name it with --{what}-column")


# --- Parquet ------------------------------------------------------------------------------------------------


def _parquet_rows(source: Source) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source.path)
    except (pa.ArrowException, OSError) as error:
        raise GramError(
            f"{source.path}: expected a Parquet file, found {' '.join(str(error).split())[:200]}"
        ) from None
    with file:
        names = file.schema_arrow.names
        image, caption = (names[column] for column in _named(source, names))
        kind = file.schema_arrow.field(image).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise GramError(f"{source.path}: expected image paths in column {image!r}, found {kind}")
        for group in range(file.num_row_groups):
            read = 0
            try:
                for batch in file.iter_batches(batch_size=4096, row_groups=[group], columns=[image, caption]):
                    locations, captions = _values(batch.column(image)), _values(batch.column(caption))
                    for location, of_image in zip(locations, captions, strict=True):
                        yield from _parquet_row(location, of_image)
                    read += batch.num_rows
            except (pa.ArrowException, OSError):  # damaged pages
                for _ in range(file.metadata.row_group(group).num_rows - read):
                    yield Row("", "", UNREADABLE)


def _parquet_row(location: Any, captions: Any) -> Iterator[Row]:
    """One row; a list of captions is one pair for each."""
    for caption in captions if isinstance(captions, list) else [captions]:
        if isinstance(location, bytes) or isinstance(caption, bytes):
            yield Row("", "", BAD_UTF8)
        else:
            yield checked(location, None if caption is None else str(caption))
    if captions == []:
        yield checked(location, "")


def _values(column: Any) -> list[Any]:
    """Python values of an Arrow column; a string that is not UTF-8 stays bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return b""
