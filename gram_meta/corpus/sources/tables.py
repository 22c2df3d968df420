"""Tables of image paths and captions as text: TSV, CSV, and lines "name.jpg#0<TAB>caption"."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from gram_meta.corpus.sources.rows import COLUMN_COUNT, UNREADABLE, Row, checked
from gram_meta.errors import GramError

if TYPE_CHECKING:
    from gram_meta.corpus.sources.source import Source

IMAGE_COLUMNS = ("image", "image_path", "image_name", "path", "filename", "file_name", "filepath", "file")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentences", "comment", "alt_text")
NUMBERED_LINE = re.compile(r"([^\t]+)#\w+\t(.*)", re.DOTALL)  # of Flickr8k.token.txt: name, number, caption


def open_text(path: Path) -> TextIO:
    """A text file in which broken UTF-8 gets through, to be seen and counted in its own line alone."""
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


def first_lines(path: Path, count: int = 2) -> list[str]:
    """The first lines of a text file without their ends; a very long one is cut."""
    with open_text(path) as file:
        return [file.readline(1 << 16).rstrip("\r\n") for _ in range(count)]


def table_rows(source: Source) -> Iterator[Row]:
    """Rows of a TSV or CSV file."""
    with open_text(source.path) as file:
        records = _records(source, file)
        columns = numbered(source.image_column, source.caption_column)
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


def token_rows(source: Source) -> Iterator[Row]:
    """Rows of a file of lines "name.jpg#0<TAB>caption", as Flickr8k.token.txt."""
    with open_text(source.path) as file:
        for line in file:
            if not line.strip():
                continue
            found = NUMBERED_LINE.fullmatch(line.rstrip("\r\n"))
            yield checked(found[1], found[2]) if found else Row("", "", COLUMN_COUNT)


def token_names(path: Path) -> Iterator[str]:
    """The image names of such a file."""
    with open_text(path) as file:
        for line in file:
            if found := NUMBERED_LINE.fullmatch(line.rstrip("\r\n")):
                yield found[1]


def is_token_line(line: str) -> bool:
    """Whether a line is "name.jpg#0<TAB>caption"."""
    return NUMBERED_LINE.fullmatch(line) is not None


def _records(source: Source, file: TextIO) -> Iterator[list[str] | None]:
    if source.kind == "tsv":
        return _split_records(file, "\t")
    # Files called .csv that are none: tabs, as OpenCLIP's script for CC3M writes; bars, as Flickr30k's results.csv.
    header = file.readline()
    file.seek(0)
    for other in ("\t", "|"):
        if other in header and "," not in header:
            return _split_records(file, other)
    return _csv_records(file)


def _split_records(file: TextIO, separator: str) -> Iterator[list[str] | None]:
    """Separated without quoting, as web-caption files are: a caption may begin with a quotation mark."""
    for line in file:
        yield line.rstrip("\r\n").split(separator)


def _csv_records(file: TextIO) -> Iterator[list[str] | None]:
    """Comma-separated with quoting; None for a record that breaks the rules of quoting."""
    records = csv.reader(file, strict=True)
    while True:
        try:
            yield next(records)
        except StopIteration:
            return
        except csv.Error:
            yield None


def numbered(image_column: str | None, caption_column: str | None) -> tuple[int, int] | None:
    """Column indices when both columns were given as numbers from 1: then the file has no header."""
    given = (image_column, caption_column)
    if all(name is not None and name.isdecimal() and int(name) > 0 for name in given):
        return int(given[0]) - 1, int(given[1]) - 1  # type: ignore[arg-type]
    return None


def _named(source: Source, header: Sequence[str]) -> tuple[int, int]:
    image = find_column(source.path, header, source.image_column, IMAGE_COLUMNS, "image")
    return image, find_column(source.path, header, source.caption_column, CAPTION_COLUMNS, "caption")


def find_column(path: Path, header: Sequence[str], given: str | None, usual: Sequence[str], what: str) -> int:
    """The index of the column called `given`, or (None) by one of the usual names; `GramError` where there is none."""
    names = [name.strip().lower() for name in header]
    for name in [given.lower()] if given else usual:
        if name in names:
            return names.index(name)
    expected = repr(given) if given else f"named {', '.join(usual[:-1])} or {usual[-1]}"
    found = ", ".join(name.strip()[:40] for name in header[:12])
    raise GramError(f"{path}: expected a column {expected}, found {found}; name it with --{what}-column")
