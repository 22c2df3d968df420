"""A source of image-text pairs, as plain data: what `open_source` found out about a path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gram_meta.errors import GramError
from gram_meta.files import sha256_file


@dataclass(frozen=True)
class Source:
    """A source of pairs. It can be pickled and sent to other processes."""

    path: Path  # the folder, file or pattern
    kind: str  # the name of its format (`Format.name`)
    image_root: Path  # the folder that relative image paths, and the names of shards, start from
    image_column: str | None = None  # as the user named them; None: columns with one of the usual names
    caption_column: str | None = None
    classnames: Path | None = None  # for class folders, the file with their names
    class_depth: int = 1  # how many levels below `path` they lie
    files: tuple[Path, ...] = ()  # the files in their order, if the source has several or is made of shards
    split: str | None = None  # the splits to read, separated by commas; None: all
    # for `cc3m`, how image files are named (`conceptual.RULES`); for `karpathy`, whether `filepath` is part of the name
    naming: str | None = None

    def identity(self) -> dict[str, Any]:
        """Return what must stay the same for an interrupted run to be continued.

        A file that names images is identified by its SHA-256; shards, which may be hundreds of gigabytes, by their
        names and sizes.
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
            identity["shards"] = {relative_name(self.image_root, file): _size(file) for file in self.files}
        return identity


def relative_name(root: Path, file: Path) -> str:
    """Return a file's path relative to `root`, or its absolute path if it does not lie below `root`."""
    return (file.relative_to(root) if file.is_relative_to(root) else file).as_posix()


def _size(shard: Path) -> int:
    try:
        return shard.stat().st_size
    except OSError:
        raise GramError(f"{shard}: expected a shard, found nothing there any more") from None
