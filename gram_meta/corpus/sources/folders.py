"""A folder of images, each with a same-named `.txt` beside it; also the output of img2dataset with `files`."""

import os
from collections.abc import Iterator
from pathlib import Path

from gram_meta.corpus.sources.classes import images_below
from gram_meta.corpus.sources.format import OnePiece, Options, Peek, found_at
from gram_meta.corpus.sources.rows import BAD_UTF8, EMPTY_CAPTION, NO_CAPTION_FILE, NO_MEMBER, Row, Source, checked
from gram_meta.errors import GramError

TABLES = (".tsv", ".tab", ".csv", ".parquet", ".pq", ".json", ".jsonl", ".token", ".tar")


class Folder(OnePiece):
    """A folder of images; every line of a `.txt` beside an image that is not blank is a caption of it."""

    name = "folder"
    title = "a folder of images with captions beside them"
    options: frozenset[str] = frozenset()

    def claims(self, path: Path, peek: Peek) -> bool:
        return path.is_dir()

    def open(self, path: Path, options: Options) -> Source:
        if not path.is_dir():
            raise GramError(f"{path}: expected {self.title}, found {found_at(path)}")
        return Source(path.resolve(), self.name, path.resolve())

    def rows(self, source: Source) -> Iterator[Row]:
        root = source.path
        read, last = 0, None  # captions' files, and the last of them
        for image in images_below(root, with_hidden=True):
            location = image.relative_to(root).as_posix()
            try:
                text = image.with_suffix(".txt")
                content = text.read_bytes() if text.is_file() else None  # not from a pipe
            except OSError:
                content = None
            if content is None:
                yield Row(location, "", NO_CAPTION_FILE)
                continue
            read, last = read + (text != last), text  # a.jpg and a.png have one
            lines = [line for line in content.splitlines() if line.strip()]
            if not lines:
                yield Row(location, "", EMPTY_CAPTION)
            for line in lines:
                try:
                    yield checked(location, line.decode("utf-8-sig"))
                except UnicodeDecodeError:
                    yield Row(location, "", BAD_UTF8)
        if not read:
            raise GramError(f"{root}: expected images with a same-named .txt beside them, found none{_tables_in(root)}")
        for _ in range(_count_texts(root) - read):
            yield Row("", "", NO_MEMBER)


def _count_texts(root: Path) -> int:
    """Return how many `.txt` files are in and below a folder."""
    texts = (f"{folder}/{name}" for folder, _, names in os.walk(root) for name in names if name[0] != ".")
    return sum(text.endswith(".txt") and os.path.isfile(text) for text in texts)


def _tables_in(root: Path) -> str:
    """Return advice on what to name instead: a table in the folder, or a folder in it that has shards."""
    tables = sorted(it.name for it in root.iterdir() if it.suffix.lower() in TABLES or it.name == "captions.txt")
    if tables:
        return f"; it holds {', '.join(tables[:3])}: name that file instead"
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if any(path.suffix.lower() in (".tar", ".parquet") for path in folder.iterdir()):
            return f"; {folder} holds shards: name that folder instead"
    return "; for a folder of class folders, give --format classes"
