"""From image-text pairs to a store of their features: what `gram embed` does.

The work is cut into parts before it begins (`index`). Each part is one file, written whole or not at all, so
a run that was interrupted at any point goes on with the parts that are missing. Batches are formed inside
parts, so the features do not depend on where a run was interrupted. When all parts are there they are joined
into the store.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from gram_meta.corpus import store as layout
from gram_meta.corpus.images import DIGEST_BYTES, NOT_FINITE, REASONS, ImageFiles, collate, images_of
from gram_meta.corpus.index import Index, write_index
from gram_meta.corpus.readers import Source, open_source
from gram_meta.corpus.store import PairStore, read_manifest, store_fingerprint
from gram_meta.errors import GramError
from gram_meta.files import PathLike, atomic_write, write_json

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm

    from gram_meta.backbone import Backbone
    from gram_meta.corpus.sentences import SentenceModel

log = logging.getLogger(__name__)


def embed_pairs(
    source: PathLike | Source,
    out: PathLike,
    backbone: Backbone,
    sentence_model: SentenceModel,
    *,
    batch_size: int = 64,
    part_size: int = 2048,
    workers: int = 0,
    progress: bool = False,
) -> PairStore:
    """Embed the pairs of `source` and write them to the folder `out`, or go on where an earlier run stopped.

    Args:
        source: as `open_source` takes it, or a `Source`.
        out: a new or empty folder, or one in which the same run was interrupted (or has finished).
        backbone: gives image features, and the similarity of each image and its caption.
        sentence_model: gives the sentence features that topics are made from.
        batch_size: images, and captions, in one forward pass.
        part_size: pairs per part: what an interruption can lose, and what is held in memory.
        workers: processes that read images; 0: this one.
        progress: show a progress bar.

    Raises:
        GramError: `out` holds something else, or a run with other settings; another process is at work on it;
            no usable pair; no space left.
    """
    for name, value, least in (
        ("batch size", batch_size, 1),
        ("part size", part_size, 1),
        ("workers", workers, 0),
    ):
        if value < least:
            raise GramError(f"{name}: expected at least {least}, found {value}")
    source = source if isinstance(source, Source) else open_source(source)
    out = Path(out)
    settings = {
        "source": source.identity(),
        "clip": {
            "name": backbone.name,
            "fingerprint": backbone.fingerprint,
            "precision": backbone.precision,
            "width": backbone.embed_dim,
        },
        "sentence_model": {
            "name": sentence_model.name,
            "fingerprint": sentence_model.fingerprint,
            "width": sentence_model.width,
        },
        "batch_size": batch_size,
        "part_size": part_size,
    }
    try:
        with _locked(out):
            if _begin(out, settings):
                log.info("%s: finished before, nothing to do", out)
                return PairStore.open(out)
            index = _index(source, out / layout.PARTS, part_size)
            missing = [part for part in range(index.parts) if not _part_path(out, part).exists()]
            if len(missing) < index.parts:
                log.info("%s: going on after %d of %d parts", out, index.parts - len(missing), index.parts)
            _embed_parts(index, missing, source, out, backbone, sentence_model, batch_size, workers, progress)
            _join(index, out, settings)
            shutil.rmtree(out / layout.PARTS)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise GramError(
                f"{out}: no space left on the device; free some and run the same command again"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise GramError(
                f"{error.filename or out}: expected to be allowed to write there ({error.strerror})"
            ) from None
        raise
    return PairStore.open(out)


# --- beginning ----------------------------------------------------------------------------------------------


_HELD: set[Path] = set()  # by this process: record locks do not keep a process from itself


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock goes when the process ends, however it ends.

    A record lock, not `flock`: that one would live on in forked image workers, for seconds after their parent
    was killed.
    """
    if out.exists() and not out.is_dir():
        raise GramError(f"{out}: expected a folder for the store, found a file")
    ours = (out / ".lock").exists() or (out / layout.MANIFEST).exists()
    if out.is_dir() and not ours and any(out.iterdir()):
        raise GramError(f"{out}: expected an empty folder or a pair store, found other files")
    out.mkdir(parents=True, exist_ok=True)
    key = out.resolve()
    busy = f"{out}: another run is at work on this store; wait for it, or choose another folder"
    if key in _HELD:
        raise GramError(busy)
    with open(out / ".lock", "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise GramError(busy) from None
        _HELD.add(key)
        try:
            yield
        finally:
            _HELD.discard(key)


def _begin(out: Path, settings: dict[str, Any]) -> bool:
    """Write the manifest of a new store, or compare with an earlier run's; True when that has finished."""
    for leftover in [*out.glob(".*.part"), *(out / layout.PARTS).glob(".*.part")]:  # of a run that was killed
        leftover.unlink()
    if not (out / layout.MANIFEST).exists():
        manifest = {"kind": "pair store", "format": layout.FORMAT, "finished": False, "settings": settings}
        write_json(out / layout.MANIFEST, manifest)
        return False
    if not is_finished(out, settings):
        return False
    shutil.rmtree(out / layout.PARTS, ignore_errors=True)  # killed between the last rename and this
    return True


def is_finished(out: PathLike, settings: dict[str, Any]) -> bool:
    """Whether `out` holds the finished result of a run with these settings (those that are given).

    Raises:
        GramError: it holds a run with other settings.
    """
    out = Path(out)
    if not (out / layout.MANIFEST).exists():
        return False
    manifest = read_manifest(out)
    for name, was, now in _differences(manifest["settings"], settings):
        raise GramError(
            f"{out}: was begun with {name} {was!r}, expected the same, found {now!r}; choose another folder "
            "for new settings"
        )
    return bool(manifest["finished"])


def _differences(was: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in now:
            yield from _differences(was.get(key), now[key], f"{name} {key}".strip().replace("_", " "))
    elif was != now:
        yield name, was, now


def _index(source: Source, parts: Path, part_size: int) -> Index:
    if (parts / "plan.json").exists():
        index = Index(parts)
    else:
        log.info("reading %s", source.path)
        index = write_index(source, parts, part_size)
    skipped = "".join(f", {reason}: {count}" for reason, count in index.skipped.items())
    log.info("%d rows: %d pairs of %d images%s", index.rows, index.pairs, index.images, skipped)
    return index


# --- parts --------------------------------------------------------------------------------------------------


def _part_path(out: Path, part: int) -> Path:
    return out / layout.PARTS / f"{part:06d}.npz"


def _embed_parts(
    index: Index,
    parts: Sequence[int],
    source: Source,
    out: Path,
    backbone: Backbone,
    sentence_model: SentenceModel,
    batch_size: int,
    workers: int,
    progress: bool,
) -> None:
    from tqdm import tqdm

    done = index.pairs - sum(index.sizes[part] for part in parts)
    batches = _image_batches(index, parts, source, backbone, batch_size, workers)
    with tqdm(total=index.pairs, initial=done, unit="pair", disable=not progress, smoothing=0.05) as bar:
        for part in parts:
            labelled = source.kind == "classes"
            _embed_part(index, part, batches, out, backbone, sentence_model, batch_size, labelled, bar)


def _embed_part(
    index: Index,
    part: int,
    batches: Iterator[tuple[Tensor | None, list[int], list[bytes]]],
    out: Path,
    backbone: Backbone,
    sentence_model: SentenceModel,
    batch_size: int,
    labelled: bool,
    bar: tqdm[Any],
) -> None:
    first, new = index.bounds[part], index.bounds[part + 1] - index.bounds[part]
    features = np.zeros((new, backbone.embed_dim), np.float16)
    status = np.zeros(new, np.uint8)  # index into REASONS
    digests = np.zeros((new, DIGEST_BYTES), np.uint8)
    shown = 0
    for start in range(0, new, batch_size):
        images, reasons, contents = next(batches)
        stop = start + len(reasons)
        status[start:stop] = reasons
        digests[start:stop] = [list(content) for content in contents]
        if images is not None:
            features[start:stop][status[start:stop] == 0] = _image_features(backbone, images)
        reached = index.sizes[part] * stop // new * 9 // 10  # the last tenth stands for the captions
        bar.update(reached - shown)
        shown = reached
    status[~np.isfinite(features).all(axis=1)] = REASONS.index(NOT_FINITE)

    image, captions = index.pairs_of(part)
    usable = np.ones(len(image), bool)  # as far as this part knows: an image of an earlier part may be broken
    usable[image >= first] = status[image[image >= first] - first] == 0
    chosen = [caption for caption, use in zip(captions, usable, strict=True) if use]
    texts = np.zeros((len(image), backbone.embed_dim), np.float16)
    sentences = np.zeros((len(image), sentence_model.width), np.float16)
    # A part of a labelled collection has a few captions, each of them many times over.
    different = list(dict.fromkeys(chosen)) if labelled else chosen
    fitted, shortened = fit_texts(backbone, different)
    of_text = backbone.encode_texts(fitted, batch_size).float().cpu().numpy()
    of_sentence = sentence_model.encode(different, batch_size)
    if labelled:
        number = {caption: row for row, caption in enumerate(different)}
        again = [number[caption] for caption in chosen]
        of_text, of_sentence = of_text[again], of_sentence[again]
        shortened = sum(fitted[row] != different[row] for row in again)
    texts[usable], sentences[usable] = of_text, of_sentence
    with atomic_write(_part_path(out, part)) as file:
        np.savez(
            file,
            status=status,
            digests=digests,
            image_features=features,
            text_features=texts,
            sentence_features=sentences,
            shortened=np.int64(shortened),
        )
    bar.update(index.sizes[part] - shown)


def _image_features(backbone: Backbone, images: Tensor) -> np.ndarray:
    import torch

    with torch.no_grad():
        return backbone.encode_images(images).float().cpu().numpy()


def _image_batches(
    index: Index, parts: Sequence[int], source: Source, backbone: Backbone, batch_size: int, workers: int
) -> Iterator[tuple[Tensor | None, list[int], list[bytes]]]:
    """Batches of images in the order of their parts, none across a part's border; workers read ahead."""
    from torch.utils.data import DataLoader

    def locations() -> Iterator[list[str]]:
        for part in parts:
            of_part = index.locations_of(part)
            for start in range(0, len(of_part), batch_size):
                yield of_part[start : start + batch_size]

    files = ImageFiles(source.image_root, backbone.preprocess())
    loader: DataLoader[Any] = DataLoader(
        cast(Any, files), batch_sampler=_Lists(locations), num_workers=workers, collate_fn=collate
    )
    advice = "what is done is kept: run the same command again, with fewer workers if memory was short"
    yield from images_of(loader, advice)


class _Lists:
    """A batch sampler over batches that are made when they are asked for."""

    def __init__(self, make: Callable[[], Iterator[list[str]]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[list[str]]:
        return self.make()


def fit_texts(backbone: Backbone, texts: Sequence[str]) -> tuple[list[str], int]:
    """Texts cut at their end to fit into CLIP's positions, and how many had to be cut."""
    try:
        backbone.tokenize(texts)
        return list(texts), 0
    except GramError:
        pass  # one of them is too long: look at each
    fitted = [text if _fits(backbone, text) else _shortened(backbone, text) for text in texts]
    return fitted, sum(a != b for a, b in zip(fitted, texts, strict=True))


def _fits(backbone: Backbone, text: str) -> bool:
    try:
        backbone.tokenize([text])
        return True
    except GramError:
        return False


def _shortened(backbone: Backbone, text: str) -> str:
    words = text.split(" ")
    if not _fits(backbone, words[0]):
        words, join = list(text), ""
    else:
        join = " "
    fits, too_long = 0, len(words)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        fits, too_long = (middle, too_long) if _fits(backbone, join.join(words[:middle])) else (fits, middle)
    return join.join(words[:fits])


# --- joining ------------------------------------------------------------------------------------------------


def _join(index: Index, out: Path, settings: dict[str, Any]) -> None:
    """Join the parts into the store's files, part by part; the manifest comes last."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    status = np.concatenate([_load(out, k, "status") for k in range(index.parts)] or [np.zeros(0, np.uint8)])
    row = np.cumsum(status == 0) - 1  # an image's number in the index -> its row in the store

    keeps: list[np.ndarray] = []
    skipped = Counter(index.skipped)
    for k in range(index.parts):
        reasons = status[index.pairs_of(k)[0]]
        skipped.update(Counter(REASONS[reason] for reason in reasons[reasons > 0].tolist()))
        finite = np.isfinite(_load(out, k, "text_features")).all(1) & np.isfinite(
            _load(out, k, "sentence_features")
        ).all(1)
        skipped[NOT_FINITE] += int((~finite & (reasons == 0)).sum())
        keeps.append((reasons == 0) & finite)
    skipped += Counter()  # drops zeros
    pairs = sum(int(keep.sum()) for keep in keeps)
    if not pairs:
        why = ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common()) or "no rows"
        example = next((index.locations_of(k)[0] for k in range(index.parts) if index.locations_of(k)), None)
        where = (
            f"; the first image was looked for at {Path(settings['source']['image_root']) / example}"
            if example
            else ""
        )
        raise GramError(
            f"{settings['source']['path']}: expected image-text pairs, found none usable ({why}){where}"
        )

    content = {column: hashlib.sha256() for column in ("locations", "digests", "images", "captions")}
    images_ok = int((status == 0).sum())
    with (
        atomic_write(out / layout.IMAGE_FEATURES) as features,
        atomic_write(out / layout.IMAGES) as file,
        pq.ParquetWriter(file, pa.schema([("location", pa.string()), ("digest", pa.string())])) as writer,
    ):
        _npy_header(features, (images_ok, settings["clip"]["width"]), np.float16)
        for k in range(index.parts):
            ok = _load(out, k, "status") == 0
            features.write(_load(out, k, "image_features")[ok].tobytes())
            locations = [location for location, use in zip(index.locations_of(k), ok, strict=True) if use]
            digests = [digest.tobytes().hex() for digest in _load(out, k, "digests")[ok]]
            content["locations"].update("".join(f"{location}\0" for location in locations).encode())
            content["digests"].update("".join(digests).encode())
            if locations:
                writer.write_table(pa.table([locations, digests], schema=writer.schema))

    image_features = np.load(out / layout.IMAGE_FEATURES, mmap_mode="r", allow_pickle=False)
    shortened = 0
    with (
        atomic_write(out / layout.SENTENCE_FEATURES) as sentences,
        atomic_write(out / layout.SIMILARITY) as similarity,
        atomic_write(out / layout.CAPTIONS) as file,
        pq.ParquetWriter(file, pa.schema([("image", pa.int64()), ("caption", pa.string())])) as writer,
    ):
        _npy_header(sentences, (pairs, settings["sentence_model"]["width"]), np.float16)
        _npy_header(similarity, (pairs,), np.float32)
        for k, keep in enumerate(keeps):
            image, captions = index.pairs_of(k)
            image = row[image[keep]]
            captions = [caption for caption, use in zip(captions, keep, strict=True) if use]
            sentences.write(_load(out, k, "sentence_features")[keep].tobytes())
            texts = _load(out, k, "text_features")[keep].astype(np.float32)
            cosine = np.einsum("nd,nd->n", image_features[image].astype(np.float32), texts)
            similarity.write(cosine.astype(np.float32).tobytes())
            content["images"].update(image.astype("<i8").tobytes())
            content["captions"].update("".join(f"{caption}\0" for caption in captions).encode())
            shortened += int(_load(out, k, "shortened"))
            if captions:
                writer.write_table(pa.table([image, captions], schema=writer.schema))

    counts = {"rows": index.rows, "pairs": pairs, "images": images_ok}
    broken = Counter(REASONS[reason] for reason in status[status > 0].tolist())
    manifest = {
        "kind": "pair store",
        "format": layout.FORMAT,
        "finished": True,
        "fingerprint": store_fingerprint(
            settings, counts, [column.hexdigest() for column in content.values()]
        ),
        "settings": settings,
        "counts": counts,
        # rows of the source: together with counts.pairs they make counts.rows
        "skipped": dict(sorted(skipped.items())),
        "skipped_images": dict(sorted(broken.items())),
        "shortened_for_clip": shortened,
    }
    write_json(out / layout.MANIFEST, manifest)
    log.info("%s: %d pairs of %d images", out, pairs, images_ok)
    for reason, count in sorted(skipped.items()):
        log.info("  skipped, %s: %d", reason, count)


def _load(out: Path, part: int, name: str) -> np.ndarray:
    path = _part_path(out, part)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise GramError(
            f"{path}: expected a part of the store, found {error}; delete it and run the same command again"
        ) from None


def _npy_header(file: Any, shape: tuple[int, ...], dtype: type) -> None:
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
