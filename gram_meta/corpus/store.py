"""The store that `gram embed` writes: pairs, the places of their images, and their features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np

from gram_meta.corpus.places import ImageReader, Places
from gram_meta.corpus.sources.format import read_rows
from gram_meta.errors import GramError, as_gram_error, in_one_line
from gram_meta.files import Checksum, ModelFacts, PathLike, check_type, check_unchanged, read_json

if TYPE_CHECKING:
    import pyarrow as pa

    from gram_meta.backbone.clip import Backbone

FORMAT = 1
MANIFEST = "manifest.json"
CAPTIONS = "captions.parquet"  # image, caption
IMAGES = "images.parquet"  # location, digest; of images in shards also shard, offset, size
IMAGE_FEATURES = "image_features.npy"
SENTENCE_FEATURES = "sentence_features.npy"
SIMILARITY = "similarity.npy"
FILES = (CAPTIONS, IMAGES, IMAGE_FEATURES, SENTENCE_FEATURES, SIMILARITY)
PARTS = "parts"  # exists while the store is unfinished


class Strings(Sequence[str]):
    """A column of strings in Arrow's compact form; items are converted to `str` on access."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index: Any) -> Any:
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
        """Return the items at `rows`, in their order."""
        if len(rows) * 100 < len(self):  # `take` would join all chunks first
            return [self[row] for row in rows]
        return self.column.take(np.asarray(rows, dtype=np.int64)).to_pylist()


class PairStore:
    """Image-text pairs with their features, in a folder; each column is loaded when it is first used.

    Attributes:
        path: the folder.
        manifest: settings, counts, what was skipped and why.
        captions: n strings.
        image: (n,) int64, row of each pair's image.
        locations: m strings, paths of the distinct images: relative to `image_root`, or absolute.
        image_features: (m, D) float16, of CLIP, L2-normalised.
        similarity: (n,) float32, CLIP's cosine of each pair's image and caption, from features rounded to float16.
        sentence_features: (n, S) float16, of Sentence-BERT, L2-normalised.
        fingerprint: SHA-256 of the content: fingerprints of both models, captions, locations and image contents.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], verify: bool = False) -> None:
        self.path = path
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.image_root = Path(manifest["settings"]["source"]["image_root"])
        pairs, _ = _rows_and_columns(path / CAPTIONS, ("image", "caption"))
        images, columns = _rows_and_columns(path / IMAGES, ("location",))
        self.has_shards = "shard" in columns
        clip, sentence_model = (manifest["settings"][model].get("width") for model in ("clip", "sentence_model"))
        self.image_features = _array(path / IMAGE_FEATURES, np.float16, images, clip)
        self.sentence_features = _array(path / SENTENCE_FEATURES, np.float16, pairs, sentence_model)
        self.similarity = _array(path / SIMILARITY, np.float32, pairs)
        counts = {"pairs": pairs, "images": images}
        for what, found in manifest.get("counts", {}).items():
            if found != counts.get(what, found):
                raise GramError(f"{path / MANIFEST}: expected {counts[what]} {what} as in the files, found {found}")
        check_unchanged(path, manifest.get("files", {}), verify)  # earlier versions wrote no checksums

    @cached_property
    def captions(self) -> Strings:
        return Strings(_columns(self.path / CAPTIONS, ["caption"])["caption"])

    @cached_property
    def image(self) -> np.ndarray:
        image = _columns(self.path / CAPTIONS, ["image"])["image"].to_numpy()
        if len(image) and not 0 <= image.min() <= image.max() < len(self.image_features):
            found = f"{image.min()} to {image.max()}"
            count = len(self.image_features)
            raise GramError(f"{self.path / CAPTIONS}: expected rows of {count} images, found {found}")
        return image

    @cached_property
    def locations(self) -> Strings:
        return Strings(_columns(self.path / IMAGES, ["location"])["location"])

    @cached_property
    def in_shards(self) -> InShards | None:
        """The columns that place images in tar or Parquet shards; None: each image is a file of its own."""
        if not self.has_shards:
            return None
        import pyarrow as pa

        table = _columns(self.path / IMAGES, ["shard", "offset", "size"], dictionary=["shard"])
        shards = pa.chunked_array(table["shard"].chunks, table["shard"].type).unify_dictionaries()
        names = shards.chunk(0).dictionary.to_pylist() if shards.num_chunks else []
        indices = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in shards.chunks]
        shard_of = np.concatenate(indices).astype(np.int32) if indices else np.zeros(0, np.int32)
        if "" in names:  # some images are files of their own
            shard_of[shard_of == names.index("")] = -1
        return InShards(names, shard_of, table["offset"].to_numpy(), table["size"].to_numpy())

    @classmethod
    def open(cls, path: PathLike, verify: bool = False) -> PairStore:
        """Open a finished store; `verify`: compare all checksums, not only of files of new size or modification time.

        Raises `GramError` for no store, an unfinished one, another format, or a missing, damaged or changed file.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise GramError(f"{path}: expected a pair store (a folder of `gram embed`), found no {MANIFEST} there")
        manifest = read_manifest(path)
        if not manifest.get("finished"):
            raise GramError(f"{path}: expected a finished pair store, found an unfinished one; run gram embed again")
        import pyarrow as pa

        for name in FILES:
            if (path / name).exists() and not (path / name).is_file():  # a pipe would be read for ever
                raise GramError(f"{path / name}: expected a file of a pair store, found something else")
        try:
            return cls(path, manifest, verify)
        except (OSError, EOFError, ValueError, KeyError, pa.ArrowException) as error:
            if isinstance(error, GramError):
                raise
            raise GramError(f"{path}: expected a whole pair store, found {in_one_line(error)}") from None

    @property
    def crops_tensors(self) -> bool:
        """Whether images were resized as tensors, not by Pillow."""
        return "crop_on" in self.manifest["settings"]

    def __len__(self) -> int:
        return len(self.similarity)

    def places(self, root: PathLike | None = None) -> Places:
        """Return the places of the images, to read them; `root` is their present folder, None: the one at embedding."""
        sizes = self.manifest["settings"]["source"].get("shards") if self.in_shards else None
        reader = ImageReader(Path(root or self.image_root), sizes)
        return Places(reader, self.locations, *(self.in_shards or ()))

    def rows_of_images(self, path: PathLike) -> np.ndarray:
        """Return the rows, ascending, of the images whose locations stand in the column `image` of a TSV.

        Raises `GramError` for no such file or column, or a location that the store does not have.
        """
        with as_gram_error(path, "expected a .tsv file of images to exclude, found none"):
            header, *rows = read_rows(Path(path)) or [[]]
        if "image" not in header:
            raise GramError(f"{path}: expected a column image, found {', '.join(header) or 'an empty file'}")
        column = header.index("image")
        wanted = {row[column] for row in rows if len(row) > column}
        found = {location: row for row, location in enumerate(self.locations) if location in wanted}
        if unknown := sorted(wanted - found.keys()):
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise GramError(f"{path}: expected images of {self.path}, found {', '.join(unknown[:3])}{more}")
        return np.array(sorted(found.values()), np.int64)

    @property
    def clip_fingerprint(self) -> str:
        return self.manifest["settings"]["clip"]["fingerprint"]

    @property
    def sentence_fingerprint(self) -> str:
        return self.manifest["settings"]["sentence_model"]["fingerprint"]

    def check_backbone_name(self, name: str) -> None:
        """Raise `GramError` for features of another CLIP than `name`, as far as that shows without its weights."""
        from gram_meta.backbone.clip import check_name

        clip = self.manifest["settings"]["clip"]
        check_name(self.path, clip["name"], name, {"joint": clip["width"]})

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise `GramError` if the features come from another CLIP than `backbone`."""
        backbone.check_weights(self.path, self.manifest["settings"]["clip"]["name"], self.clip_fingerprint)


class _Source(TypedDict):
    kind: str
    image_root: str


class _Settings(TypedDict):
    source: _Source
    clip: ModelFacts
    sentence_model: ModelFacts


class _Manifest(TypedDict):
    """What is read from the manifest of every store; stores of earlier versions have these keys too."""

    settings: _Settings
    finished: bool


class _Optional(_Manifest, total=False):
    counts: dict[str, int]
    files: dict[str, Checksum]


class _Finished(_Optional):
    fingerprint: str


class InShards(NamedTuple):
    """Columns of `Places`."""

    shards: list[str]
    shard_of: np.ndarray  # (m,) int32, index into `shards`; -1: a file of its own
    offsets: np.ndarray  # (m,) int64
    sizes: np.ndarray  # (m,) int64


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a store's manifest, finished or not; raise `GramError` for another format."""
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("kind") != "pair store":
        raise GramError(f"{path / MANIFEST}: expected the manifest of a pair store, found something else")
    if manifest.get("format") != FORMAT:
        raise GramError(f"{path}: expected a pair store of format {FORMAT}, found format {manifest.get('format')}")
    return check_type(manifest, _Finished if manifest.get("finished") is True else _Manifest, str(path / MANIFEST))


def store_fingerprint(settings: dict[str, Any], counts: dict[str, int], content: list[str]) -> str:
    """Return the SHA-256 over models, counts, and hashes of locations, image contents, images of pairs, and captions.

    Features are left out on purpose: they differ in the last bit between machines, although the store is the same.
    """
    models = [settings[model]["fingerprint"] for model in ("clip", "sentence_model")]
    facts = [*models, counts["pairs"], counts["images"]]
    return hashlib.sha256(json.dumps([*facts, *content]).encode()).hexdigest()


def _rows_and_columns(path: Path, expected: Sequence[str]) -> tuple[int, list[str]]:
    """Return both from the footer of a Parquet file; raise `KeyError` if a column is missing."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        for name in expected:
            if name not in names:
                raise KeyError(f"no column {name} in {path.name}")
        return file.metadata.num_rows, names


def _columns(path: Path, names: list[str], dictionary: list[str] | None = None) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, columns=names, read_dictionary=dictionary)
    except (OSError, pa.ArrowException) as error:
        raise GramError(f"{path}: expected a whole file of a pair store, found {in_one_line(error)}") from None


def _array(path: Path, kind: type, rows: int, width: int | None = None) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if len(array) != rows:
        raise GramError(f"{path}: expected {rows} rows, found {len(array)}")
    if array.dtype != kind or (width and array.shape != (rows, width)):
        expected = (rows, width) if width else (rows,)
        raise GramError(f"{path}: expected {np.dtype(kind)} {expected}, found {array.dtype} {array.shape}")
    return array
