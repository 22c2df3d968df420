"""CC3M and similar corpora: a TSV of captions and URLs, and images that were downloaded from them.

Train_GCC-training.tsv has `caption<TAB>url` and no header; the TSV of CC12M has the URL first. The
script that downloaded the images decides how their files are named, usually by the CRC-32 of the URL or by the row
number; `find_rule` detects the rule from the files.
"""

import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from gram_meta.corpus.sources.format import OnePiece, Options, Peek, existing_file, first_lines, open_text
from gram_meta.corpus.sources.rows import BAD_UTF8, COLUMN_COUNT, NO_IMAGE, Row, Source, checked, is_broken
from gram_meta.errors import GramError

log = logging.getLogger(__name__)

TRIED = 400  # rows whose files are looked for
LEAST = 20  # a rule is accepted if at least one row in LEAST has its file
FOLDERS = ("", "training", "validation", "train", "val", "images", "images_train", "images_val")
# Fields of `str.format`: crc32 of the URL; row, counted from 0, and row1, from 1; thousand = row % 1000; first4 = the
# first four of the row's seven digits.
RULES = (
    "{crc32}",  # the script of ViLBERT and DownloadConceptualCaptions: training/3163485042, no suffix
    "{row}",
    "{row:07d}",
    "{row:08d}",
    "{row:09d}",
    "{thousand}/{row}",  # OpenCLIP's gather_cc.py: train/12/3012.jpg
    "{first4}/{row:07d}",
    "image_{row}",
    "{row1}",
    "{row1:08d}",
)
SUFFIXES = (".jpg", "", ".jpeg", ".png", ".webp", ".gif")
ANY_SUFFIX = ".*"  # in a rule: the first of `SUFFIXES` for which the file exists


class UrlRow(NamedTuple):
    """A row of the TSV with its number, or the reason to skip it."""

    row: int
    caption: str = ""
    url: str = ""
    skip: str = ""


class Conceptual(OnePiece):
    """A TSV of captions and URLs, with a folder of downloaded images."""

    name = "cc3m"
    title = "captions and URLs with images that were downloaded"
    options = frozenset({"image_root", "image_name"})

    def claims(self, path: Path, peek: Peek) -> bool:
        return peek.suffix == ".tsv" and not peek.options.image_column and _is_conceptual(path)

    def open(self, path: Path, options: Options) -> Source:
        file = existing_file(path, self.title)
        root = (options.image_root or file.parent).resolve()
        rule = check_rule(options.image_name) if options.image_name else find_rule(file, root)
        return Source(file, self.name, root, naming=rule)

    def rows(self, source: Source) -> Iterator[Row]:
        """Yield the rows of the TSV; an image that was never downloaded is noticed only when it is read."""
        for row in _url_rows(source.path):
            if row.skip:
                yield Row("", "", row.skip)
            else:
                yield checked(_location(source.naming or "", row, source.image_root), row.caption)


def _is_conceptual(path: Path) -> bool:
    """Return whether each of the first rows has a caption and a URL, and nothing else."""
    lines = [line for line in first_lines(path, 3) if line]
    if lines and _header(lines[0]):
        lines = lines[1:]
    return bool(lines) and all(len(fields := line.split("\t")) == 2 and any(map(_is_url, fields)) for line in lines)


def _url_rows(path: Path) -> Iterator[UrlRow]:
    with open_text(path) as file:
        first = file.readline()
        header = _header(first.rstrip("\r\n"))
        if header is None:
            file.seek(0)
        url = 1
        for row, line in enumerate(file):
            fields = line.rstrip("\r\n").split("\t")
            if row == 0:
                url = header if header is not None else int(not _is_url(fields[0]))
            if fields == [""]:
                continue  # a blank line is no row, but scripts count it
            if len(fields) != 2:
                yield UrlRow(row, skip=COLUMN_COUNT)
            elif is_broken(line):
                yield UrlRow(row, skip=BAD_UTF8)
            elif not fields[url].strip():
                yield UrlRow(row, skip=NO_IMAGE)
            else:
                yield UrlRow(row, fields[1 - url], fields[url])


def _header(line: str) -> int | None:
    """Return the column of URLs in a header line; None: the line is not a header."""
    names = [name.strip().lower() for name in line.split("\t")]
    if len(names) == 2 and not any(map(_is_url, names)):
        return next((number for number, name in enumerate(names) if name in ("url", "image_url", "urls")), None)
    return None


def _is_url(text: str) -> bool:
    return text.strip().lower().startswith(("http://", "https://", "ftp://"))


# --- names of files -----------------------------------------------------------------------------------------


def find_rule(path: Path, root: Path) -> str:
    """Return how the images below `root` are named, by looking for those of the first rows.

    Raises `GramError` if none of `RULES` fits, or if row numbers may be counted from 0 or from 1.
    """
    rows = [row for row in islice(_url_rows(path), TRIED) if not row.skip]
    folders = [folder for folder in FOLDERS if (root / folder).is_dir()]
    suffixes: dict[str, Counter[str]] = {}
    for rule in [f"{folder}/{rule}" if folder else rule for folder in folders for rule in RULES]:
        suffixes[rule] = Counter(
            suffix for row in rows for suffix in SUFFIXES if (root / (_format(rule, row) + suffix)).is_file()
        )
    rule = max(suffixes, key=lambda rule: suffixes[rule].total(), default="")
    found = suffixes[rule].total() if rule else 0
    if found * LEAST < len(rows) or not found:
        best = f"{found} of them are called {rule}" if found else "none"
        raise GramError(
            f"{root}: expected the images of the first {len(rows)} rows of {path}, named by the CRC-32 of their URLs "
            f"or by their row numbers, found {best}; say how with --image-name, such as 'train/{{row:08d}}.jpg'. (A "
            "folder that img2dataset wrote is a source by itself, without the TSV.)"
        )
    counts = suffixes[rule]
    rule = _from_first_row(path, root, rule)
    rule += counts.most_common(1)[0][0] if len(counts) == 1 else ANY_SUFFIX
    log.info("%s: images are called %s; %d of the first %d rows have one", root, rule, found, len(rows))
    return rule


def check_rule(rule: str) -> str:
    """Return a rule that the user gave; raise `GramError` if it is not valid or gives all rows the same name."""
    one, two = UrlRow(0, url="http://a"), UrlRow(1, url="http://b")
    try:
        if _format(rule, one) != _format(rule, two):
            return rule
        found = "no field in it"
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    raise GramError(
        f"--image-name {rule}: expected a name with {{crc32}}, {{row}}, {{row1}}, {{thousand}} or {{first4}} in it, "
        f"such as 'train/{{row:08d}}.jpg', found {found}"
    )


def _from_first_row(path: Path, root: Path, rule: str) -> str:
    """Return the rule, counting from 0 or from 1: if images are missing both seem to fit, but one is off by a row."""
    if "{row" not in rule or "{thousand}" in rule or "{first4}" in rule:
        return rule
    zero = rule.replace("{row1", "{row")
    one = zero.replace("{row", "{row1")
    with open_text(path) as file:
        rows = sum(1 for _ in file) - (_header(first_lines(path, 1)[0]) is not None)
    if _exists(root, zero, UrlRow(0)):
        return zero
    if _exists(root, zero, UrlRow(rows)):
        return one
    raise GramError(
        f"{root}: expected images called by their row numbers, found neither number 0 nor number {rows}, so it "
        f"is unknown whether rows are counted from 0 or from 1: give --image-name '{zero}.jpg' or '{one}.jpg'"
    )


def _exists(root: Path, rule: str, row: UrlRow) -> bool:
    return any((root / (_format(rule, row) + suffix)).is_file() for suffix in SUFFIXES)


def _format(rule: str, row: UrlRow) -> str:
    return rule.format(
        crc32=zlib.crc32(row.url.encode("utf-8", "surrogateescape")) & 0xFFFFFFFF,
        row=row.row,
        row1=row.row + 1,
        thousand=row.row % 1000,
        first4=f"{row.row:07d}"[:4],
    )


def _location(rule: str, row: UrlRow, root: Path) -> str:
    if not rule.endswith(ANY_SUFFIX):
        return _format(rule, row)
    stem = _format(rule[: -len(ANY_SUFFIX)], row)
    return next((stem + suffix for suffix in SUFFIXES if os.path.isfile(root / (stem + suffix))), stem + SUFFIXES[0])
