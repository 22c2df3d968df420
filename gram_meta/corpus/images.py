"""Image files as they really come, to RGB and to the image tower's input."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

from gram_meta.errors import GramError

if TYPE_CHECKING:
    import torch

    from gram_meta.corpus.places import ImageReader, Place

T = TypeVar("T")

MAX_PIXELS = 89_478_485  # Pillow's own line for a decompression bomb, a quarter of a gigabyte as RGB
MAX_BYTES = 512 << 20
MAX_ASPECT = 10  # longer strips are cut at their middle: resized by their short side they would be enormous

MISSING = "missing file"
EMPTY = "empty file"
NOT_IMAGE = "not an image"
BROKEN = "broken image"
BOMB = "too many pixels"
NOT_FINITE = "features not finite"
# A part file stores indices into this: append only.
REASONS = ("", MISSING, EMPTY, NOT_IMAGE, BROKEN, BOMB, NOT_FINITE)

DIGEST_BYTES = 16


class BadImage(Exception):
    """An image that cannot be used; the message is one of `REASONS`."""


def images_of(loader: Iterable[T], advice: str) -> Iterator[T]:
    """What a `DataLoader` gives; a process of it that died, mostly of memory, is a `GramError` that ends in `advice`."""
    try:
        yield from _told_when_asked(loader)
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        error.__traceback__ = None  # it holds the loader: let go of its other processes now
        raise GramError(f"reading images: a worker process died ({first}); {advice}") from None


def _told_when_asked(loader: Iterable[T]) -> Iterator[T]:
    """An iterator of `loader` that tells of dead workers when it is asked for more, within seconds.

    torch tells of them by a signal as well, whose error comes up in whatever the main thread is doing just then.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return iterator


def read_image(path: str | os.PathLike[str]) -> tuple[Image.Image, bytes]:
    """An image file as upright 8-bit RGB, and a digest (16 bytes) of the file's content.

    Turns by EXIF orientation, scales 16-bit and float grey to 8 bits, lays transparent images on white, takes
    the first frame of an animation.

    Raises:
        BadImage: with its reason.
    """
    return with_digest(file_content(Path(path)))


def file_content(path: Path) -> bytes:
    """The bytes of an image file; raises `BadImage`: not there, empty, or too large to be a photograph."""
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise BadImage(BOMB)
        content = path.read_bytes()
    except (OSError, ValueError):  # nothing there, a folder, no permission, a name too long
        raise BadImage(MISSING) from None
    if not content:
        raise BadImage(EMPTY)
    return content


def with_digest(content: bytes) -> tuple[Image.Image, bytes]:
    """The image in the bytes of a file (`decode_image`), and their digest."""
    return decode_image(content), hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def decode_image(content: bytes) -> Image.Image:
    """The bytes of an image file as upright 8-bit RGB; raises `BadImage`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on damaged metadata and large images
        try:
            image = Image.open(io.BytesIO(content))
        except Image.DecompressionBombError:
            raise BadImage(BOMB) from None
        except Image.UnidentifiedImageError:
            raise BadImage(NOT_IMAGE) from None
        except Exception:  # noqa: BLE001 - damaged headers: each of Pillow's decoders raises its own kinds
            raise BadImage(BROKEN) from None
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(BOMB)
        try:
            image.load()
            return as_rgb(image)
        except Exception:  # noqa: BLE001 - truncated or damaged pixels, likewise
            raise BadImage(BROKEN) from None


def as_rgb(image: Image.Image) -> Image.Image:
    """An opened image as upright 8-bit RGB, as `read_image` has it."""
    return _cut_strip(_to_rgb(_upright(image)))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - damaged EXIF says nothing about the pixels
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_grey(np.asarray(image))
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _deep_grey(values: np.ndarray) -> Image.Image:
    """Grey with more than 8 bits; Pillow's own conversion clips it to white."""
    values = np.nan_to_num(values.astype(np.float32))
    top = float(values.max(initial=0.0))
    full = 1.0 if top <= 1 else 255.0 if top <= 255 else 65535.0 if top <= 65535 else top
    return Image.fromarray((values.clip(0, full) * (255.0 / full)).round().astype(np.uint8)).convert("RGB")


def _cut_strip(image: Image.Image) -> Image.Image:
    width, height = image.size
    if max(width, height) <= MAX_ASPECT * min(width, height):
        return image
    w, h = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h))


# What a worker process sends of an image: bytes (3, H, W) or None, index into `REASONS`, digest of its file; or, of a
# shard that is gone or has changed, the error, as a loader would put its own words for one that is raised there.
Read = tuple["torch.Tensor | None", int, bytes] | GramError


class ImageFiles:
    """Map-style data set: the place of an image -> what is read there. Never raises.

    Args:
        reader: reads an image by its place (`places.ImageReader`).
        transform: image -> tensor.
    """

    def __init__(self, reader: ImageReader, transform: Callable[[Image.Image], Any]) -> None:
        self.reader = reader
        self.transform = transform

    def __getitem__(self, place: Place) -> Read:
        try:
            image, digest = self.reader.image(place)
            return self.transform(image), 0, digest
        except BadImage as error:
            return None, REASONS.index(str(error)), bytes(DIGEST_BYTES)
        except GramError as error:
            return error
        except Exception:  # noqa: BLE001 - a transform that cannot take this image
            return None, REASONS.index(BROKEN), bytes(DIGEST_BYTES)


def collate(items: list[Read]) -> tuple[torch.Tensor | None, list[int], list[bytes]] | GramError:
    """The readable images of a batch stacked (k, 3, H, W) or None, with reasons and digests of all of it; or an error."""
    import torch

    read: list[Any] = []
    for item in items:
        if isinstance(item, GramError):
            return item
        read.append(item)
    images = [image for image, _, _ in read if image is not None]
    return (torch.stack(images) if images else None), [item[1] for item in read], [item[2] for item in read]
