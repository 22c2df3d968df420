"""Images of a corpus: the reader of `gram_meta.images`, a digest of each file, and the reasons that a store records."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from PIL import Image

from gram_meta.images import (
    BOMB,
    BROKEN,
    EMPTY,
    MAX_BYTES,
    MISSING,
    NOT_IMAGE,
    BadImage,
    as_rgb,
    decode_image,
    file_content,
)

__all__ = ["BOMB", "BROKEN", "EMPTY", "MAX_BYTES", "MISSING", "NOT_IMAGE"]
__all__ += ["BadImage", "as_rgb", "decode_image", "file_content"]

NOT_FINITE = "features not finite"
# A part file stores indices into this: append only.
REASONS = ("", MISSING, EMPTY, NOT_IMAGE, BROKEN, BOMB, NOT_FINITE)

DIGEST_BYTES = 16


def read_image(path: str | os.PathLike[str]) -> tuple[Image.Image, bytes]:
    """Return an image file as upright 8-bit RGB, and the digest of its content; raise `BadImage`."""
    content = file_content(Path(path))
    return decode_image(content), digest_of(content)


def digest_of(content: bytes) -> bytes:
    """Return a digest (16 bytes) of the content of an image file."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
