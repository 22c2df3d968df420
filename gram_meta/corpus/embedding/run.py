"""From image-text pairs to a store of their features: what `gram embed` does.

The work is cut into parts before it begins (`index`). Each part is one file, which is written whole or not at all
(`parts`), so an interrupted run continues with the missing parts. When all parts exist they are joined into the store
(`joining`). Any number of processes, on any number of machines with a common file system, share shards and parts; the
store is the same.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gram_meta.config import COMMAND_BOUNDS, CROP_ON, check_bounds
from gram_meta.corpus import store as layout
from gram_meta.corpus.embedding.index import PLAN, Index, write_index
from gram_meta.corpus.embedding.joining import join_parts
from gram_meta.corpus.embedding.parts import embed_parts, part_path
from gram_meta.corpus.sources import Source, open_source, shards_of
from gram_meta.corpus.store import PairStore, read_manifest
from gram_meta.errors import GramError, as_gram_error
from gram_meta.files import MARK, PathLike, write_json
from gram_meta.locks import LOCK, only_writer
from gram_meta.processes import ALONE, ProcessGroup, workers_for
from gram_meta.progress import SharedBar

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
    workers: int | None = None,
    crop_on: str = "images",
    progress: bool = False,
    group: ProcessGroup = ALONE,
) -> PairStore:
    """Embed the pairs of `source` and write them to the folder `out`, or continue an interrupted run.

    Args:
        source: as `open_source` takes it, or a `Source`.
        out: a new or empty folder, or one in which the same run was interrupted (or has finished).
        backbone, sentence_model: compute the features.
        batch_size, part_size, crop_on: as for `gram_meta.embed`.
        workers: likewise, of each process of the group.
        group: the processes that share the work, all of which call this with the same arguments; the rows are the same
            for any number of them, and the features are equal byte for byte at equal threads per process.

    Raises:
        GramError: `out` contains something else, or a run with other settings; another process is writing to it;
            no usable pair; no space left.
    """
    check_bounds({"batch size": batch_size, "part size": part_size, "workers": workers}, COMMAND_BOUNDS)
    workers = workers_for(backbone.device) if workers is None else workers
    source = source if isinstance(source, Source) else open_source(source)
    out, parts = Path(out), Path(out, layout.PARTS)
    settings = {
        "source": group.first(source.identity),
        "clip": {
            **{name: getattr(backbone, name) for name in ("name", "fingerprint", "precision")},
            "width": backbone.embed_dim,
        },
        "sentence_model": {name: getattr(sentence_model, name) for name in ("name", "fingerprint", "width")},
        "batch_size": batch_size,
        "part_size": part_size,
        **cropping(crop_on),
    }
    with as_gram_error(out, "cannot be read or written"), only_writer(out, group.is_first):
        if group.first(lambda: _begin(out, settings)):
            log.info("%s: finished before, nothing to do", out)
            return PairStore.open(out)
        if not (parts / PLAN).exists():
            log.info("reading %s", source.path)
        index = write_index(shards_of(source), source.image_root, parts, part_size, group, workers, progress)
        log.info("%s", index.summary())
        missing = group.first(lambda: _missing(index, parts))
        done = index.pairs - sum(index.sizes[part] for part in missing)
        with SharedBar(group, index.pairs, "pair", progress, done) as bar:
            # consecutive parts, so that this process reads whole shards; those at its share's borders part by part
            mine = [missing[number] for number in group.share_range(len(missing))]
            embed_parts(
                index, mine, source.image_root, parts, backbone, sentence_model, batch_size, workers, bar.add, crop_on
            )
            group.wait(bar.show)
        group.first(lambda: join_parts(index, out, settings))
    return PairStore.open(out)


def cropping(on: str) -> dict[str, str]:
    """Return the setting that says what was resized and cropped; stores without it were made with `images`.

    Raises `GramError` for another word than those of `CROP_ON`.
    """
    if on not in CROP_ON:
        raise GramError(f"crop_on: expected {', '.join(CROP_ON[:-1])} or {CROP_ON[-1]}, found {on!r}")
    return {} if on == CROP_ON[0] else {"crop_on": on}


def check_folder(out: PathLike) -> None:
    """Raise `GramError` if `out` is neither a store nor a folder for a new one."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise GramError(f"{out}: expected a folder for the store, found a file")
    of_a_store = (LOCK, MARK, f".{layout.MANIFEST}.")  # before the manifest is written
    new = not (out / layout.MANIFEST).exists()
    if out.is_dir() and new and not all(path.name.startswith(of_a_store) for path in out.iterdir()):
        raise GramError(f"{out}: expected an empty folder or a pair store, found other files")


def _begin(out: Path, settings: dict[str, Any]) -> bool:
    """Write the manifest of a new store, or compare an earlier run's; return whether that has finished."""
    check_folder(out)
    finished = is_finished(out, settings)
    for leftover in (out / layout.PARTS).rglob(".*.part"):  # of a run that was killed
        leftover.unlink()
    if not (out / layout.MANIFEST).exists():
        manifest = {"kind": "pair store", "format": layout.FORMAT, "finished": False, "settings": settings}
        write_json(out / layout.MANIFEST, manifest)
        return False
    if not finished:
        return False
    remove_leftovers(out)
    return True


def remove_leftovers(out: PathLike) -> None:
    """Remove from a finished store what a process that was killed at its very end has left."""
    if any(Path(out, name).exists() for name in (layout.PARTS, LOCK)):
        with only_writer(out):
            shutil.rmtree(Path(out, layout.PARTS), ignore_errors=True)


def is_finished(out: PathLike, settings: dict[str, Any]) -> bool:
    """Return whether `out` contains the finished result of a run with these settings (those that are given).

    Raises `GramError` if it contains a run with other settings.
    """
    out = Path(out)
    if not (out / layout.MANIFEST).exists():
        return False
    manifest = read_manifest(out)
    old_shards, shards = (some.get("source", {}).get("shards") for some in (manifest["settings"], settings))
    if old_shards and shards and (gone := [shard for shard in old_shards if shard not in shards]):
        advice = "put it back, or choose another folder for another corpus"
        raise GramError(f"{out}: was begun with the shard {gone[0]}, which is not there any more; {advice}")
    before, now = ({"crop_on": CROP_ON[0], **some} for some in (manifest["settings"], settings))
    for name, old, new in _differences(before, now):
        if name == "source listing":
            if old is None:  # an earlier version wrote none
                continue
            there = f"the files that were in {now['source']['path']} when it was begun"
            raise GramError(f"{out}: expected {there}, found some added, removed or edited; choose another folder")
        found = f"{name} {old!r}, expected the same, found {new!r}"
        raise GramError(f"{out}: was begun with {found}; choose another folder for new settings")
    return bool(manifest["finished"])


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now:
            yield from _differences(before.get(key), now[key], f"{name} {key}".strip().replace("_", " "))
    elif before != now:
        yield name, before, now


def _missing(index: Index, parts: Path) -> list[int]:
    """Return the parts that do not exist yet; the folder is listed, as network file systems cache missing names."""
    existing = {path.name for path in parts.iterdir()}
    missing = [part for part in range(index.parts) if part_path(parts, part).name not in existing]
    if len(missing) < index.parts:
        log.info("%s: going on after %d of %d parts", parts.parent, index.parts - len(missing), index.parts)
    return missing
