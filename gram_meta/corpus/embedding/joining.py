"""Joining the parts of an embedding run into the files of a store."""

import hashlib
import logging
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gram_meta.corpus import store as layout
from gram_meta.corpus.embedding.index import Index
from gram_meta.corpus.embedding.parts import cosine, load_part, part_path
from gram_meta.corpus.places import NOT_FINITE, REASONS
from gram_meta.corpus.store import store_fingerprint
from gram_meta.errors import GramError
from gram_meta.files import atomic_write, checksums, write_json

log = logging.getLogger(__name__)

PATIENCE = 90.0  # seconds to wait for files of other machines; network file systems cache listings for up to 60


def join_parts(index: Index, out: Path, settings: dict[str, Any]) -> None:
    """Join the parts into the store's files, part by part; write the manifest last, then remove the parts.

    Memory: one part, and 11 bytes per image and pair. Raises `GramError` for no usable pair, or a damaged part.
    """
    parts = out / layout.PARTS
    _wait_for_files(index, parts)
    status = np.concatenate([load_part(parts, k, "status") for k in range(index.parts)] or [np.zeros(0, np.uint8)])
    row = np.cumsum(status == 0) - 1  # an image's id in the index -> its row in the store

    keeps: list[np.ndarray] = []
    skipped = Counter(index.skipped)
    for k in range(index.parts):
        reasons = status[index.read(k, "image")["image"].to_numpy()]
        skipped.update(Counter(REASONS[reason] for reason in reasons[reasons > 0].tolist()))
        finite = load_part(parts, k, "finite")
        skipped[NOT_FINITE] += int((~finite & (reasons == 0)).sum())
        keeps.append((reasons == 0) & finite)
    skipped += Counter()  # drops zeros
    pairs = sum(int(keep.sum()) for keep in keeps)
    if not pairs:
        raise GramError(_nothing_usable(index, settings["source"], skipped))

    content = {column: hashlib.sha256() for column in ("locations", "digests", "images", "captions")}
    images_ok = int((status == 0).sum())
    _join_images(index, out, (images_ok, settings["clip"]["width"]), content)
    shortened = _join_pairs(index, out, (pairs, settings["sentence_model"]["width"]), row, keeps, content)

    counts = {"rows": index.rows, "pairs": pairs, "images": images_ok}
    broken = Counter(REASONS[reason] for reason in status[status > 0].tolist())
    manifest = {
        "kind": "pair store",
        "format": layout.FORMAT,
        "finished": True,
        "fingerprint": store_fingerprint(settings, counts, [column.hexdigest() for column in content.values()]),
        "settings": settings,
        "counts": counts,
        # rows of the source: their sum and counts.pairs make counts.rows
        "skipped": dict(sorted(skipped.items())),
        "skipped_images": dict(sorted(broken.items())),
        "shortened_for_clip": shortened,
        "files": checksums(out, layout.FILES),
    }
    write_json(out / layout.MANIFEST, manifest)
    log.info("%s: %d pairs of %d images", out, pairs, images_ok)
    for reason, count in sorted(skipped.items()):
        log.info("  skipped, %s: %d", reason, count)
    index.close()
    shutil.rmtree(parts)


def _wait_for_files(index: Index, parts: Path) -> None:
    """Wait for parts of other machines, which may become visible here with a delay."""
    deadline = time.monotonic() + PATIENCE
    expected = {part_path(parts, k).name for k in range(index.parts)}
    while expected - {path.name for path in parts.iterdir()} and time.monotonic() < deadline:
        time.sleep(1.0)


def _nothing_usable(index: Index, source: dict[str, Any], skipped: Counter[str]) -> str:
    why = ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common()) or "no rows"
    example = next((place for k in range(index.parts) for place in index.places_of(k)), None)
    where = ""
    if example is not None:
        where = f"; the first image was looked for at {Path(source['image_root']) / example.location}"
    return f"{source['path']}: expected image-text pairs, found none usable ({why}){where}"


def _join_images(index: Index, out: Path, shape: tuple[int, int], content: dict[str, Any]) -> None:
    parts = out / layout.PARTS
    schema = pa.schema([("location", pa.string()), ("digest", pa.string())])
    if index.shard_bytes:
        schema = pa.schema([*schema, ("shard", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
    with (
        atomic_write(out / layout.IMAGE_FEATURES) as features,
        atomic_write(out / layout.IMAGES) as file,
        pq.ParquetWriter(file, schema) as writer,
    ):
        _npy_header(features, shape, np.float16)
        for k in range(index.parts):
            ok = load_part(parts, k, "status") == 0
            features.write(load_part(parts, k, "image_features")[ok].tobytes())
            images = index.images_of(k).filter(pa.array(ok))
            digests = [digest.tobytes().hex() for digest in load_part(parts, k, "digests")[ok]]
            content["locations"].update(_zero_ended(images["location"]))
            content["digests"].update("".join(digests).encode())
            if digests:
                images = images.append_column("digest", pa.array(digests, pa.string()))
                writer.write_table(images.select(schema.names))


def _join_pairs(
    index: Index, out: Path, shape: tuple[int, int], row: np.ndarray, keeps: list[np.ndarray], content: dict[str, Any]
) -> int:
    """Write captions, sentence features and similarities; return how many captions were shortened for CLIP."""
    parts = out / layout.PARTS
    image_features = np.load(out / layout.IMAGE_FEATURES, mmap_mode="r", allow_pickle=False)
    shortened = 0
    with (
        atomic_write(out / layout.SENTENCE_FEATURES) as sentences,
        atomic_write(out / layout.SIMILARITY) as similarities,
        atomic_write(out / layout.CAPTIONS) as file,
        pq.ParquetWriter(file, pa.schema([("image", pa.int64()), ("caption", pa.string())])) as writer,
    ):
        _npy_header(sentences, shape, np.float16)
        _npy_header(similarities, shape[:1], np.float32)
        for k, keep in enumerate(keeps):
            pairs = index.read(k, "image", "caption")
            image, captions = row[pairs["image"].to_numpy()], pairs["caption"].filter(pa.array(keep))
            sentences.write(load_part(parts, k, "sentence_features")[keep].tobytes())
            similarity, late = load_part(parts, k, "similarity"), load_part(parts, k, "late")
            if late.size:
                similarity[late] = cosine(image_features[image[late]], load_part(parts, k, "late_text_features"))
            similarities.write(similarity[keep].tobytes())
            image = image[keep]
            content["images"].update(image.astype("<i8").tobytes())
            content["captions"].update(_zero_ended(captions))
            shortened += int(load_part(parts, k, "shortened"))
            if len(image):
                writer.write_table(pa.table([image, captions], schema=writer.schema))
    return shortened


def _zero_ended(texts: pa.ChunkedArray) -> bytes:
    """Return the texts with a zero after each."""
    return "".join(f"{text}\0" for text in texts.to_pylist()).encode()


def _npy_header(file: Any, shape: tuple[int, ...], dtype: type) -> None:
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
