"""The one reader of image files: every kind and condition, decoded to upright 8-bit RGB.

Training, evaluation, `gram embed`, `gram predict` and `gram check-data` read images with it.
"""

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from gram_meta.errors import GramError

MAX_PIXELS = 89_478_485  # Pillow's own limit for a decompression bomb, a quarter of a gigabyte as RGB
MAX_BYTES = 512 << 20
SHOWN = 20  # bad images that a message names
MAX_ASPECT = 10  # of longer strips the middle is taken: resized by their short side they would be enormous

MISSING = "missing file"
EMPTY = "empty file"
NOT_IMAGE = "not an image"
BROKEN = "broken image"
BOMB = "too many pixels"

DIGEST_BYTES = 16


class BadImage(Exception):
    """An image that cannot be used; the message is one of the reasons above."""


class UnreadableImage(GramError):
    """An image file of a dataset that cannot be used; a loader's worker may have raised it."""

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().rpartition("UnreadableImage: ")[2])  # behind a worker's traceback, by torch


_as_coop = ContextVar("as_coop", default=False)
_kept: dict[tuple[str, bool], Image.Image] = {}  # by path and `_as_coop`, of `kept_images`


@contextmanager
def coop_decoding(is_on: bool) -> Iterator[None]:
    """Let `read_rgb` decode as CoOp and Dassl do (DATALOADER.COOP_DECODING): no EXIF turn, deep grey is white."""
    token = _as_coop.set(is_on)
    try:
        yield
    finally:
        _as_coop.reset(token)


@contextmanager
def kept_images(paths: Sequence[str], budget: float, as_coop: bool) -> Iterator[bool]:
    """Decode image files once, in threads; until the block ends `read_rgb` returns these images.

    Processes that are forked in the block share the memory; spawned ones decode for themselves. Yields whether the
    images fit into `budget` bytes; if not, none is kept. A bad image is left to `read_rgb`, which reports it.
    """
    from concurrent.futures import ThreadPoolExecutor

    def decode(path: str) -> Image.Image | None:
        try:
            return decode_image(file_content(Path(path)), as_coop)
        except BadImage:
            return None

    fits, size, rest = True, 0, iter(dict.fromkeys(paths) if budget else ())
    groups = iter(lambda: list(islice(rest, 64)), [])
    try:
        with ThreadPoolExecutor(8) as pool:
            for group in groups:
                decoded = zip(group, pool.map(decode, group), strict=True)
                images = {(path, as_coop): image for path, image in decoded if image is not None}
                _kept.update(images)
                size += 4 * sum(image.width * image.height for image in images.values())  # 4 bytes a pixel
                fits = size <= budget
                if not fits:
                    _kept.clear()
                    break
        yield fits
    finally:
        _kept.clear()


def read_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Return an image file of a dataset as RGB, which must not be changed; raise `UnreadableImage`, which names it."""
    as_coop = _as_coop.get()
    if (os.fspath(path), as_coop) in _kept:
        return _kept[os.fspath(path), as_coop]
    try:
        return decode_image(file_content(Path(path)), as_coop)
    except BadImage as error:
        raise UnreadableImage(f"{path}: expected an image, found: {error}") from None


def read_image(path: str | os.PathLike[str]) -> tuple[Image.Image, bytes]:
    """Return an image file as upright 8-bit RGB, and the digest of its content; raise `BadImage`."""
    content = file_content(Path(path))
    return decode_image(content), digest_of(content)


def digest_of(content: bytes) -> bytes:
    """Return a digest (16 bytes) of the content of an image file."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def find_problems(paths: Iterable[Path], header_only: bool = False, workers: int = 8) -> Iterator[str]:
    """Yield for each image file why it cannot be used, "" if it can, in `workers` threads.

    `header_only`: do not decode, which finds files that are missing, empty or no images.
    """
    from concurrent.futures import ThreadPoolExecutor

    def problem(path: Path) -> str:
        try:
            if header_only:
                _check_size(path)
                _open(path).close()
            else:
                decode_image(file_content(path))
        except BadImage as error:
            return str(error)
        return ""

    size, rest = 100 if header_only else 1, iter(paths)  # a header takes less time than handing it to a thread
    groups = iter(lambda: list(islice(rest, size)), [])
    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(lambda group: list(map(problem, group)), groups):
            yield from found


def list_problems(paths: Sequence[str], problems: Iterable[str], base: Path) -> str:
    """Return which images cannot be used and why, with paths relative to `base`; "" if all can."""
    bad = [f"{os.path.relpath(path, base)} ({why})" for path, why in zip(paths, problems, strict=True) if why]
    more = f", and {len(bad) - SHOWN} more (gram check-data --deep lists all)" if len(bad) > SHOWN else ""
    listed = ", ".join(bad[:SHOWN]) + more
    return f"{base}: {len(bad)} of {len(paths)} images cannot be used: {listed}" if bad else ""


def file_content(path: Path) -> bytes:
    """Return the bytes of an image file; raise `BadImage` for none, an empty one, or one too large for a photograph."""
    _check_size(path)
    try:
        return path.read_bytes()
    except OSError:
        raise BadImage(MISSING) from None


def _check_size(path: Path) -> None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # nothing there, or a name that is too long
        raise BadImage(MISSING) from None
    if not stat.S_ISREG(found.st_mode):  # a folder; or a pipe, which would be read for ever
        raise BadImage(MISSING)
    if not found.st_size:
        raise BadImage(EMPTY)
    if found.st_size > MAX_BYTES:
        raise BadImage(BOMB)


def decode_image(content: bytes, as_coop: bool = False) -> Image.Image:
    """Return the content of an image file as upright 8-bit RGB; raise `BadImage` with its reason.

    Applies the EXIF orientation, scales 16-bit and float grey to 8 bits, puts transparent images on white, and takes
    the first frame of an animation; `as_coop`: none of these. The pixels of ordinary 8-bit images are the same.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged metadata and of large images
        image = _open(io.BytesIO(content))
        try:
            image.load()
            return image.convert("RGB") if as_coop else as_rgb(image)
        except Exception:  # noqa: BLE001 - truncated or damaged pixels: each decoder of Pillow raises its own errors
            raise BadImage(BROKEN) from None


def _open(source: Any) -> Image.Image:
    """Read the header of an image file (a path or a stream)."""
    try:
        image = Image.open(source)
    except Image.DecompressionBombError:
        raise BadImage(BOMB) from None
    except Image.UnidentifiedImageError:
        raise BadImage(NOT_IMAGE) from None
    except Exception:  # noqa: BLE001 - damaged headers, likewise
        raise BadImage(BROKEN) from None
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(BOMB)
    if image.format == "EPS":  # a program, which Pillow has Ghostscript run
        raise BadImage(NOT_IMAGE)
    return image


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image as upright 8-bit RGB, as `decode_image` describes it."""
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - damaged EXIF: the pixels may still be good
        pass
    if image.mode != "RGB":
        image = _to_rgb(image)
    return _cut_strip(image) if _is_strip(image) else image


def is_read_otherwise(path: str) -> bool:
    """Return whether CoOp's own reader, `coop_decoding`, gives other pixels of an image file, by its header."""
    try:
        with _open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            return turned or _is_deep(image) or _is_transparent(image) or _is_strip(image)
    except Exception:  # noqa: BLE001 - whoever reads the image reports it
        return False


def is_plain_jpeg(content: bytes) -> bool:
    """Return whether every JPEG decoder gives about the pixels of `decode_image`: by the header and the last bytes.

    False for a turned, cut-off or very long image, for other colours than grey and YCbCr, and for what is no JPEG.
    """
    if not content.startswith(b"\xff\xd8") or not content.rstrip(b"\0").endswith(b"\xff\xd9"):
        return False
    try:
        with _open(io.BytesIO(content)) as image:
            usual = image.format == "JPEG" and image.mode in ("RGB", "L") and image.info.get("adobe_transform", 1) == 1
            return usual and image.getexif().get(ExifTags.Base.Orientation, 1) == 1 and not _is_strip(image)
    except Exception:  # noqa: BLE001 - whoever decodes the image reports it
        return False


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _is_transparent(image: Image.Image) -> bool:
    return "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info


def _is_strip(image: Image.Image) -> bool:
    return max(image.size) > MAX_ASPECT * min(image.size)


def _to_rgb(image: Image.Image) -> Image.Image:
    if _is_deep(image):
        return _deep_grey(np.asarray(image))
    if _is_transparent(image):
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
