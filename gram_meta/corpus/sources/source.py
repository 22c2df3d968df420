"""Where image-text pairs come from: shards, folders and files of many formats, and which of them a path holds.

Every reader yields `Row`s in a fixed order and never fails on a bad row: the row comes out with the reason
why it cannot be used, so that the caller can count it.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gram_meta.corpus.places import PARQUET_SUFFIXES
from gram_meta.corpus.sources import conceptual, folders, parquet, tables
from gram_meta.corpus.sources import json as captions
from gram_meta.corpus.sources import webdataset as tars
from gram_meta.corpus.sources.patterns import expand, is_pattern
from gram_meta.corpus.sources.rows import Row, Shard
from gram_meta.errors import GramError
from gram_meta.files import PathLike, sha256_file

log = logging.getLogger(__name__)

# --format, and what each of them is in a message.
FORMATS = {
    "auto": "what SOURCE looks like",
    "webdataset": "tar shards",
    "parquet": "Parquet files",
    "folder": "a folder of images with captions beside them",
    "classes": "a folder of class folders",
    "tsv": "a tab-separated table",
    "csv": "a comma-separated table",
    "tokens": "lines of name.jpg#0, a tab and a caption",
    "coco": "COCO's captions in JSON",
    "karpathy": "Karpathy's splits in JSON",
    "records": "JSON records",
    "cc3m": "captions and URLs with images that were downloaded",
}
SUFFIXES = {".tsv": "tsv", ".tab": "tsv", ".csv": "csv"}
SHARDED = ("webdataset", "parquet")
KNOWN = "a folder, tar shards, or a .tsv, .csv, .txt, .json or .parquet file"


@dataclass(frozen=True)
class Source:
    """A source of pairs. May be sent to other processes.

    Attributes:
        path: the folder, file or pattern.
        kind: one of `FORMATS` but `auto`.
        image_root: folder that relative image paths, and the names of shards, start from.
        image_column, caption_column: as given (None: found by their usual names).
        classnames: of class folders, the list of their names. class_depth: how many levels below `path` they lie.
        files: the files, in their order, of a source that is several, or that has shards.
        split: the splits that are read, separated by commas; None: all.
        naming: of `cc3m`, how images are called (`conceptual.RULES`); of `karpathy`, whether their folder is part of it.
    """

    path: Path
    kind: str
    image_root: Path
    image_column: str | None = None
    caption_column: str | None = None
    classnames: Path | None = None
    class_depth: int = 1
    files: tuple[Path, ...] = ()
    split: str | None = None
    naming: str | None = None

    def rows(self) -> Iterator[Row]:
        """All rows, always in the same order."""
        if self.kind == "webdataset":
            return (row for shard in self.shards() for row in shard.rows())
        return _READERS[self.kind](self)

    def shards(self) -> list[Shard]:
        """The parts that can be read by themselves, in their order; `rows` is their rows, one after the other."""
        if self.kind == "webdataset":
            names = [self._name(file) for file in self.files]
            return [Shard(name, partial(tars.shard_rows, self.image_root, name, self.caption_column)) for name in names]
        if self.kind == "parquet":
            return parquet.parquet_shards(self)
        return [Shard("", self.rows)]

    def identity(self) -> dict[str, Any]:
        """What has to stay the same when an interrupted run goes on.

        Of a file that names images, its SHA-256; of shards, which may be hundreds of gigabytes, their names and sizes.
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
        if self.split or self.naming:
            identity["split"], identity["naming"] = self.split, self.naming
        if self.files:
            identity["shard_count"] = len(self.files)
            identity["shards"] = {self._name(file): _size(file) for file in self.files}
        return identity

    def _name(self, file: Path) -> str:
        return parquet.relative(self.image_root, file)


def _class_rows(source: Source) -> Iterator[Row]:
    from gram_meta.corpus.sources.classes import class_rows

    return class_rows(source)


_READERS: dict[str, Callable[[Source], Iterator[Row]]] = {
    "parquet": parquet.parquet_rows,
    "folder": lambda source: folders.folder_rows(source.path),
    "classes": _class_rows,
    "tsv": tables.table_rows,
    "csv": tables.table_rows,
    "tokens": tables.token_rows,
    "coco": captions.json_rows,
    "karpathy": captions.json_rows,
    "records": captions.json_rows,
    "cc3m": conceptual.conceptual_rows,
}


def _size(shard: Path) -> int:
    try:
        return shard.stat().st_size
    except OSError:
        raise GramError(f"{shard}: expected a shard, found nothing there any more") from None


# --- opening ------------------------------------------------------------------------------------------------


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
    """Look at `path` and say what kind of source it is.

    Args:
        path: a folder of WebDataset shards (`.tar`), of Parquet files with images inside, or of images with a same-named
            `.txt` beside them; one such shard; a table of image paths and captions (`.tsv`, `.csv`, `.parquet`, `.jsonl`);
            captions of COCO, Karpathy or Flickr8k; a TSV of captions and URLs as CC3M's. Several shards can be
            named by a pattern: `{00000..00331}.tar`, `train-*.parquet`.
        image_column, caption_column: their names in the file's header; for TSV and CSV also their numbers,
            counted from 1, in a file without a header. None: the usual names (`tables.IMAGE_COLUMNS`,
            `tables.CAPTION_COLUMNS`). In tar shards, `caption_column` is as in `tars.shard_rows`.
        image_root: folder that relative image paths start from; None: the folder of the file, and for captions in JSON
            and tokens the folders beside it in which such images mostly lie.
        format: one of `FORMATS`; `auto` never takes a folder for one of class folders (`classes.open_classes`).
        classnames: of class folders, the file that names them.
        split: of Karpathy's JSON, and of Parquet files called train-00000-of-00005.parquet: the splits to read,
            separated by commas; None: train (and restval) where there is one, else all; `all`.
        image_name: of CC3M, how images are called (`conceptual.RULES`); None: found out.

    Raises:
        GramError: nothing there, another kind of file, or an option that does not belong to what is there.
    """
    path = Path(path).expanduser()
    root = Path(image_root).expanduser() if image_root else None
    if format not in FORMATS:
        names = list(FORMATS)
        raise GramError(f"format: expected {', '.join(names[:-1])} or {names[-1]}, found {format!r}")
    if classnames and format != "classes":
        raise GramError(f"{classnames}: a list of class names belongs to a folder of class folders (--format classes)")
    if root and not root.is_dir():
        raise GramError(f"{root}: expected the folder that image paths start from, found no folder")
    files = _files(path)
    kind = _kind(path, files, image_column, caption_column) if format == "auto" else format
    _check_options(path, kind, image_column, caption_column, root, split, image_name)
    if kind == "classes":
        from gram_meta.corpus.sources.classes import open_classes

        return open_classes(path, Path(classnames).expanduser() if classnames else None)
    if kind in SHARDED:
        source = _sharded(path, kind, files, root, split, image_column)
    elif kind == "folder":
        if not path.is_dir():
            raise GramError(f"{path}: expected {FORMATS[kind]}, found {_found(path)}")
        source = Source(path.resolve(), kind, path.resolve())
    else:
        if not path.is_file():
            raise GramError(f"{path}: expected {FORMATS[kind]}, found {_found(path)}")
        source = _with_images(path.resolve(), kind, root, image_column, caption_column, split, image_name)
    source = replace(source, image_column=image_column, caption_column=caption_column)
    if kind == "parquet":
        source.shards()  # all footers, and the columns in them: what is wrong with them shows now
        if source.files and parquet.has_images(source.files[0], image_column):
            parquet.warn_of_large_groups(source.files[0], image_column)
    of = f" in {len(source.files)} files" if len(source.files) > 1 else ""
    log.info("%s: read as %s%s (--format %s)", path, FORMATS[kind], of, kind)
    return source


def _found(path: Path) -> str:
    return "a folder" if path.is_dir() else "a file" if path.exists() else "nothing there"


def _check_options(
    path: Path,
    kind: str,
    image_column: str | None,
    caption_column: str | None,
    root: Path | None,
    split: str | None,
    image_name: str | None,
) -> None:
    """Refuse options that mean nothing for a kind, rather than leave them out silently."""
    kinds = {
        "an image column": (image_column, ("tsv", "csv", "parquet", "records")),
        "a caption column": (caption_column, ("tsv", "csv", "parquet", "records", "webdataset")),
        "an image root": (root, [other for other in FORMATS if other not in ("folder", "classes", "webdataset")]),
        "a split": (split, ("karpathy", "records", "parquet")),
        "a rule for image names": (image_name, ("cc3m",)),
    }
    for what, (value, of) in kinds.items():
        if value and kind not in of:
            raise GramError(f"{path}: {what} does not belong to {FORMATS[kind]} (--format {kind})")


def _with_images(
    path: Path,
    kind: str,
    root: Path | None,
    image_column: str | None,
    caption_column: str | None,
    split: str | None,
    image_name: str | None,
) -> Source:
    """A file that names images: where these lie, and for some kinds how they are called."""
    if kind == "cc3m":
        base = (root or path.parent).resolve()
        rule = conceptual.check_rule(image_name) if image_name else conceptual.find_rule(path, base)
        return Source(path, kind, base, naming=rule)
    if kind == "tokens":
        names = list(dict.fromkeys(tables.token_names(path)))
        if not names:
            raise GramError(f"{path}: expected {FORMATS[kind]}, found no such line")
        base, _ = captions.find_images(path, root, {"": names})
        return Source(path, kind, base)
    if kind in ("coco", "karpathy", "records"):
        listed = list(captions.records(path, kind, image_column, caption_column))
        split = captions.choose_split(path, Counter(record.split for record in listed), split)
        chosen = [record for record in listed if captions.wanted(record.split, split)]
        forms = {
            form: [name for record in chosen if (name := captions.placed(record, form))]
            for form in (("filepath", "filename") if kind == "karpathy" else ("",))
        }
        base, form = captions.find_images(path, root, forms)
        return Source(path, kind, base, split=split, naming=form or None)
    return Source(path, kind, (root or path.parent).resolve())


# --- which kind ---------------------------------------------------------------------------------------------


def _files(path: Path) -> list[Path]:
    """The tar or Parquet files that `path` is, holds (also in `data/`, as on the hub), or stands for."""
    if path.is_dir():
        for folder in (path, path / "data"):
            there = sorted(folder.iterdir()) if folder.is_dir() else []
            for is_kind in (_is_tar, _is_parquet):
                if files := [file for file in there if is_kind(file) and file.is_file()]:
                    return files
        return []
    if is_pattern(path):
        return expand(path)
    return [path] if path.is_file() and (_is_tar(path) or _is_parquet(path)) else []


def _is_tar(path: Path) -> bool:
    name = path.name.lower()
    return not name.startswith(".") and (name.endswith((".tar", ".tgz")) or ".tar." in name)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in PARQUET_SUFFIXES and not path.name.startswith(".")


def _kind(path: Path, files: list[Path], image_column: str | None, caption_column: str | None) -> str:
    """What there is at `path`."""
    if files and all(map(_is_tar, files)):
        return "webdataset"
    if files and all(map(_is_parquet, files)):
        # Beside folders of images img2dataset leaves Parquet files of facts about them.
        if not path.is_dir() or _has_images(files, image_column):
            return "parquet"
    elif files:
        raise GramError(f"{path}: expected .tar or .parquet files, found {', '.join(file.name for file in files[:3])}")
    if path.is_dir():
        return "folder"
    if not path.is_file():
        raise GramError(f"{path}: expected {KNOWN}, found nothing there")
    return _kind_of_file(path, tables.numbered(image_column, caption_column) is not None, image_column)


def _has_images(files: list[Path], image_column: str | None) -> bool:
    """Whether the first file that is whole has images inside; one that is not is told of when it is read."""
    for file in files:
        try:
            return parquet.has_images(file, image_column)
        except GramError:
            continue
    return False


def _kind_of_file(path: Path, is_numbered: bool, image_column: str | None) -> str:
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl"):
        return captions.json_kind(path)
    first = tables.first_lines(path, 1)[0]
    if suffix not in SUFFIXES and suffix not in (".txt", ".token"):
        raise GramError(f"{path}: expected {KNOWN}, found {suffix or 'no suffix'}")
    if tables.is_token_line(first):
        return "tokens"
    if suffix == ".tsv" and not (is_numbered or image_column) and conceptual.is_conceptual(path):
        return "cc3m"
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    if "," in first and "\t" not in first:  # Flickr8k's captions.txt: image,caption
        return "csv"
    if "\t" in first:
        return "tsv"
    raise GramError(f"{path}: expected a table of images and captions, found the first line {first[:60]!r}")


def _sharded(
    path: Path, kind: str, files: list[Path], root: Path | None, split: str | None, image_column: str | None
) -> Source:
    is_kind = _is_tar if kind == "webdataset" else _is_parquet
    files = [Path(os.path.abspath(file)) for file in files if is_kind(file)]
    if not files and path.is_file() and kind == "webdataset":  # by another name
        files = [Path(os.path.abspath(path))]
    if not files:
        raise GramError(f"{path}: expected {FORMATS[kind]}, found {'none in there' if path.exists() else 'nothing'}")
    if kind == "webdataset":
        tars.check_shard_file(files[0])
    else:
        split = captions.choose_split(path, Counter(map(parquet.split_of, files)), split)
        files = [file for file in files if captions.wanted(parquet.split_of(file), split)]
    base = root.resolve() if root else Path(os.path.commonpath([file.parent for file in files]))
    if kind == "parquet" and len(files) == 1 and path.is_file() and not parquet.has_images(files[0], image_column):
        return Source(files[0], kind, base)  # a table of paths
    return Source(Path(os.path.abspath(path)), kind, base, files=tuple(files), split=split)
