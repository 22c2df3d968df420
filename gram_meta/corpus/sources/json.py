"""Captions in JSON: COCO's annotations, Karpathy's splits of COCO and Flickr, and plain lists of records.

COCO       {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
Karpathy   {"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}
records    [{"image": "a.jpg", "caption": "a dog"}], or the same a line each (.jsonl)
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gram_meta.corpus.sources.rows import EMPTY_CAPTION, NO_IMAGE, UNREADABLE, Row, checked
from gram_meta.corpus.sources.tables import CAPTION_COLUMNS, IMAGE_COLUMNS, find_column
from gram_meta.errors import GramError

if TYPE_CHECKING:
    from gram_meta.corpus.sources.source import Source

log = logging.getLogger(__name__)

# Where the images of such a file mostly lie, from its own folder or the one above.
IMAGE_FOLDERS = (
    "",
    "images",
    "Images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    "flickr8k_images",
    "flickr30k_images",
    "flickr30k-images",
    "train2014",
    "val2014",
    "train2017",
    "val2017",
)
TRAIN = ("train", "restval")  # the splits that are taken when none is named
TRIED = 200  # images looked for in each folder
NOTHING: Sequence[Any] = ()


class Record(NamedTuple):
    """An image of a JSON file: its name, the folder that goes before it in COCO, its split, its captions."""

    name: Any
    folder: str
    split: str
    captions: Sequence[Any]


# --- reading ------------------------------------------------------------------------------------------------


def json_kind(path: Path) -> str:
    """`coco`, `karpathy` or `records`: what a JSON file holds.

    Raises:
        GramError: no JSON, or none with captions.
    """
    if path.suffix.lower() == ".jsonl":
        return "records"
    content = _load(path)
    if isinstance(content, list) and content and isinstance(content[0], dict):
        return "records"
    if isinstance(content, dict) and isinstance(images := content.get("images"), list):
        if isinstance(content.get("annotations"), list):
            return "coco"
        if images and isinstance(images[0], dict) and "sentences" in images[0]:
            return "karpathy"
    raise GramError(
        f"{path}: expected captions as in COCO (images, annotations), as in Karpathy's splits (images with sentences) or "
        f"a list of records, found {_described(content)}"
    )


def json_rows(source: Source) -> Iterator[Row]:
    """Rows of a JSON source, image by image in the file's order."""
    for record in records(source.path, source.kind, source.image_column, source.caption_column):
        if not wanted(record.split, source.split):
            continue
        name = placed(record, source.naming)
        if name is None:
            yield Row("", "", NO_IMAGE if record.captions else UNREADABLE)
        elif not record.captions:
            yield Row(name, "", EMPTY_CAPTION)
        else:
            for caption in record.captions:
                yield checked(name, caption) if isinstance(caption, str) else Row(name, "", EMPTY_CAPTION)


def records(
    path: Path, kind: str, image_column: str | None = None, caption_column: str | None = None
) -> Iterator[Record]:
    """The images of a JSON file of a kind; a name of None for what names no image."""
    if kind == "coco":
        return _coco(path)
    if kind == "karpathy":
        return _karpathy(path)
    return _plain(path, image_column, caption_column)


def _coco(path: Path) -> Iterator[Record]:
    content = _load(path)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations")
    ):
        raise GramError(f"{path}: expected COCO's images and annotations, found {_described(content)}")
    captions: dict[Any, list[Any]] = {}
    for annotation in content["annotations"]:
        if isinstance(annotation, dict) and "caption" in annotation and _is_key(annotation.get("image_id")):
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    if not captions:
        raise GramError(
            f"{path}: expected annotations with captions, such as captions_train2017.json, found none with a caption"
        )
    for image in content["images"]:
        if isinstance(image, dict) and _is_key(image.get("id")):
            of_image = captions.pop(image["id"], NOTHING)
            yield Record(image.get("file_name"), "", "", of_image)
        else:
            yield Record(None, "", "", NOTHING)
    for of_image in captions.values():  # of images that the file does not list
        for caption in of_image:
            yield Record(None, "", "", [caption])


def _karpathy(path: Path) -> Iterator[Record]:
    content = _load(path)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise GramError(f"{path}: expected Karpathy's images with sentences, found {_described(content)}")
    for image in images:
        if not isinstance(image, dict):
            yield Record(None, "", "", NOTHING)
            continue
        sentences = image.get("sentences")
        texts = [item.get("raw") if isinstance(item, dict) else item for item in sentences or NOTHING]
        yield Record(image.get("filename"), str(image.get("filepath") or ""), str(image.get("split") or ""), texts)


def _plain(path: Path, image_column: str | None, caption_column: str | None) -> Iterator[Record]:
    image = caption = ""
    for item in _lines(path) if path.suffix.lower() == ".jsonl" else _load(path):
        if not isinstance(item, dict):
            yield Record(None, "", "", NOTHING)
            continue
        if not image:  # the first record says how they are called
            names = list(item)
            image = names[find_column(path, names, image_column, IMAGE_COLUMNS, "image")]
            caption = names[find_column(path, names, caption_column, CAPTION_COLUMNS, "caption")]
        texts = item.get(caption)
        yield Record(item.get(image), "", str(item.get("split") or ""), texts if isinstance(texts, list) else [texts])


def _lines(path: Path) -> Iterator[Any]:
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    yield None


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise GramError(f"{path}: expected JSON, found something else ({error})") from None


def _is_key(value: Any) -> bool:
    return isinstance(value, int | str)


def _described(content: Any) -> str:
    if isinstance(content, dict):
        return f"the keys {', '.join(list(content)[:8])}" if content else "no keys"
    return f"a list of {len(content)}" if isinstance(content, list) else type(content).__name__


# --- splits -------------------------------------------------------------------------------------------------


def choose_split(path: Path, found: Counter[str], given: str | None) -> str | None:
    """The splits to read, separated by commas; None: all, as the file has none.

    What is not named is trained on alone: captions of test images in a meta-corpus are a leak.

    Args:
        found: split -> images. given: as `--split`, `all` for every one; None: train (and restval, which COCO's
            Karpathy split adds to it) where there is one, else all.
    """
    named = {split: count for split, count in found.items() if split}
    if given == "all":
        return None
    if given:
        missing = [split for split in given.split(",") if split not in named]
        if missing:
            has = ", ".join(f"{split} ({count})" for split, count in named.items()) or "none"
            raise GramError(f"{path}: expected the split {missing[0]!r}, found {has}; --split all takes every one")
        return given
    chosen = [split for split in TRAIN if split in named]
    if "train" not in chosen:
        return None
    rest = [split for split in named if split not in chosen]
    if rest:
        log.info("%s: split %s taken, not %s (--split all takes every one)", path, ", ".join(chosen), ", ".join(rest))
    return ",".join(chosen)


def wanted(split: str, chosen: str | None) -> bool:
    """Whether what is of `split` belongs to the splits chosen."""
    return chosen is None or split in chosen.split(",")


# --- where the images are -----------------------------------------------------------------------------------


def placed(record: Record, naming: str | None) -> str | None:
    """The location of a record's image, with or without its own folder before it."""
    if not isinstance(record.name, str) or not record.name:
        return None
    return f"{record.folder}/{record.name}" if record.folder and naming == "filepath" else record.name


def find_images(path: Path, given: Path | None, forms: Mapping[str, Sequence[str]]) -> tuple[Path, str]:
    """The folder that image names start from, and the form of names of which most were found there.

    Looks for some names of each form in `given`, or (None) beside the file and one level above it, and there in the
    folders in which such images mostly lie.

    Raises:
        GramError: none of them is anywhere.
    """
    bases = [given] if given else [path.parent, path.parent.parent]
    folders = [folder for base in bases for name in IMAGE_FOLDERS if (folder := base / name).is_dir()]
    best, most = None, 0
    for folder in dict.fromkeys(folders):
        for form, names in forms.items():
            hits = sum((folder / name).is_file() for name in _some(names))
            if hits > most:
                best, most = (folder, form), hits
    if best is None:
        first = next((name for names in forms.values() for name in names), "")
        tried = ", ".join(str(folder) for folder in bases)
        raise GramError(
            f"{path}: expected its images, such as {first}, below {tried}, found none of {TRIED} that were looked for; "
            "name their folder with --image-root"
        )
    log.info("%s: images are in %s", path, best[0])
    return best[0].resolve(), best[1]


def _some(names: Sequence[str]) -> Iterable[str]:
    """Some names from the whole length of a list, safe to look for."""
    some = names[:: max(1, len(names) // TRIED)][:TRIED]
    return [name for name in some if "\0" not in name and len(name) < 1000]
