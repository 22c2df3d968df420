"""Fix of how Dassl reads images: B16 (EXIF turns are ignored, 16-bit grey becomes white, transparency black)."""

from __future__ import annotations

import importlib
import os
import tempfile
from typing import Any

from gram_meta.engine.real.fix import Fix, rebind
from gram_meta.images import coop_decoding, read_rgb


def fixes() -> list[Fix]:
    return [Fix("B16", "images are decoded as in gram embed and gram predict", _clips_deep_grey, _replace)]


def _clips_deep_grey() -> bool:
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "deep.png")
        Image.new("I;16", (1, 1), 3000).save(path)
        return importlib.import_module("dassl.utils.tools").read_image(path).getpixel((0, 0)) == (255, 255, 255)


def _replace() -> None:
    rebind(importlib.import_module("dassl.utils.tools").read_image, read_rgb)
    wrapper = importlib.import_module("dassl.data.data_manager").DatasetWrapper
    get = wrapper.__getitem__

    def __getitem__(self: Any, idx: int) -> Any:
        with coop_decoding(self.cfg.DATALOADER.get("COOP_DECODING", False)):
            return get(self, idx)

    wrapper.__getitem__ = __getitem__
