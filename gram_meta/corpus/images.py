"""Image files of every kind and condition, decoded to RGB."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 89_478_485  # Pillow's own limit for a decompression bomb, a quarter of a gigabyte as RGB
MAX_BYTES = 512 << 20
MAX_ASPECT = 10  # of longer strips the middle is taken: resized by their short side they would be enormous

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


def read_image(path: str | os.PathLike[str]) -> tuple[Image.Image, bytes]:
    """Return an image file as upright 8-bit RGB, and the digest of its content.

    Applies the EXIF orientation, scales 16-bit and float grey to 8 bits, puts transparent images on white, and takes
    the first frame of an animation.

    Raises:
        BadImage: with its reason.
    """
    content = file_content(Path(path))
    return decode_image(content), digest_of(content)


def file_content(path: Path) -> bytes:
    """Return the bytes of an image file.

    Raises:
        BadImage: no such file, an empty one, or one that is too large to be a photograph.
    """
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise BadImage(BOMB)
        content = path.read_bytes()
    except (OSError, ValueError):  # nothing there, a folder, no permission, a name that is too long
        raise BadImage(MISSING) from None
    if not content:
        raise BadImage(EMPTY)
    return content


def digest_of(content: bytes) -> bytes:
    """Return a digest (16 bytes) of the content of an image file."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def decode_image(content: bytes) -> Image.Image:
    """Return the content of an image file as upright 8-bit RGB, as `read_image` describes it; raise `BadImage`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged metadata and of large images
        try:
            image = Image.open(io.BytesIO(content))
        except Image.DecompressionBombError:
            raise BadImage(BOMB) from None
        except Image.UnidentifiedImageError:
            raise BadImage(NOT_IMAGE) from None
        except Exception:  # noqa: BLE001 - damaged headers: each decoder of Pillow raises its own errors
            raise BadImage(BROKEN) from None
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(BOMB)
        try:
            image.load()
            return as_rgb(image)
        except Exception:  # noqa: BLE001 - truncated or damaged pixels, likewise
            raise BadImage(BROKEN) from None


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image as upright 8-bit RGB, as `read_image` describes it."""
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - damaged EXIF: the pixels may still be good
        pass
    if image.mode != "RGB":
        image = _to_rgb(image)
    if max(image.size) > MAX_ASPECT * min(image.size):
        image = _cut_strip(image)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_grey(np.asarray(image))
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _deep_grey(values: np.ndarray) -> Image.Image:
    """Return grey of more than 8 bits as RGB; Pillow's own conversion clips it to white."""
    values = np.nan_to_num(values.astype(np.float32))
    top = float(values.max(initial=0.0))
    full = 1.0 if top <= 1 else 255.0 if top <= 255 else 65535.0 if top <= 65535 else top
    return Image.fromarray((values.clip(0, full) * (255.0 / full)).round().astype(np.uint8)).convert("RGB")


def _cut_strip(image: Image.Image) -> Image.Image:
    width, height = image.size
    w, h = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h))
