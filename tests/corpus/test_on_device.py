"""Images that are resized as tensors or on the device: the same images and reasons, nearly the same pixels."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers.corpora import encoded
from PIL import Image

from gram_meta import images
from gram_meta.api import embed
from gram_meta.cli import main
from gram_meta.corpus import on_device
from gram_meta.corpus.embedding.run import embed_pairs
from gram_meta.corpus.embedding.sentences import load_sentence_model
from gram_meta.corpus.loading import run_ahead
from gram_meta.corpus.on_device import DeviceDecoder, JpegFiles, check_decoder
from gram_meta.corpus.places import REASONS, ImageFiles, ImageReader, Place
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError

pytestmark = pytest.mark.usefixtures("one_thread", "no_waiting_for_the_disk")

jpeg = partial(encoded, kind="JPEG")
TURNED = {0x0112: 6}  # EXIF: a quarter turn


def photo(seed, size=(90, 60), mode="RGB"):
    """A smooth picture: JPEG decoders agree on it."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def exif(tags):
    made = Image.Exif()
    made.update(tags)
    return made


FILES = {
    "a.jpg": jpeg(photo(1)),
    "grey.jpg": jpeg(photo(2, (70, 70), "L")),
    "same size.jpg": jpeg(photo(3)),
    "progressive.jpg": jpeg(photo(4, (64, 120)), progressive=True),
    "turned.jpg": jpeg(photo(5), exif=exif(TURNED)),
    "strip.jpg": jpeg(photo(6, (400, 20))),
    "four colours.jpg": jpeg(photo(7, mode="CMYK")),
    "other.png": encoded(photo(8)),
    "cut.jpg": jpeg(photo(9))[:-300],
    "empty.jpg": b"",
    "text.jpg": b"<html>not found</html>",
}
PLAIN = {"a.jpg", "grey.jpg", "same size.jpg", "progressive.jpg"}
BAD = {"cut.jpg", "empty.jpg", "text.jpg", "gone.jpg"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, bytes_ in FILES.items():
        (folder / name).write_bytes(bytes_)
    lines = [f"{name}\ta {name.split('.')[0]} photo" for name in (*FILES, "gone.jpg")]
    (folder / "pairs.tsv").write_text("\n".join(["image\tcaption", *lines]) + "\n")
    return folder


def test_only_ordinary_jpegs_are_left_to_the_device():
    assert {name for name, bytes_ in FILES.items() if images.is_plain_jpeg(bytes_)} == PLAIN
    assert images.is_plain_jpeg(FILES["a.jpg"] + bytes(7))  # some cameras fill up a block


@pytest.mark.parametrize("workers", [0, 1])
def test_pixels_are_nearly_those_of_pillow_and_the_rest_is_equal(folder, backbone, workers):
    places = [Place(name) for name in (*FILES, "gone.jpg")]
    expected = ImageFiles(ImageReader(folder), backbone.preprocess(as_bytes=True)).read(places)
    given = ImageReader(folder), backbone.preprocess(as_bytes=True, on_tensors=True)
    (encoded,) = run_ahead(JpegFiles(*given).read_encoded, [places], workers, "")
    assert {
        place.location for place, image in zip(places, encoded.images, strict=True) if isinstance(image, bytes)
    } == PLAIN
    found = DeviceDecoder(backbone).decode(encoded)
    assert found.reasons == expected.reasons and found.digests == expected.digests
    assert {place.location for place, reason in zip(places, found.reasons, strict=True) if reason} == BAD
    assert found.images.shape == expected.images.shape and found.images.dtype == torch.uint8
    assert 0 < (found.images.int() - expected.images.int()).abs().max() <= 1  # libjpeg again, another resizing
    assert torch.equal(found.images, ImageFiles(*given).read(places).images)


def test_one_file_that_the_decoder_refuses_does_not_cost_the_others(folder, backbone):
    given = ImageReader(folder), backbone.preprocess(as_bytes=True, on_tensors=True)
    places = [Place(name) for name in ("a.jpg", "other.png", "grey.jpg")]
    encoded = JpegFiles(*given).read_encoded(places)
    broken = FILES["a.jpg"][:100] + FILES["a.jpg"][-2:]
    encoded.images.append(broken)  # its header is good
    encoded.reasons.append(0)
    encoded.digests.append(images.digest_of(broken))
    found = DeviceDecoder(backbone).decode(encoded)
    assert [REASONS[reason] for reason in found.reasons] == ["", "", "", images.BROKEN]
    assert [any(digest) for digest in found.digests] == [True, True, True, False]
    assert torch.equal(found.images, ImageFiles(*given).read(places).images)  # Pillow's


def test_batches_without_a_jpeg_or_without_any_image(folder, backbone):
    files, decoder = JpegFiles(ImageReader(folder), backbone.preprocess(as_bytes=True)), DeviceDecoder(backbone)
    assert decoder.decode(files.read_encoded([Place("other.png")])).images.shape == (1, 3, 32, 32)
    assert decoder.decode(files.read_encoded([Place("gone.jpg")])).images is None


def test_a_store_says_how_its_images_were_cropped(folder, backbone, tmp_path):
    model = load_sentence_model("hash:16")
    stores = {
        on: embed_pairs(folder / "pairs.tsv", tmp_path / on, backbone, model, batch_size=4, crop_on=on)
        for on in ("images", "tensors", "device")
    }
    assert {on: store.manifest["settings"].get("crop_on") for on, store in stores.items()} == {
        "images": None,
        "tensors": "tensors",
        "device": "device",
    }
    assert [store.crops_tensors for store in stores.values()] == [False, True, True]
    by_pillow, tensors, device = (store.image_features.astype(np.float32) for store in stores.values())
    assert len(by_pillow) == len(FILES) + 1 - len(BAD)
    assert (by_pillow * tensors).sum(1).min() > 0.999 and not np.array_equal(by_pillow, tensors)
    assert np.abs(device - tensors).max() < 1e-3  # the same pixels, in other batches of one tower
    for on, other in (("images", "device"), ("device", "images")):
        with pytest.raises(GramError, match=f"was begun with crop on '{on}', expected the same, found '{other}'"):
            embed_pairs(folder / "pairs.tsv", tmp_path / on, backbone, model, batch_size=4, crop_on=other)
    with pytest.raises(GramError, match="crop_on: expected images, tensors or device, found 'gpu'"):
        embed(folder / "pairs.tsv", tmp_path / "new", backbone=backbone.model, crop_on="gpu")
    assert not (tmp_path / "new").exists()


def test_the_command_decodes_on_the_device_or_says_that_it_cannot(folder, tmp_path, monkeypatch, capsys):
    words = ["embed", str(folder / "pairs.tsv"), "-o", str(tmp_path / "s"), "--backbone", "gram-small"]
    words += ["--sentence-model", "hash:16", "--crop-on", "device", "--device", "cpu"]

    def refuse(*args, **options):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    with monkeypatch.context() as patch:
        patch.setattr("torchvision.io.decode_jpeg", refuse)
        assert main(words) == 2
    assert "decodes JPEG files on cpu, found decode_jpegs_cuda" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    assert main(words) == 0
    store = PairStore.open(tmp_path / "s")
    assert len(store) == len(FILES) + 1 - len(BAD) and store.manifest["settings"]["crop_on"] == "device"


def test_the_decoder_is_tried_once_on_a_made_up_file(monkeypatch):
    check_decoder("cpu")
    monkeypatch.setattr(on_device, "decode_jpegs", lambda files, device: 1 / 0)
    with pytest.raises(GramError, match="expected a torchvision that decodes JPEG files on cpu, found division"):
        check_decoder("cpu")
