"""CC3M and its like: a TSV of captions and URLs, and the images that somebody has downloaded by it.

Train_GCC-training.tsv has `caption<TAB>url` and no header; CC12M's has the URL first. Nothing in it says how files are
called: that is up to the script that downloaded them. The usual ones name files by the CRC-32 of the URL, or by the number
of the row; which of these it was shows in the files.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gram_meta.corpus.sources.rows import BAD_UTF8, COLUMN_COUNT, NO_IMAGE, Row, checked, is_broken
from gram_meta.corpus.sources.tables import first_lines, open_text
from gram_meta.errors import GramError

if TYPE_CHECKING:
    from gram_meta.corpus.sources.source import Source

log = logging.getLogger(__name__)

TRIED = 400  # rows whose files are looked for
LEAST = 20  # one in so many must be there for a rule to be believed
FOLDERS = ("", "training", "validation", "train", "val", "images", "images_train", "images_val")
# As str.format has it: crc32 of the URL; row, counted from 0, and row1, from 1; thousand = row % 1000; first4 = the first
# four of the row's seven digits.
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
ANY_SUFFIX = ".*"  # in a rule: the one of `SUFFIXES` that is there


class Line(NamedTuple):
    """A row of the TSV: its number, or a reason to skip it."""

    row: int
    caption: str
    url: str
    skip: str = ""


def is_conceptual(path: Path) -> bool:
    """Whether a TSV has a caption and a URL in each row, and nothing else."""
    lines = [line for line in first_lines(path, 3) if line]
    if lines and _header(lines[0]):
        lines = lines[1:]
    return bool(lines) and all(len(fields := line.split("\t")) == 2 and any(map(_is_url, fields)) for line in lines)


def conceptual_rows(source: Source) -> Iterator[Row]:
    """Rows of the TSV; images that were never downloaded show when they are read."""
    for line in _lines(source.path):
        if line.skip:
            yield Row("", "", line.skip)
        else:
            yield checked(_named(source.naming or "", line, source.image_root), line.caption)


def _lines(path: Path) -> Iterator[Line]:
    with open_text(path) as file:
        first = file.readline()
        header = _header(first.rstrip("\r\n"))
        if header is None:
            file.seek(0)
        url = 1
        row = -1
        for number, line in enumerate(file):
            fields = line.rstrip("\r\n").split("\t")
            if number == 0:
                url = header if header is not None else int(not _is_url(fields[0]))
            row += 1
            if fields == [""]:
                continue  # a blank line is no row, but scripts count it
            if len(fields) != 2:
                yield Line(row, "", "", COLUMN_COUNT)
            elif is_broken(line):
                yield Line(row, "", "", BAD_UTF8)
            elif not fields[url].strip():
                yield Line(row, "", "", NO_IMAGE)
            else:
                yield Line(row, fields[1 - url], fields[url])


def _header(line: str) -> int | None:
    """The column of URLs in a header line; None: the line is none."""
    names = [name.strip().lower() for name in line.split("\t")]
    if len(names) == 2 and not any(map(_is_url, names)):
        return next((number for number, name in enumerate(names) if name in ("url", "image_url", "urls")), None)
    return None


def _is_url(text: str) -> bool:
    return text.strip().lower().startswith(("http://", "https://", "ftp://"))


# --- names of files -----------------------------------------------------------------------------------------


def find_rule(path: Path, root: Path) -> str:
    """How the images below `root` are named, by looking for those of the first rows.

    Raises:
        GramError: by none of `RULES`; or by numbers of which nothing tells whether they begin at 0 or 1.
    """
    lines = [line for line in islice(_lines(path), TRIED) if not line.skip]
    folders = [folder for folder in FOLDERS if (root / folder).is_dir()]
    suffixes: dict[str, Counter[str]] = {}
    for rule in [f"{folder}/{rule}" if folder else rule for folder in folders for rule in RULES]:
        suffixes[rule] = Counter(
            suffix for line in lines for suffix in SUFFIXES if (root / (_format(rule, line) + suffix)).is_file()
        )
    rule = max(suffixes, key=lambda rule: suffixes[rule].total(), default="")
    found = suffixes[rule].total() if rule else 0
    if found * LEAST < len(lines) or not found:
        best = f"{found} of them are called {rule}" if found else "none"
        raise GramError(
            f"{root}: expected the images of the first {len(lines)} rows of {path}, named by the CRC-32 of their URLs or "
            f"by their row numbers, found {best}; say how with --image-name, such as 'train/{{row:08d}}.jpg'. (A folder "
            "of img2dataset's is a source by itself, without the TSV.)"
        )
    counts = suffixes[rule]
    rule = _from_first_row(path, root, rule)
    rule += counts.most_common(1)[0][0] if len(counts) == 1 else ANY_SUFFIX
    log.info("%s: images are called %s; %d of the first %d rows have one", root, rule, found, len(lines))
    return rule


def check_rule(rule: str) -> str:
    """A rule as a user gives it; `GramError` for one that cannot be followed, or gives all rows the same name."""
    one, two = Line(0, "", "http://a"), Line(1, "", "http://b")
    try:
        if _format(rule, one) != _format(rule, two):
            return rule
        found = "no field in it"
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    raise GramError(
        f"--image-name {rule}: expected a name with {{crc32}}, {{row}}, {{row1}}, {{thousand}} or {{first4}} in it, such "
        f"as 'train/{{row:08d}}.jpg', found {found}"
    )


def _from_first_row(path: Path, root: Path, rule: str) -> str:
    """The rule, or its twin that counts from 1: where some images are missing both fit, and one is off by a row."""
    if "{row" not in rule or "{thousand}" in rule or "{first4}" in rule:
        return rule
    zero = rule.replace("{row1", "{row")
    one = zero.replace("{row", "{row1")
    with open(path, "rb") as file:
        rows = sum(1 for _ in file) - (_header(first_lines(path, 1)[0]) is not None)
    if _there(root, zero, Line(0, "", "")):
        return zero
    if _there(root, zero, Line(rows, "", "")):
        return one
    raise GramError(
        f"{root}: expected images called by their row numbers, found neither number 0 nor number {rows}, so nothing "
        f"tells whether rows are counted from 0 or from 1: say --image-name '{zero}.jpg' or '{one}.jpg'"
    )


def _there(root: Path, rule: str, line: Line) -> bool:
    return any((root / (_format(rule, line) + suffix)).is_file() for suffix in SUFFIXES)


def _format(rule: str, line: Line) -> str:
    return rule.format(
        crc32=zlib.crc32(line.url.encode("utf-8", "surrogateescape")) & 0xFFFFFFFF,
        row=line.row,
        row1=line.row + 1,
        thousand=line.row % 1000,
        first4=f"{line.row:07d}"[:4],
    )


def _named(rule: str, line: Line, root: Path) -> str:
    if not rule.endswith(ANY_SUFFIX):
        return _format(rule, line)
    stem = _format(rule[: -len(ANY_SUFFIX)], line)
    return next((stem + suffix for suffix in SUFFIXES if os.path.isfile(root / (stem + suffix))), stem + SUFFIXES[0])
