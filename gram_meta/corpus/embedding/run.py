"""From image-text pairs to a store of their features: what `gram embed` does.

The work is cut into parts before it begins (`index`). Each part is one file, written whole or not at all (`parts`), so
a run that was interrupted at any point goes on with the parts that are missing. When all parts are there they are
joined into the store (`joining`). Any number of processes, on any number of machines with a common file system, share
shards and parts; the store is the same.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gram_meta.corpus import store as layout
from gram_meta.corpus.embedding.index import Index, write_index
from gram_meta.corpus.embedding.joining import join_parts
from gram_meta.corpus.embedding.parts import embed_parts, part_path
from gram_meta.corpus.sources import Source, open_source, shards_of
from gram_meta.corpus.store import PairStore, read_manifest
from gram_meta.errors import GramError
from gram_meta.files import PathLike, write_json
from gram_meta.processes import ALONE, ProcessGroup

if TYPE_CHECKING:
    from gram_meta.backbone.clip import Backbone
    from gram_meta.corpus.embedding.sentences import SentenceModel

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
    job: ProcessGroup = ALONE,
) -> PairStore:
    """Embed the pairs of `source` and write them to the folder `out`, or go on where an earlier run stopped.

    Args:
        source: as `open_source` takes it, or a `Source`.
        out: a new or empty folder, or one in which the same run was interrupted (or has finished).
        backbone: gives image features, and the similarity of each image and its caption.
        sentence_model: gives the sentence features that topics are made from.
        batch_size: images, and captions, in one forward pass.
        part_size: pairs per part: what an interruption can lose, and what is held in memory.
        workers: processes that read images, for each process of the job; 0: that one itself.
        progress: show a progress bar.
        job: the processes that share the work, all of which call this with the same arguments; the rows are the same
            for any number of them, and the features are equal byte for byte at equal threads per process.

    Raises:
        GramError: `out` holds something else, or a run with other settings; another process is at work on it;
            no usable pair; no space left.
    """
    for name, value, least in (("batch size", batch_size, 1), ("part size", part_size, 1), ("workers", workers, 0)):
        if value < least:
            raise GramError(f"{name}: expected at least {least}, found {value}")
    source = source if isinstance(source, Source) else open_source(source)
    out = Path(out)
    settings = {
        "source": job.first(source.identity),
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
        with _locked(out) if job.is_first else nullcontext():
            if job.first(lambda: _begin(out, settings)):
                log.info("%s: finished before, nothing to do", out)
                return PairStore.open(out)
            parts = out / layout.PARTS
            index = _index(source, parts, part_size, job, workers, progress)
            missing = job.first(lambda: _missing(index, parts))
            with _Progress(index, missing, job, progress) as bar:
                embed_parts(
                    index,
                    _share(missing, job),
                    source.image_root,
                    parts,
                    backbone,
                    sentence_model,
                    batch_size,
                    workers,
                    bar.tell,
                )
                job.wait(bar.show)
            job.first(lambda: _finish(index, out, settings))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise GramError(f"{out}: no space left on the device; free some and run the same command again") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise GramError(
                f"{error.filename or out}: expected to be allowed to write there ({error.strerror})"
            ) from None
        raise
    return PairStore.open(out)


# --- beginning ----------------------------------------------------------------------------------------------


LOCK = ".lock"
_HELD: set[Path] = set()  # by this process: record locks do not keep a process from itself


def check_free(out: PathLike) -> None:
    """Raises `GramError` when another run is at work on this store, or `out` is something else than a store's folder."""
    out = Path(out)
    _check_folder(out)
    if out.resolve() in _HELD:
        raise GramError(_busy(out))
    if (out / LOCK).exists():
        with open(out / LOCK, "a") as file:
            _lock(file, out)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock goes when the process ends, however it ends.

    A record lock, not `flock`: that one would live on in forked image workers, for seconds after their parent
    was killed.
    """
    _check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    key = out.resolve()
    if key in _HELD:
        raise GramError(_busy(out))
    with open(out / LOCK, "a") as file:
        _lock(file, out)
        _HELD.add(key)
        try:
            yield
        finally:
            _HELD.discard(key)


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise GramError(f"{out}: expected a folder for the store, found a file")
    ours = (out / LOCK).exists() or (out / layout.MANIFEST).exists()
    if out.is_dir() and not ours and any(out.iterdir()):
        raise GramError(f"{out}: expected an empty folder or a pair store, found other files")


def _lock(file: IO[Any], out: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise GramError(_busy(out)) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log.warning("%s: its file system keeps no locks; see to it that no second run writes there", out)


def _busy(out: Path) -> str:
    return f"{out}: another run is at work on this store; wait for it, or choose another folder"


def _begin(out: Path, settings: dict[str, Any]) -> bool:
    """Write the manifest of a new store, or compare with an earlier run's; True when that has finished."""
    for leftover in [*out.glob(".*.part"), *(out / layout.PARTS).rglob(".*.part")]:  # of a run that was killed
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
    _check_shards(manifest["settings"]["source"].get("shards"), settings.get("source", {}).get("shards"), out)
    for name, was, now in _differences(manifest["settings"], settings):
        raise GramError(
            f"{out}: was begun with {name} {was!r}, expected the same, found {now!r}; choose another folder "
            "for new settings"
        )
    return bool(manifest["finished"])


def _check_shards(was: dict[str, int] | None, now: dict[str, int] | None, out: Path) -> None:
    for shard in (was or {}) if now else ():
        if shard not in (now or {}):
            raise GramError(
                f"{out}: was begun with the shard {shard}, which is not there any more; put it back and run the same "
                "command again, or choose another folder for another corpus"
            )


def _differences(was: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in now:
            yield from _differences(was.get(key), now[key], f"{name} {key}".strip().replace("_", " "))
    elif was != now:
        yield name, was, now


def _index(source: Source, parts: Path, part_size: int, job: ProcessGroup, workers: int, progress: bool) -> Index:
    if not (parts / "plan.json").exists():
        log.info("reading %s", source.path)
    index = write_index(shards_of(source), source.image_root, parts, part_size, job, workers, progress)
    skipped = "".join(f", {reason}: {count}" for reason, count in index.skipped.items())
    log.info("%d rows: %d pairs of %d images%s", index.rows, index.pairs, index.images, skipped)
    return index


# --- parts --------------------------------------------------------------------------------------------------


def _missing(index: Index, parts: Path) -> list[int]:
    """The parts that are to be made; the folder is listed, as network file systems remember what was not there."""
    there = {path.name for path in parts.iterdir()}
    missing = [part for part in range(index.parts) if part_path(parts, part).name not in there]
    if len(missing) < index.parts:
        log.info("%s: going on after %d of %d parts", parts.parent, index.parts - len(missing), index.parts)
    return missing


def _share(parts: list[int], job: ProcessGroup) -> list[int]:
    """A process's parts: a run of them, so that it reads whole shards from their beginning to their end.

    A shard on the border of two shares is divided between their processes, part by part.
    """
    return [parts[number] for number in job.share_range(len(parts))]


class _Progress:
    """One bar, in the first process, over the pairs of all; where another process has failed, this one ends here too."""

    EVERY = 0.5  # seconds

    def __init__(self, index: Index, missing: list[int], job: ProcessGroup, shown: bool) -> None:
        from tqdm import tqdm

        self.name = f"pairs of run {next(_RUNS)}"
        self.job = job
        self.done = index.pairs - sum(index.sizes[part] for part in missing)
        self.untold, self.last = 0, 0.0
        self.bar = tqdm(
            total=index.pairs, initial=self.done, unit="pair", disable=not (shown and job.is_first), smoothing=0.05
        )

    def tell(self, pairs: int) -> None:
        """So many pairs more are done here."""
        self.untold += pairs
        if time.monotonic() > self.last + self.EVERY:
            self.show()

    def show(self) -> None:
        done = self.done + self.job.count(self.name, self.untold)
        self.untold, self.last = 0, time.monotonic()
        self.bar.update(done - self.bar.n)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            self.show()
        self.bar.close()


_RUNS = itertools.count()  # every process of a job counts alike


def _finish(index: Index, out: Path, settings: dict[str, Any]) -> None:
    join_parts(index, out, settings)
    index.close()
    shutil.rmtree(out / layout.PARTS)
