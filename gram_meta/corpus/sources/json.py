"""Captions in JSON: COCO's annotations, Karpathy's splits of COCO and Flickr, and plain lists of records.

COCO       {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
Karpathy   {"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}
records    [{"image": "a.jpg", "caption": "a dog"}], or one such object per line (.jsonl)
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gram_meta.corpus.sources.format import (
    OnePiece,
    Options,
    Peek,
    choose_split,
    existing_file,
    find_images,
    is_chosen,
    load_json,
    open_text,
)
from gram_meta.corpus.sources.rows import EMPTY_CAPTION, NO_IMAGE, UNREADABLE, Row, Source, checked
from gram_meta.corpus.sources.tables import CAPTION_COLUMNS, IMAGE_COLUMNS, find_column
from gram_meta.errors import GramError

NOTHING: Sequence[Any] = ()


class CaptionedImage(NamedTuple):
    """An image of a JSON file: its name (None: it has none), COCO's folder before it, its split, its captions."""

    name: Any
    folder: str = ""
    split: str = ""
    captions: Sequence[Any] = NOTHING

    def location(self, naming: str | None) -> str | None:
        """Return the image's path, with its own folder before it if `naming` is `filepath`; None without a name."""
        if not isinstance(self.name, str) or not self.name:
            return None
        return f"{self.folder}/{self.name}" if self.folder and naming == "filepath" else self.name


class _Captions(OnePiece):
    """A JSON file of images with their captions."""

    name: str
    title: str
    options = frozenset({"image_root"})
    forms: tuple[str, ...] = ("",)  # how image files may be named (`Source.naming`)

    def images(self, path: Path, options: Options) -> Iterator[CaptionedImage]:
        """Yield the images in the file's order."""
        raise NotImplementedError

    def open(self, path: Path, options: Options) -> Source:
        file = existing_file(path, self.title)
        images = list(self.images(file, options))
        split = choose_split(file, Counter(image.split for image in images), options.split)
        chosen = [image for image in images if is_chosen(image.split, split)]
        names = {form: [name for image in chosen if (name := image.location(form))] for form in self.forms}
        root, form = find_images(file, options.image_root, names)
        columns = options.image_column, options.caption_column
        return Source(file, self.name, root, *columns, split=split, naming=form or None)

    def rows(self, source: Source) -> Iterator[Row]:
        for image in self.images(source.path, Options(source.image_column, source.caption_column)):
            if not is_chosen(image.split, source.split):
                continue
            location = image.location(source.naming)
            if location is None:
                yield Row("", "", NO_IMAGE if image.captions else UNREADABLE)
            elif not image.captions:
                yield Row(location, "", EMPTY_CAPTION)
            else:
                for caption in image.captions:
                    is_text = isinstance(caption, str)
                    yield checked(location, caption) if is_text else Row(location, "", EMPTY_CAPTION)


class Coco(_Captions):
    """Images, and annotations that refer to them by `image_id`."""

    name = "coco"
    title = "COCO's captions in JSON"

    def claims(self, path: Path, peek: Peek) -> bool:
        return _has_list(peek.json, "images") and _has_list(peek.json, "annotations")

    def images(self, path: Path, options: Options) -> Iterator[CaptionedImage]:
        content = load_json(path)
        if not _has_list(content, "images") or not _has_list(content, "annotations"):
            raise GramError(f"{path}: expected COCO's images and annotations, found {describe(content)}")
        captions: dict[Any, list[Any]] = {}
        for annotation in content["annotations"]:
            if isinstance(annotation, dict) and "caption" in annotation:
                image_id = annotation.get("image_id")
                captions.setdefault(image_id if _is_key(image_id) else None, []).append(annotation["caption"])
        if not captions:
            raise GramError(f"{path}: expected annotations with captions, as in captions_train2017.json, found none")
        for image in content["images"]:
            if isinstance(image, dict) and _is_key(image.get("id")):
                of_image = captions.pop(image["id"], NOTHING)
                yield CaptionedImage(image.get("file_name"), captions=of_image)
            else:
                yield CaptionedImage(None)
        for of_image in captions.values():  # of images that the file does not list
            for caption in of_image:
                yield CaptionedImage(None, captions=[caption])


class Karpathy(_Captions):
    """Images with their split and their sentences."""

    name = "karpathy"
    title = "Karpathy's splits in JSON"
    options = frozenset({"image_root", "split"})
    forms = ("filepath", "filename")

    def claims(self, path: Path, peek: Peek) -> bool:
        content = peek.json
        first = content["images"][:1] if _has_list(content, "images") else []
        return bool(first) and isinstance(first[0], dict) and "sentences" in first[0]

    def images(self, path: Path, options: Options) -> Iterator[CaptionedImage]:
        content = load_json(path)
        if not _has_list(content, "images"):
            raise GramError(f"{path}: expected Karpathy's images with sentences, found {describe(content)}")
        for image in content["images"]:
            if not isinstance(image, dict):
                yield CaptionedImage(None)
                continue
            sentences = image.get("sentences") or []
            listed = sentences if isinstance(sentences, list) else [sentences]
            texts = [item.get("raw") if isinstance(item, dict) else item for item in listed]
            folder, split = (_text(image.get(key)) for key in ("filepath", "split"))
            yield CaptionedImage(image.get("filename"), folder, split, texts)


class Records(_Captions):
    """Objects with the name of an image and its caption or captions."""

    name = "records"
    title = "JSON records"
    options = frozenset({"image_column", "caption_column", "image_root", "split"})

    def claims(self, path: Path, peek: Peek) -> bool:
        content = peek.json
        return peek.suffix == ".jsonl" or (isinstance(content, list) and bool(content) and isinstance(content[0], dict))

    def images(self, path: Path, options: Options) -> Iterator[CaptionedImage]:
        image = caption = ""
        for item in _json_lines(path) if path.suffix.lower() == ".jsonl" else load_json(path):
            if not isinstance(item, dict):
                yield CaptionedImage(None)
                continue
            if not image:  # the first object shows what the keys are
                keys = list(item)
                image = keys[find_column(path, keys, options.image_column, IMAGE_COLUMNS, "image")]
                caption = keys[find_column(path, keys, options.caption_column, CAPTION_COLUMNS, "caption")]
            texts = item.get(caption)
            captions = texts if isinstance(texts, list) else [texts]
            yield CaptionedImage(item.get(image), "", _text(item.get("split")), captions)


def describe(content: Any) -> str:
    """Return how a message describes the content of a JSON file."""
    if isinstance(content, dict):
        return f"the keys {', '.join(list(content)[:8])}" if content else "no keys"
    return f"a list of {len(content)}" if isinstance(content, list) else type(content).__name__


def _json_lines(path: Path) -> Iterator[Any]:
    with open_text(path) as file:
        for line in file:
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    yield None


def _text(value: Any) -> str:
    return str(value) if value and isinstance(value, str | int | float) else ""


def _has_list(content: Any, key: str) -> bool:
    return isinstance(content, dict) and isinstance(content.get(key), list)


def _is_key(value: Any) -> bool:
    return isinstance(value, int | str)
