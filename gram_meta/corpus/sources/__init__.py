"""Sources of image-text pairs: shards, folders and files of many formats.

A format reads its rows in a fixed order and never fails on a bad row: it yields the row with the reason why it cannot
be used, so that the caller can count it.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from gram_meta.corpus.sources.classes import ClassFolders
from gram_meta.corpus.sources.conceptual import Conceptual
from gram_meta.corpus.sources.folders import Folder
from gram_meta.corpus.sources.format import LABELS, Format, Options, Peek
from gram_meta.corpus.sources.json import Coco, Karpathy, Records, describe
from gram_meta.corpus.sources.parquet import Parquet
from gram_meta.corpus.sources.rows import Row, Shard, Source
from gram_meta.corpus.sources.tables import Csv, Tokens, Tsv
from gram_meta.corpus.sources.webdataset import WebDataset
from gram_meta.errors import GramError
from gram_meta.files import PathLike

log = logging.getLogger(__name__)

# In the order in which they are asked whether they recognise a path.
FORMATS: list[Format] = [
    WebDataset(),
    Parquet(),
    Folder(),
    ClassFolders(),
    Tokens(),
    Conceptual(),
    Tsv(),
    Csv(),
    Coco(),
    Karpathy(),
    Records(),
]
KNOWN = "a folder, tar shards, or a .tsv, .csv, .txt, .json or .parquet file"


def open_source(
    path: PathLike,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_root: PathLike | None = None,
    format: str = "auto",
    classnames: PathLike | None = None,
    split: str | None = None,
    image_name: str | None = None,
) -> Source:
    """Detect the format of the source at `path`, and describe the source.

    Args:
        path: a folder, a file, or a pattern of several shards: `{00000..00331}.tar`, `train-*.parquet`.
        image_column, caption_column: names in the header; None: the usual ones (`tables.IMAGE_COLUMNS` and
            `CAPTION_COLUMNS`). In TSV and CSV, two numbers, counted from 1, mean that the file has no header. In tar
            shards, `caption_column` is the `caption` of `webdataset._shard_rows`.
        image_root: the folder that relative image paths start from; None: the folder of the file, or for captions in
            JSON and tokens the folder beside the file that holds most of their images.
        format: the name of a format, or `auto` to detect it; class folders are never detected.
        classnames: for class folders, the file with their names.
        split: for Karpathy's JSON and Hugging Face's Parquet files: as in `splits.choose_split`.
        image_name: for CC3M, how image files are named (`conceptual.RULES`); None: detect it.

    Raises:
        GramError: nothing there, an unknown format, or an option that the format does not accept.
    """
    path = Path(path).expanduser()
    names = ["auto", *(known.name for known in FORMATS)]
    if format not in names:
        raise GramError(f"format: expected {', '.join(names[:-1])} or {names[-1]}, found {format!r}")
    root, list_of_names = (Path(name).expanduser() if name else None for name in (image_root, classnames))
    options = Options(image_column, caption_column, root, list_of_names, split, image_name)
    if list_of_names and format != ClassFolders.name:
        raise GramError(f"{classnames}: a list of class names belongs to {ClassFolders.title} (--format classes)")
    if root and not root.is_dir():
        raise GramError(f"{root}: expected the folder that image paths start from, found no folder")
    chosen = _detect(path, options) if format == "auto" else _by_name(format)
    for name in options.given():
        if name not in chosen.options:
            raise GramError(f"{path}: {LABELS[name]} does not belong to {chosen.title} (--format {chosen.name})")
    source = chosen.open(path, options)
    files = f" in {len(source.files)} files" if len(source.files) > 1 else ""
    log.info("%s: reading it as %s%s (--format %s)", path, chosen.title, files, chosen.name)
    return source


def shards_of(source: Source) -> list[Shard]:
    """Return the parts of a source that can be read separately, in their order."""
    return _by_name(source.kind).shards(source)


def all_rows(source: Source) -> Iterator[Row]:
    """Yield all rows of a source, always in the same order."""
    for shard in shards_of(source):
        yield from shard.rows()


def _by_name(name: str) -> Format:
    return next(known for known in FORMATS if known.name == name)


def _detect(path: Path, options: Options) -> Format:
    """Return the first format that recognises the path; raise `GramError` if none does."""
    peek = Peek(path, options)
    for known in FORMATS:
        if known.claims(path, peek):
            return known
    if peek.files:
        names = ", ".join(file.name for file in peek.files[:3])
        raise GramError(f"{path}: expected .tar or .parquet files, found {names}")
    if not path.is_file():
        raise GramError(f"{path}: expected {KNOWN}, found nothing there")
    if peek.suffix == ".json":
        raise GramError(
            f"{path}: expected captions as in COCO (images, annotations), as in Karpathy's splits (images with "
            f"sentences) or a list of records, found {describe(peek.json)}"
        )
    if peek.is_text:
        line = peek.first_line[:60]
        raise GramError(f"{path}: expected a table of images and captions, found the first line {line!r}")
    raise GramError(f"{path}: expected {KNOWN}, found {peek.suffix or 'no suffix'}")
