"""Images of datasets: one reader for training, embed, predict and check-data, and what happens to broken files."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from gram_meta import engine
from gram_meta.corpus.images import read_image
from gram_meta.engine.builtin.utils.tools import read_image as read_for_training
from gram_meta.engine.options import extend_cfg
from gram_meta.errors import GramError

RED, BLUE = (200, 10, 10), (10, 10, 200)


def two_colours(mode="RGB"):
    """Left half red, right half blue, 16 x 8."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8], pixels[:, 8:] = RED, BLUE
    return Image.fromarray(pixels).convert(mode)


def deep(dtype, low, high):
    values = np.full((8, 8), low, dtype)
    values[2:6, 2:6] = high
    return Image.fromarray(values)


def turned(path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    two_colours().save(path, exif=exif)


def transparent(path, mode):
    image = Image.new(mode, (8, 8), (10, 20, 30, 0) if mode == "RGBA" else (10, 0))
    image.save(path)


KINDS = {  # name -> (how to write it, the colour at (0, 0), the same under CoOp's reading)
    "16-bit.png": (lambda path: deep(np.uint16, 3000, 40000).save(path), (12,) * 3, (255,) * 3),
    "32-bit.tiff": (lambda path: deep(np.int32, 6000, 65535).save(path), (23,) * 3, (255,) * 3),
    "float.tiff": (lambda path: deep(np.float32, 0.5, 1.0).save(path), (128,) * 3, (0,) * 3),
    "upside-down.png": (lambda path: turned(path, 3), BLUE, RED),
    "mirrored.png": (lambda path: turned(path, 2), BLUE, RED),
    "transparent.png": (lambda path: transparent(path, "RGBA"), (255,) * 3, (10, 20, 30)),
    "grey-alpha.png": (lambda path: transparent(path, "LA"), (255,) * 3, (10,) * 3),
}
ORDINARY = ("RGB", "L", "CMYK")


def loaded(path, as_coop=False):
    """The image as Dassl's loader gives it, from the backend in use."""
    cfg = engine.get_cfg_default()
    extend_cfg(cfg)
    cfg.DATALOADER.COOP_DECODING = as_coop
    return engine.DatasetWrapper(cfg, [SimpleNamespace(impath=str(path), label=0, domain=0)])[0]["img"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_sees_what_embed_and_predict_see(tmp_path, kind):
    write, colour, coops = KINDS[kind]
    write(tmp_path / kind)
    expected, _ = read_image(tmp_path / kind)
    assert expected.getpixel((0, 0)) == colour
    for image in (loaded(tmp_path / kind), read_for_training(tmp_path / kind)):
        assert image.mode == "RGB" and image.size == expected.size and image.tobytes() == expected.tobytes()
    as_coop = loaded(tmp_path / kind, as_coop=True)
    assert as_coop.tobytes() == Image.open(tmp_path / kind).convert("RGB").tobytes()
    assert as_coop.getpixel((0, 0)) == coops


@pytest.mark.parametrize("mode", ORDINARY)
def test_ordinary_jpegs_are_the_same_in_both_readings(tmp_path, mode):
    path = tmp_path / "plain.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path, quality=90)
    theirs = Image.open(path).convert("RGB").tobytes()
    assert loaded(path).tobytes() == loaded(path, as_coop=True).tobytes() == read_image(path)[0].tobytes() == theirs


def test_a_quarter_turn_swaps_the_sides(tmp_path):
    turned(tmp_path / "turned.jpg", 6)
    assert loaded(tmp_path / "turned.jpg").size == (8, 16) and loaded(tmp_path / "turned.jpg", True).size == (16, 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_sentence_also_from_a_worker(tmp_path, workers):
    path = tmp_path / "cut.jpg"
    two_colours().resize((64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:300])
    cfg = engine.get_cfg_default()
    extend_cfg(cfg)
    cfg.DATALOADER.NUM_WORKERS = workers
    item = SimpleNamespace(impath=str(path), label=0, domain=0)
    loader = engine.build_data_loader(cfg, data_source=[item], batch_size=1, is_train=False)
    with pytest.raises(GramError) as error:
        next(iter(loader))
    assert str(error.value) == f"{path}: expected an image, found: broken image"


def test_a_pipe_among_images_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(GramError, match=r"pipe.jpg: expected an image, found: missing file"):
        read_for_training(tmp_path / "pipe.jpg")
