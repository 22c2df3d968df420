"""JPEG files decoded, resized and cropped on the towers' device: `gram embed --crop-on device`.

Worker processes only read such files, and look at their headers. They decode all other images, as `ImageFiles` does. On
a GPU the decoder is nvJPEG, by way of torchvision. Its pixels differ a little from Pillow's.
"""

from __future__ import annotations

import io
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gram_meta.corpus.loading import to_device
from gram_meta.corpus.places import REASONS, ImageBatch, ImageFiles
from gram_meta.corpus.sources.rows import Place
from gram_meta.errors import GramError, in_one_line
from gram_meta.images import BROKEN, BadImage, decode_image, digest_of, is_plain_jpeg

if TYPE_CHECKING:
    from gram_meta.backbone.clip import Backbone


class EncodedBatch(NamedTuple):
    """What a worker read of a batch of images; all lists have an entry for every image."""

    images: list[bytes | np.ndarray | None]  # a JPEG file, or pixels (3, H, W) uint8; None: not usable
    reasons: list[int]  # indices into `REASONS`; 0: usable
    digests: list[bytes]


class JpegFiles(ImageFiles):
    """As `ImageFiles`, but leaves ordinary JPEG files to a `DeviceDecoder`."""

    def read_encoded(self, places: Sequence[Place]) -> EncodedBatch:
        """Read the images at these places; raise as `read`.

        Files and pixels travel by value: a tensor in shared memory would cost an open file each.
        """
        return EncodedBatch(*self.read_each(places, self._encoded))

    def _encoded(self, place: Place) -> tuple[bytes | np.ndarray, bytes]:
        content = self.reader.content(place)
        image = content if is_plain_jpeg(content) else self.transform(decode_image(content)).numpy()
        return image, digest_of(content)


class DeviceDecoder:
    """Turns what workers read into pixels on the device of `backbone`, of its image tower's size."""

    def __init__(self, backbone: Backbone) -> None:
        self.transform: Callable[[Any], Tensor] = backbone.preprocess(as_bytes=True, on_tensors=True)
        self.device = backbone.device

    def decode(self, batch: EncodedBatch) -> ImageBatch:
        """Return the pixels of the usable images; if the decoder refuses a file, Pillow reads all of its batch."""
        images, reasons, digests = batch
        jpegs = {index: image for index, image in enumerate(images) if isinstance(image, bytes)}
        of_jpegs = dict(zip(jpegs, self._of_files(list(jpegs.values())), strict=True))
        pixels = []
        for index, image in enumerate(images):
            if isinstance(image, np.ndarray):
                pixels.append(to_device(torch.from_numpy(image), self.device))
            elif (found := of_jpegs.get(index)) is not None:
                pixels.append(found)
            elif image is not None:
                reasons[index], digests[index] = REASONS.index(BROKEN), bytes(len(digests[index]))
        return ImageBatch(torch.stack(pixels) if pixels else None, reasons, digests)

    def _of_files(self, files: Sequence[bytes]) -> Sequence[Tensor | None]:
        """Return the pixels of JPEG files, None for a broken one."""
        try:
            return self._pixels(files)
        except RuntimeError:
            return list(map(self._one_by_pillow, files))

    def _pixels(self, files: Sequence[bytes]) -> list[Tensor]:
        """Return the pixels (3, H, W) of JPEG files; images of equal size are resized together."""
        by_size: dict[torch.Size, list[int]] = defaultdict(list)
        decoded = decode_jpegs(files, self.device)
        for index, image in enumerate(decoded):
            by_size[image.shape].append(index)
        for indices in by_size.values():
            resized = self.transform(torch.stack([decoded[index] for index in indices]))  # (k, 3, H, W)
            for index, image in zip(indices, resized, strict=True):
                decoded[index] = image
        return decoded

    def _one_by_pillow(self, content: bytes) -> Tensor | None:
        try:
            return self.transform(decode_image(content)).to(self.device)
        except BadImage:
            return None


def decode_jpegs(files: Sequence[bytes], device: torch.device) -> list[Tensor]:
    """Return the pixels (3, h, w) uint8 of JPEG files on a device; raise `RuntimeError` if one cannot be decoded."""
    if not files:
        return []
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from 0.29 on torchvision points to TorchCodec
        contents = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in files]
        return list(decode_jpeg(contents, ImageReadMode.RGB, device=device))


def check_decoder(device: torch.device | str) -> None:
    """Raise `GramError` if torchvision cannot decode JPEG files on a device."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        decode_jpegs([file.getvalue()], torch.device(device))
    except Exception as error:  # noqa: BLE001 - an older or newer torchvision, or one without nvJPEG: each fails its own way
        raise GramError(
            f"--crop-on device: expected a torchvision that decodes JPEG files on {device}, found "
            f"{in_one_line(error)}; use --crop-on tensors"
        ) from None
