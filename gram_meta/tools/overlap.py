"""Near-duplicates between a corpus and the test images of datasets: test images in a meta-corpus are a leak.

Equal files are found by the digests in the store. Other near-duplicates are found in two steps. The candidates of a
test image are the corpus images with the largest cosine of CLIP's features (or, without CLIP, of 8 x 8 pixel
thumbnails). Then each candidate is read, and its small copy is compared with that of the test image, over crops and
mirror images of both.

The cost is T x N x D multiplications for T test images and N images of D features, in blocks of bounded memory, and at
most T x k images read at random. docs/results/corpus.md has the arithmetic and measurements.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from gram_meta.corpus.store import IMAGES, PairStore
from gram_meta.files import PathLike, atomic_write, read_arrays, write_arrays
from gram_meta.images import DIGEST_BYTES, MISSING, BadImage, read_image
from gram_meta.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from gram_meta.backbone.clip import Backbone

SIDE = 32  # pixels of the small copies that are compared
INNER = 24  # pixels of a window of them
TINY = 8  # pixels of the thumbnails that find candidates without CLIP
CHUNK = 2048  # images between two writes to the cache
CORPUS_BLOCK = 16_384  # corpus images in one matrix product
QUERY_BLOCK = 4_096  # test images in one matrix product; together 268 MB of cosines
PAIR_BLOCK = 128  # pairs compared at once
VERSION = 1  # of the cache's contents
# Measured on synthetic near-duplicates (docs/results/corpus.md)
NEIGHBOURS, THRESHOLD, PIXEL_THRESHOLD, DISTANCE = 10, 0.5, 0.5, 0.25
EXACT, NEAR = "exact", "near"
COLUMNS = ("image", "dataset", "test_image", "kind", "cosine", "distance")


class TestImage(NamedTuple):
    """An image of a dataset: `name` is its path in the dataset's folder of images, `path` its whole path."""

    dataset: str
    name: str
    path: str


@dataclass(frozen=True)
class Match:
    """An image of the corpus that equals a test image, or nearly does."""

    row: int  # of the store's images
    test: int  # index of the test image
    kind: str  # `EXACT` or `NEAR`
    cosine: float  # of CLIP's features or of the thumbnails; nan for equal files
    distance: float  # 1 - correlation of the pixels; 0 for equal files


@dataclass(frozen=True)
class SearchSettings:
    """Settings of the search."""

    cache: Path  # folder for data computed from images
    neighbours: int = NEIGHBOURS  # candidates of each test image
    threshold: float = THRESHOLD  # least cosine of a candidate by CLIP
    pixel_threshold: float | None = None  # least cosine of a candidate by thumbnails; None: no such candidates
    distance: float = DISTANCE  # largest distance of near-duplicates
    workers: int = 4  # threads that read images
    device: str = "cpu"  # computes the features of test images, and the search
    # the folder that holds the corpus' images now; None: where `gram embed` read them
    image_root: PathLike | None = None


class Descriptors(NamedTuple):
    """Data computed from n images."""

    digest: np.ndarray  # (n, 16) uint8, of the files
    small: np.ndarray  # (n, 32, 32, 3) uint8
    feature: np.ndarray  # (n, D) float16, D = 0 without CLIP
    mirrored: np.ndarray  # (n, D) float16, of the mirrored images
    ok: np.ndarray  # (n,) bool, False if an image could not be read


def find_overlap(
    store: PairStore, tests: Sequence[TestImage], backbone: Backbone | None, settings: SearchSettings
) -> tuple[list[Match], dict[str, int]]:
    """Find the images of `store` that are test images.

    Args:
        tests: the test images, at least one.
        backbone: the CLIP of the store's features; None: candidates are found by pixels alone.

    Returns:
        Matches, sorted by row and test image; and counts: "unreadable tests", "unreadable candidates", "candidates".
    """
    seen = _describe_tests([test.path for test in tests], backbone, settings)
    exact = [Match(row, test, EXACT, float("nan"), 0.0) for row, test in _equal_files(store, seen)]
    pairs, cosines = _candidate_pairs(store, seen, backbone is not None, settings)
    near, unreadable = _confirmed(store, seen.small, pairs, cosines, settings)
    known = {(match.row, match.test) for match in exact}
    matches = exact + [match for match in near if (match.row, match.test) not in known]
    counts = {"candidates": len(pairs), "unreadable tests": int((~seen.ok).sum()), "unreadable candidates": unreadable}
    return sorted(matches, key=lambda match: (match.row, match.test)), counts


def write_matches(path: PathLike, store: PairStore, tests: Sequence[TestImage], matches: Sequence[Match]) -> None:
    """Write a TSV with a line per match: the image's location in the store, the test image, cosine and distance."""
    with atomic_write(path, "w") as file:
        file.write("\t".join(COLUMNS) + "\n")
        for match in matches:
            test, location = tests[match.test], store.locations[match.row]
            cosine = "" if np.isnan(match.cosine) else f"{match.cosine:.4f}"
            line = (location, test.dataset, test.name, match.kind, cosine, f"{match.distance:.4f}")
            file.write("\t".join(line) + "\n")


def _equal_files(store: PairStore, seen: Descriptors) -> list[tuple[int, int]]:
    """Return (row, test) of images whose files are the same byte for byte."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    by_digest: dict[str, list[int]] = {}
    for test in np.flatnonzero(seen.ok):
        by_digest.setdefault(seen.digest[test].tobytes().hex(), []).append(int(test))
    column = pq.read_table(store.path / IMAGES, columns=["digest"])["digest"]
    wanted = pa.array(list(by_digest), pa.string())
    rows = np.flatnonzero(pc.is_in(column, value_set=wanted).to_numpy())
    found = column.take(pa.array(rows)).to_pylist()
    return [(int(row), test) for row, digest in zip(rows, found, strict=True) for test in by_digest[digest]]


def _candidate_pairs(
    store: PairStore, seen: Descriptors, by_clip: bool, settings: SearchSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Return (n, 2) different pairs (test, row), and their cosines: by CLIP for the pairs that CLIP has found."""
    tests = np.flatnonzero(seen.ok)
    total, k, device = len(store.locations), settings.neighbours, settings.device
    pairs, cosines = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.float32)]

    def add(rows: np.ndarray, cosine: np.ndarray, threshold: float) -> None:
        at, place = np.nonzero((cosine >= threshold) & (rows >= 0))
        pairs.append(np.stack([tests[at], rows[at, place]], 1))
        cosines.append(cosine[at, place])

    if by_clip:
        features = store.image_features
        blocks = ((start, features[start : start + CORPUS_BLOCK]) for start in range(0, total, CORPUS_BLOCK))
        add(*candidates(seen.feature[tests], seen.mirrored[tests], blocks, total, k, device), settings.threshold)
    if settings.pixel_threshold is not None:
        tiny = thumbnails(seen.small[tests])
        queries, corpus = (unit_vectors(tiny), unit_vectors(tiny[:, :, ::-1])), _pixel_blocks(store, settings)
        add(*candidates(*queries, corpus, total, k, device), settings.pixel_threshold)
    different, first = np.unique(np.concatenate(pairs), axis=0, return_index=True)
    return different, np.concatenate(cosines)[first]


def candidates(
    queries: np.ndarray, mirrored: np.ndarray, blocks: Iterable[tuple[int, np.ndarray]], total: int, k: int, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `k` rows nearest to each image and to its mirror image, and their cosines: (T, 2 k) each."""
    rows, cosines = nearest_rows(np.concatenate([queries, mirrored]), blocks, total, k, device)
    return np.hstack(np.split(rows, 2)), np.hstack(np.split(cosines, 2))


def nearest_rows(
    queries: np.ndarray, blocks: Iterable[tuple[int, np.ndarray]], total: int, k: int, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `k` rows of the corpus with the largest cosine, for every query.

    Args:
        queries: (T, D), normalised. blocks: (first row, (B, D), normalised) of the corpus. total: rows of the corpus.

    Returns:
        (T, k) int64 rows and (T, k) float32 cosines, best first; -1 and -1 if the corpus has fewer than k rows.
    """
    import torch

    best = torch.full((len(queries), k), -1.0)
    rows = torch.full((len(queries), k), -1, dtype=torch.int64)
    bar = progress_bar(total=total, unit="image", desc="nearest images", unit_scale=True)
    for start, block in blocks:
        corpus = torch.from_numpy(np.array(block)).to(device).float()  # (B, D); a copy: the file is read-only
        for first in range(0, len(queries), QUERY_BLOCK):
            some = slice(first, first + QUERY_BLOCK)
            cosines = torch.from_numpy(queries[some]).to(device).float() @ corpus.T  # (Q, B)
            values, places = cosines.topk(min(k, len(corpus)), dim=1)
            values = torch.cat([best[some], values.cpu()], dim=1)  # (Q, up to 2 k)
            places = torch.cat([rows[some], places.cpu() + start], dim=1)
            best[some], order = values.topk(k, dim=1)
            rows[some] = places.gather(1, order)
        bar.update(len(block))
    bar.close()
    return rows.numpy(), best.numpy()


def _pixel_blocks(store: PairStore, settings: SearchSettings) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, unit vectors) of the corpus, read in chunks that are cached; zeros for unreadable images."""
    for start in range(0, len(store.locations), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(store.locations)))
        tiny, _readable = _read_corpus(store, rows, settings, thumbnails)
        yield start, unit_vectors(tiny)


def thumbnails(small: np.ndarray) -> np.ndarray:
    """Return means over 4 x 4 pixels: (n, 32, 32, 3) uint8 -> (n, 8, 8, 3) uint8."""
    step = SIDE // TINY
    return small.reshape(-1, TINY, step, TINY, step, 3).mean((2, 4)).round().astype(np.uint8)


def unit_vectors(tiny: np.ndarray) -> np.ndarray:
    """Return vectors (n, 192) float32 of mean 0 and norm 1 of thumbnails (n, 8, 8, 3); zeros for one colour only."""
    flat = tiny.reshape(len(tiny), -1).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    norm = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.where(norm > 1, flat / np.maximum(norm, 1), 0).astype(np.float32)


def small_copy(image: Image.Image) -> np.ndarray:
    """Return the whole image, of any shape, as (32, 32, 3) uint8."""
    return np.array(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the distance of pairs of images: 1 - the largest correlation of their details, over windows and mirroring.

    The details of an image are the image minus its mean over 7 x 7 pixels, so brightness and a common sky or floor do
    not count. Each image as a whole, and its mirror image, is compared with the windows of the other: the whole, crops
    by 5, 10 and 20 % at nine places, the middle of the width or height, the inside of a border.

    Args:
        a, b: (n, 32, 32, 3) uint8.

    Returns:
        (n,) float32 from 0 to 2.
    """
    import torch

    parts = [np.zeros(0, np.float32)]
    for start in range(0, len(a), PAIR_BLOCK):
        windows_a, windows_b = (_windows(torch.from_numpy(x[start : start + PAIR_BLOCK])) for x in (a, b))
        best = torch.full((len(windows_a),), -1.0)
        for one, other in ((windows_a, windows_b), (windows_b, windows_a)):
            for whole in (one[:, :1], one[:, :1].flip(3)):  # the set of windows is its own mirror image
                best = torch.maximum(best, (whole * other).flatten(2).sum(2).amax(1))
        parts.append((1 - best).numpy())
    return np.concatenate(parts)


def _windows(small: Tensor) -> Tensor:
    """Return the details of windows of images (n, 32, 32, 3), the whole first: (n, W, 24, 24, 3), mean 0, norm 1."""
    import torch

    down, across, smooth = _window_matrices()
    x = small.permute(0, 3, 1, 2).float()  # (n, 3, y, x)
    x = torch.einsum("wiy,ncyx->nwicx", down, x)
    x = torch.einsum("wjx,nwicx->nwicj", across, x)
    mean = torch.einsum("hi,nwicj->nwhcj", smooth, x) @ smooth.T
    x = (x - mean).transpose(3, 4)  # (n, W, 24, 24, 3)
    flat = x.flatten(2)
    flat = flat - flat.mean(2, keepdim=True)
    squares = flat.square().sum(2, keepdim=True) + flat.shape[2]  # + 1 per value: noise of a grey level is no detail
    return (flat / squares.sqrt()).view(x.shape)


@cache
def _window_matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Return matrices of means: over windows down and across, (W, 24, 32) each, and over 7 pixels, (24, 24)."""
    import torch

    down, across = (torch.stack([_means(*span[axis]) for span in _window_spans()]) for axis in (0, 1))
    near = (torch.arange(INNER)[:, None] - torch.arange(INNER)).abs() <= 3
    return down, across, near / near.sum(1, keepdim=True)


Span = tuple[float, float]


def _window_spans() -> list[tuple[Span, Span]]:
    """Return the windows as shares of an image, ((top, bottom), (left, right))."""
    spans: list[tuple[Span, Span]] = [((0.0, 1.0), (0.0, 1.0))]
    for side in (0.95, 0.9, 0.8):
        places = [(start, start + side) for start in (0.0, (1 - side) / 2, 1 - side)]
        spans += [(y, x) for y in places for x in places]
    middle = [((1 - side) / 2, (1 + side) / 2) for side in (0.75, 2 / 3)]
    spans += [(span, (0.0, 1.0)) for span in middle] + [((0.0, 1.0), span) for span in middle]
    inside = (1 / 12, 11 / 12)  # a border of a tenth
    return [*spans, (inside, inside)]


def _means(start: float, stop: float) -> Tensor:
    """Return (24, 32): row i is the mean over the i-th of 24 parts of the span."""
    import torch

    edges = np.linspace(start * SIDE, stop * SIDE, INNER + 1)
    pixel = np.arange(SIDE)
    weights = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)  # (24, 32)
    weights = weights.clip(min=0)
    return torch.from_numpy(weights / weights.sum(1, keepdims=True)).float()


def _confirmed(
    store: PairStore, tests: np.ndarray, pairs: np.ndarray, cosines: np.ndarray, settings: SearchSettings
) -> tuple[list[Match], int]:
    """Return matches of the pairs (test, row) whose pixels agree, and the number of rows with unreadable images."""
    matches: list[Match] = []
    unreadable = 0
    for some in _chunks(np.unique(pairs[:, 1]), "comparing pixels"):  # rows in the order of the shards
        small, readable = _read_corpus(store, some, settings, np.asarray)
        unreadable += int((~readable).sum())
        of_some = np.flatnonzero(np.isin(pairs[:, 1], some[readable]))
        far = distances(tests[pairs[of_some, 0]], small[np.searchsorted(some, pairs[of_some, 1])])
        for i, distance in zip(of_some, far, strict=True):
            if distance <= settings.distance:
                test, row = pairs[i].tolist()
                matches.append(Match(row, test, NEAR, float(cosines[i]), max(float(distance), 0.0)))
    return matches, unreadable


def _chunks(items: Any, desc: str) -> Iterator[Any]:
    """Yield slices of at most CHUNK items, and show the progress."""
    with progress_bar(total=len(items), unit="image", desc=desc) as bar:
        for start in range(0, len(items), CHUNK):
            some = items[start : start + CHUNK]
            yield some
            bar.update(len(some))


def _describe_tests(paths: Sequence[str], backbone: Backbone | None, settings: SearchSettings) -> Descriptors:
    """Return the descriptors of the test images, computed in chunks that are cached."""
    clip = (backbone.fingerprint, backbone.precision) if backbone else ("", "")
    parts: list[Descriptors] = []
    for chunk in _chunks(paths, "test images"):
        key = _key("tests", *clip, *map(_state, chunk))
        parts.append(Descriptors(**_cached(settings.cache, key, partial(_describe, chunk, backbone, settings))))
    return Descriptors(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _describe(paths: Sequence[str], backbone: Backbone | None, settings: SearchSettings) -> dict[str, np.ndarray]:
    transform = backbone.preprocess() if backbone is not None else None
    none = np.zeros((SIDE, SIDE, 3), np.uint8)

    def read(path: str) -> tuple[bytes, np.ndarray, Any, bool]:
        try:
            image, digest = read_image(path)
        except BadImage:
            return bytes(DIGEST_BYTES), none, None, False
        return digest, small_copy(image), transform(image) if transform else None, True

    width = backbone.embed_dim if backbone is not None else 0
    feature, mirrored = (np.zeros((len(paths), width), np.float16) for _ in range(2))
    seen: list[tuple[bytes, np.ndarray, bool]] = []
    with ThreadPoolExecutor(settings.workers) as pool:
        for start in range(0, len(paths), 64):
            digests, copies, pixels, ok = zip(*pool.map(read, paths[start : start + 64]), strict=True)
            seen += zip(digests, copies, ok, strict=True)
            if backbone is not None and any(ok):
                place = start + np.flatnonzero(ok)
                feature[place], mirrored[place] = _features(backbone, [p for p in pixels if p is not None])
    digests, copies, ok = zip(*seen, strict=True)
    digest = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)
    return {"digest": digest, "small": np.stack(copies), "feature": feature, "mirrored": mirrored, "ok": np.array(ok)}


def _features(backbone: Backbone, pixels: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Return CLIP's features of images (3, H, W), and of their mirror images."""
    import torch

    with torch.inference_mode():
        images = torch.stack(list(pixels))
        feature, mirrored = (backbone.encode_images(x).cpu().numpy() for x in (images, images.flip(3)))
    return feature.astype(np.float16), mirrored.astype(np.float16)


def _read_corpus(
    store: PairStore, rows: np.ndarray, settings: SearchSettings, reduce: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the store's images at `rows`, small and `reduce`d, and (n,) bool, False for unreadable images."""
    places = store.places(settings.image_root)
    none = np.zeros((SIDE, SIDE, 3), np.uint8)

    def read(row: int) -> tuple[np.ndarray, bool]:
        try:
            return small_copy(places.image(row)), True
        except BadImage:
            return none, False

    def make() -> dict[str, np.ndarray]:
        with ThreadPoolExecutor(settings.workers) as pool:
            small, ok = zip(*pool.map(read, rows.tolist()), strict=True)
        return {"small": reduce(np.stack(small)), "ok": np.array(ok)}

    kind = "tiny" if reduce is thumbnails else "small"
    key = _key(kind, store.fingerprint, str(places.reader.root), rows.astype("<i8").tobytes())
    found = _cached(settings.cache, key, make)
    return found["small"], found["ok"]


def _state(path: str) -> str:
    """Return a file's path, size and time; they differ for a changed file."""
    try:
        state = os.stat(path)
    except OSError:
        return f"{path}\0{MISSING}"
    return f"{path}\0{state.st_size}\0{state.st_mtime_ns}"


def _key(*what: str | bytes) -> str:
    digest = hashlib.sha256(f"{VERSION}\0{SIDE}\0{TINY}".encode())
    for part in what:
        part = part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape")
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:40]


def _cached(cache: Path, key: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return `make()`, or its result of an earlier run for this key."""
    path = cache / f"{key}.npz"
    found = read_arrays(path)
    if not found:
        found = make()
        write_arrays(path, found)
    return found
