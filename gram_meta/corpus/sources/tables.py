"""Tables of image paths and captions as text: TSV, CSV, and lines "name.jpg#0<TAB>caption"."""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from gram_meta.corpus.sources.format import OnePiece, Options, Peek, existing_file, find_images, open_text
from gram_meta.corpus.sources.rows import COLUMN_COUNT, UNREADABLE, Row, Source, checked
from gram_meta.errors import GramError

IMAGE_COLUMNS = ("image", "image_path", "image_name", "path", "filename", "file_name", "filepath", "file")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentences", "comment", "alt_text")
NUMBERED_LINE = re.compile(r"([^\t]+)#\w+\t(.*)", re.DOTALL)  # of Flickr8k.token.txt: name, number, caption


class _Table(OnePiece):
    """A table with a column of image paths and a column of captions."""

    name: str
    title: str
    options = frozenset({"image_column", "caption_column", "image_root"})

    def open(self, path: Path, options: Options) -> Source:
        file = existing_file(path, self.title)
        root = (options.image_root or file.parent).resolve()
        return Source(file, self.name, root, options.image_column, options.caption_column)

    def rows(self, source: Source) -> Iterator[Row]:
        with open_text(source.path) as file:
            separator = _separator(source, file)
            if separator:  # without quoting, as in files of web captions: a caption may begin with a quotation mark
                records: Iterator[list[str] | None] = (line.rstrip("\r\n").split(separator) for line in file)
            else:
                records = _quoted_records(file)
            columns, width = _numbered(source), None
            if columns is None:
                header = next(records, None)
                if not header:
                    found = "none" if header is None else "no text"
                    raise GramError(f"{source.path}: expected a header line, found {found}")
                image = find_column(source.path, header, source.image_column, IMAGE_COLUMNS, "image")
                caption = find_column(source.path, header, source.caption_column, CAPTION_COLUMNS, "caption")
                columns, width = (image, caption), len(header)
            for record in records:
                if record is None:
                    yield Row("", "", UNREADABLE)
                    continue
                if not any(record):
                    continue  # a blank line is no row
                width = width or len(record)  # without a header, the first readable row
                if len(record) != width or max(columns) >= width:
                    yield Row("", "", COLUMN_COUNT)
                    continue
                yield checked(record[columns[0]].strip(), record[columns[1]])


class Tsv(_Table):
    """A tab-separated table, without quoting."""

    name = "tsv"
    title = "a tab-separated table"

    def claims(self, path: Path, peek: Peek) -> bool:
        return peek.suffix in (".tsv", ".tab") or (peek.suffix in (".txt", ".token") and "\t" in peek.first_line)


class Csv(_Table):
    """A comma-separated table, with quoting."""

    name = "csv"
    title = "a comma-separated table"

    def claims(self, path: Path, peek: Peek) -> bool:
        # also Flickr8k's captions.txt: image,caption
        return peek.suffix == ".csv" or ("," in peek.first_line and "\t" not in peek.first_line)


class Tokens(OnePiece):
    """Lines "name.jpg#0<TAB>caption", as in Flickr8k.token.txt."""

    name = "tokens"
    title = "lines of name.jpg#0, a tab and a caption"
    options = frozenset({"image_root"})

    def claims(self, path: Path, peek: Peek) -> bool:
        return NUMBERED_LINE.fullmatch(peek.first_line) is not None

    def open(self, path: Path, options: Options) -> Source:
        file = existing_file(path, self.title)
        names = list(dict.fromkeys(found[0] for found in _token_lines(file) if found))
        if not names:
            raise GramError(f"{file}: expected {self.title}, found no such line")
        root, _ = find_images(file, options.image_root, {"": names})
        return Source(file, self.name, root)

    def rows(self, source: Source) -> Iterator[Row]:
        for line in _token_lines(source.path):
            yield checked(line[0].strip(), line[1]) if line else Row("", "", COLUMN_COUNT)


def _separator(source: Source, file: TextIO) -> str:
    """Return what separates the columns; "" if they are separated by commas, with quoting."""
    if source.kind == Tsv.name:
        return "\t"
    # Some files named .csv have tabs (the script of OpenCLIP for CC3M) or bars (Flickr30k's results.csv).
    header = file.readline()
    file.seek(0)
    return next((other for other in ("\t", "|") if other in header and "," not in header), "")


def _quoted_records(file: TextIO) -> Iterator[list[str] | None]:
    """Yield comma-separated records; None for a record that breaks the rules of quoting."""
    records = csv.reader(file, strict=True)
    while True:
        try:
            yield next(records)
        except StopIteration:
            return
        except csv.Error:
            yield None


def _numbered(source: Source) -> tuple[int, int] | None:
    """Return column indices if both columns were given as numbers from 1, which means that the file has no header."""
    image, caption = (
        int(name) - 1 if name is not None and name.isdecimal() else -1
        for name in (source.image_column, source.caption_column)
    )
    return (image, caption) if image >= 0 and caption >= 0 else None


def find_column(path: Path, header: Sequence[str], given: str | None, usual: Sequence[str], what: str) -> int:
    """Return the index of the column named `given`, or (None) by one of the usual names; raise `GramError`."""
    names = [name.strip().lower() for name in header]
    for name in [given.lower()] if given else usual:
        if name in names:
            return names.index(name)
    expected = repr(given) if given else f"named {', '.join(usual[:-1])} or {usual[-1]}"
    found = ", ".join(name.strip()[:40] for name in header[:12])
    raise GramError(f"{path}: expected a column {expected}, found {found}; name it with --{what}-column")


def _token_lines(path: Path) -> Iterator[tuple[str, str] | None]:
    """Yield name and caption of each line that is not blank; None for a line of another form."""
    with open_text(path) as file:
        for line in file:
            if line.strip():
                found = NUMBERED_LINE.fullmatch(line.rstrip("\r\n"))
                yield (found[1], found[2]) if found else None
