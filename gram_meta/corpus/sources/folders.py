"""A folder of images, each with a same-named `.txt` beside it; also img2dataset's `files` output."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from gram_meta.corpus.sources.rows import BAD_UTF8, EMPTY_CAPTION, IMAGE_SUFFIXES, NO_CAPTION_FILE, Row, checked
from gram_meta.errors import GramError

TABLES = (".tsv", ".tab", ".csv", ".parquet", ".pq", ".json", ".jsonl", ".token", ".tar")


def folder_rows(root: Path) -> Iterator[Row]:
    """Pairs of a folder and all below it; every line of a caption file that is not blank is a caption."""
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
        raise GramError(f"{root}: expected images with a same-named .txt beside them, found none{_tables_in(root)}")


def _images_below(folder: Path) -> Iterator[Path]:
    """Image files in the order of their names, folder by folder; links to folders are not followed."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from _images_below(Path(entry.path))
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and not entry.name.startswith("."):
                yield Path(entry.path)


def _tables_in(root: Path) -> str:
    """What to name instead: files that say which caption belongs to which image, or the folder that holds shards."""
    tables = sorted(
        path.name for path in root.iterdir() if path.suffix.lower() in TABLES or path.name == "captions.txt"
    )
    if tables:
        return f"; it holds {', '.join(tables[:3])}: name that file instead"
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if any(path.suffix.lower() in (".tar", ".parquet") for path in folder.iterdir()):
            return f"; {folder} holds shards: name that folder instead"
    return "; for a folder of class folders, give --format classes"
