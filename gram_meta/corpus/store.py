"""The store that `gram embed` leaves behind: pairs, where their images lie, and their features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from gram_meta.corpus.places import ImageReader, Places
from gram_meta.errors import GramError
from gram_meta.files import PathLike, read_json

if TYPE_CHECKING:
    import pyarrow as pa

    from gram_meta.backbone import Backbone

FORMAT = 1
MANIFEST = "manifest.json"
CAPTIONS = "captions.parquet"  # image, caption
IMAGES = "images.parquet"  # location, digest
IMAGE_FEATURES = "image_features.npy"
SENTENCE_FEATURES = "sentence_features.npy"
SIMILARITY = "similarity.npy"
PARTS = "parts"  # exists while the store is unfinished


class Strings(Sequence[str]):
    """A column of strings in Arrow's compact form; an item becomes a `str` when it is asked for."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self.column.slice(start, max(stop - start, 0)).to_pylist()
            return [self[i] for i in range(start, stop, step)]
        return self.column[int(index)].as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self.column.chunks:
            for start in range(0, len(chunk), 4096):
                yield from chunk.slice(start, 4096).to_pylist()

    def take(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The items at `rows`, in their order."""
        return self.column.take(np.asarray(rows, dtype=np.int64)).to_pylist()


class PairStore:
    """Image-text pairs with their features, read from a folder; nothing of it is loaded until it is used.

    Attributes:
        path: the folder.
        manifest: settings, counts, what was skipped and why.
        captions: n strings. image: (n,) int64, row of each pair's image.
        locations: m strings, where the distinct images lie: relative to `image_root`, or absolute.
        image_features: (m, D) float16, CLIP's, L2-normalised. similarity: (n,) float32, cosine between a
            pair's image and caption by CLIP, from features rounded to float16.
        sentence_features: (n, S) float16, Sentence-BERT's, L2-normalised.
        fingerprint: SHA-256 of what the store holds: its models' fingerprints, captions, locations and image
            contents.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        import pyarrow.parquet as pq

        self.path = path
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        pairs = pq.read_table(path / CAPTIONS)
        images = pq.read_table(path / IMAGES)
        self.captions = Strings(pairs["caption"])
        self.image: np.ndarray = pairs["image"].to_numpy()
        self.locations = Strings(images["location"])
        self.image_root = Path(manifest["settings"]["source"]["image_root"])
        self.image_features = _array(path / IMAGE_FEATURES, len(self.locations))
        self.sentence_features = _array(path / SENTENCE_FEATURES, len(self.captions))
        self.similarity = _array(path / SIMILARITY, len(self.captions))

    @classmethod
    def open(cls, path: PathLike) -> PairStore:
        """Open a finished store.

        Raises:
            GramError: no store there, an unfinished one, one of another format, or a file of it that is
                missing or damaged.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise GramError(
                f"{path}: expected a pair store (a folder written by `gram embed`), found no {MANIFEST} there"
            )
        manifest = read_manifest(path)
        if not manifest.get("finished"):
            raise GramError(
                f"{path}: expected a finished pair store, found an unfinished one; run its `gram embed` again"
            )
        import pyarrow as pa

        try:
            return cls(path, manifest)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            if isinstance(error, GramError):
                raise
            raise GramError(
                f"{path}: expected a whole pair store, found {' '.join(str(error).split())[:200]}"
            ) from None

    def __len__(self) -> int:
        return len(self.captions)

    def places(self, root: PathLike | None = None) -> Places:
        """Where the images lie and how to read them; `root` is the folder they are in now, None: as they were embedded."""
        return Places(ImageReader(Path(root or self.image_root)), self.locations)

    @property
    def clip_fingerprint(self) -> str:
        return self.manifest["settings"]["clip"]["fingerprint"]

    @property
    def sentence_fingerprint(self) -> str:
        return self.manifest["settings"]["sentence_model"]["fingerprint"]

    def check_backbone(self, backbone: Backbone) -> None:
        """Raises `GramError` when the features are of another CLIP than `backbone`."""
        if backbone.fingerprint != self.clip_fingerprint:
            clip = self.manifest["settings"]["clip"]
            raise GramError(
                f"{self.path}: its features are of the CLIP {clip['name']} ({clip['fingerprint'][:12]}), "
                f"expected {backbone.name} ({backbone.fingerprint[:12]})"
            )


def read_manifest(path: Path) -> dict[str, Any]:
    """A store's manifest, finished or not; another format is a `GramError`."""
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("kind") != "pair store":
        raise GramError(f"{path / MANIFEST}: expected the manifest of a pair store, found something else")
    if manifest.get("format") != FORMAT:
        raise GramError(
            f"{path}: expected a pair store of format {FORMAT}, found format {manifest.get('format')}"
        )
    return manifest


def store_fingerprint(settings: dict[str, Any], counts: dict[str, int], content: list[str]) -> str:
    """SHA-256 over models, counts, and the hashes of locations, image contents, images of pairs, and captions.

    Features are left out on purpose: they differ in the last bit between machines, and the store is still the
    same.
    """
    facts = [
        settings["clip"]["fingerprint"],
        settings["sentence_model"]["fingerprint"],
        counts["pairs"],
        counts["images"],
    ]
    return hashlib.sha256(json.dumps([*facts, *content]).encode()).hexdigest()


def _array(path: Path, rows: int) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if len(array) != rows:
        raise GramError(f"{path}: expected {rows} rows, found {len(array)}")
    return array
