"""gram check-overlap: planted test images are found, others are not, and what was read is not read again."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from gram_meta.cli import main
from gram_meta.corpus.store import PairStore
from gram_meta.tools import overlap

pytestmark = pytest.mark.slow

CLASSES = ("red", "green", "blue", "grey")


def picture(number):
    """A photograph of sorts: smooth structure at several scales, 96 x 72."""
    random = np.random.default_rng(number)
    layers = [
        Image.fromarray(random.integers(0, 256, (size * 3 // 4, size, 3), dtype=np.uint8)).resize(
            (96, 72), Image.Resampling.BICUBIC
        )
        for size in (4, 8, 16, 32)
    ]
    mean = np.mean([np.asarray(layer, np.float32) for layer in layers], axis=0)
    return Image.fromarray(((mean - 128) * 1.8 + 128).clip(0, 255).astype(np.uint8))


CHANGES = {
    "jpeg": lambda image: image,  # saved as such below
    "small": lambda image: image.resize((48, 36)),
    "cropped": lambda image: image.crop((4, 2, 94, 70)),
    "mirrored": ImageOps.mirror,
    "dark": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "bordered": lambda image: ImageOps.expand(image, 8, "white"),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(0.7)),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A root with EmojiFood and EmojiTravel: 4 classes of 3 / 1 / 4 images, pictures 0 to 63."""
    root = tmp_path_factory.mktemp("data")
    number = 0
    for name in ("food", "travel"):
        folder = root / f"emoji_{name}"
        (folder / "images").mkdir(parents=True)
        split = {"train": [], "val": [], "test": []}
        for label, classname in enumerate(CLASSES):
            for part, count in (("train", 3), ("val", 1), ("test", 4)):
                for index in range(count):
                    file = f"{classname}_{part}_{index}.png"
                    picture(number).save(folder / "images" / file)
                    split[part].append([file, label, classname])
                    number += 1
        (folder / f"split_zhou_Emoji{name.title()}.json").write_text(json.dumps(split))
    return root


@pytest.fixture(scope="module")
def corpus(data, tmp_path_factory):
    """A store of 40 pictures of its own, a copy of a test image of EmojiFood, changed ones, and one of its training
    images."""
    folder = tmp_path_factory.mktemp("corpus")
    images = data / "emoji_food" / "images"
    for i in range(40):
        picture(1000 + i).save(folder / f"own_{i}.png")
    shutil.copy(images / "red_test_0.png", folder / "copied.png")
    shutil.copy(images / "blue_train_0.png", folder / "trained.png")
    original = Image.open(images / "green_test_1.png")
    for name, change in CHANGES.items():
        change(original).save(folder / f"{name}.jpg", quality=70)
    names = sorted(path.name for path in folder.iterdir())
    (folder / "pairs.tsv").write_text("image\tcaption\n" + "".join(f"{name}\ta thing\n" for name in names))
    argv = ["embed", folder / "pairs.tsv", "-o", folder / "store", "--backbone", "random-tiny"]
    assert main([*map(str, argv), "--sentence-model", "hash:32", "--device", "cpu"]) == 0
    return folder


def command(corpus, data, out):
    return ["check-overlap", str(corpus / "store"), "--root", str(data), "-o", str(out), "--device", "cpu"]


def check(corpus, data, out, *words):
    if "--pixels-only" not in words:
        words = ("--neighbours", "49", *words)  # a random CLIP does not know what is near
    status = main([*command(corpus, data, out), *words])
    with open(out, newline="", encoding="utf-8") as file:
        return status, list(csv.DictReader(file, delimiter="\t"))


PLANTED = {
    ("copied.png", "red_test_0.png", "exact"),
    *((f"{name}.jpg", "green_test_1.png", "near") for name in CHANGES),
}


def planted(words):
    """Pictures of 8 x 8 pixels do not know an image by its inside."""
    return PLANTED - {("bordered.jpg", "green_test_1.png", "near")} if "--pixels-only" in words else PLANTED


@pytest.mark.parametrize("words", [(), ("--pixels-only",), ("--pixels-too",)], ids=["CLIP", "pixels", "both"])
def test_planted_test_images_are_found(corpus, data, tmp_path, capsys, words):
    status, rows = check(corpus, data, tmp_path / "overlap.tsv", *words)
    assert status == 0
    assert {(row["image"], row["test_image"], row["kind"]) for row in rows} == planted(words)
    assert {row["dataset"] for row in rows} == {"emoji_food"}
    assert all(float(row["distance"]) <= overlap.DISTANCE for row in rows)
    printed = capsys.readouterr().out
    assert f"{len(rows)} of the 49 images" in printed and "--exclude" in printed
    table = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith("emoji_")}
    assert table == {"emoji_food": ["16", "1", "1", "12.50", "%"], "emoji_travel": ["16", "0", "0", "0.00", "%"]}


def test_training_images_are_looked_for_where_asked(corpus, data, tmp_path):
    _, rows = check(corpus, data, tmp_path / "overlap.tsv", "--parts", "train", "--datasets", "emoji_food")
    assert [(row["image"], row["test_image"], row["kind"]) for row in rows] == [
        ("trained.png", "blue_train_0.png", "exact")
    ]


def test_the_status_says_so_where_asked(corpus, data, tmp_path):
    assert check(corpus, data, tmp_path / "overlap.tsv", "--fail")[0] == 1
    assert check(corpus, data, tmp_path / "overlap.tsv", "--fail", "--datasets", "EmojiTravel")[0] == 0


@pytest.mark.parametrize("words", [(), ("--pixels-only",)], ids=["CLIP", "pixels"])
def test_what_was_read_is_not_read_again(corpus, data, tmp_path, monkeypatch, words):
    """An interruption loses a chunk; a changed file, and it alone, is read anew."""
    data = shutil.copytree(data, tmp_path / "data")
    monkeypatch.setattr(overlap, "CHUNK", 8)
    reads, fails = [], []
    real = overlap.small_copy

    def counted(image):
        reads.append(image.size)
        if fails and len(reads) > 20:
            raise KeyboardInterrupt
        return real(image)

    monkeypatch.setattr(overlap, "small_copy", counted)
    fails.append(True)
    assert main([*command(corpus, data, tmp_path / "o.tsv"), "--workers", "1", *words]) == 130
    assert not (tmp_path / "o.tsv").exists()
    fails.clear()
    reads.clear()
    _, rows = check(corpus, data, tmp_path / "o.tsv", *words)
    assert {(row["image"], row["test_image"], row["kind"]) for row in rows} == planted(words)
    after_interruption = len(reads)
    reads.clear()
    again = check(corpus, data, tmp_path / "o.tsv", *words)[1]
    assert again == rows and not reads
    _, fresh = check(corpus, data, tmp_path / "fresh.tsv", *words)
    assert fresh == rows and after_interruption == len(reads) - 16
    picture(5000).save(data / "emoji_travel" / "images" / "red_test_0.png")
    reads.clear()
    assert check(corpus, data, tmp_path / "o.tsv", *words)[1] == rows
    assert 8 <= len(reads) <= 8 + 49  # its chunk, and no more than the corpus for its candidates


def test_a_damaged_cache_is_made_anew(corpus, data, tmp_path):
    _, rows = check(corpus, data, tmp_path / "o.tsv")
    for file in (tmp_path / "o.tsv.cache").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert check(corpus, data, tmp_path / "o.tsv")[1] == rows


def test_images_that_cannot_be_read_are_reported(corpus, data, tmp_path, capsys):
    data = shutil.copytree(data, tmp_path / "data")
    (data / "emoji_food" / "images" / "red_test_1.png").write_bytes(b"no image")
    moved = shutil.copytree(corpus, tmp_path / "moved")
    (moved / "mirrored.jpg").unlink()
    _, rows = check(corpus, data, tmp_path / "o.tsv", "--image-root", str(moved))
    assert {row["image"] for row in rows} == {image for image, *_ in PLANTED} - {"mirrored.jpg"}
    printed = capsys.readouterr().out
    assert "1 test images could not be read" in printed and "1 images of the corpus could not be read" in printed


def test_a_dataset_that_cannot_be_read_is_a_failure(corpus, data, tmp_path, capsys):
    data = shutil.copytree(data, tmp_path / "data")
    (data / "emoji_travel" / "split_zhou_EmojiTravel.json").write_text("{}")
    status, rows = check(corpus, data, tmp_path / "o.tsv")
    assert status == 1 and len(rows) == len(PLANTED)
    assert "not checked: emoji_travel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--datasets", "emoji_fod"], "did you mean"),
        (["--datasets", "emoji_animals"], "split_zhou_EmojiAnimals.json"),
        (["--backbone", "gram-small"], "expected the backbone it was made with, random-tiny"),
        (["--backbone", "no-such"], "--pixels-only needs no CLIP"),
        (["--neighbours", "0"], "--neighbours: expected at least 1"),
        (["--distance", "3"], "--distance: expected a number from 0 to 2"),
        (["--pixels-only", "--backbone", "gram-small"], "found both"),
    ],
)
def test_bad_input_is_one_sentence(corpus, data, tmp_path, capsys, words, says):
    argv = [
        "check-overlap",
        str(corpus / "store"),
        "--root",
        str(data),
        "-o",
        str(tmp_path / "o.tsv"),
        "--device",
        "cpu",
    ]
    assert main([*argv, *words]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert says in printed and not (tmp_path / "o.tsv").exists()


def test_a_root_without_datasets(corpus, tmp_path, capsys):
    assert main(["check-overlap", str(corpus / "store"), "--root", str(tmp_path)]) == 2
    assert "expected a dataset with images, found none" in capsys.readouterr().err


# --- parts ------------------------------------------------------------------------------------------------------------


def test_nearest_in_blocks_is_nearest(monkeypatch):
    random = np.random.default_rng(0)
    corpus, queries = (random.normal(size=(n, 16)).astype(np.float32) for n in (300, 70))
    corpus, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (corpus, queries))
    monkeypatch.setattr(overlap, "QUERY_BLOCK", 32)
    blocks = [(start, corpus[start : start + 7]) for start in range(0, 300, 7)]
    rows, cosines = overlap.nearest_rows(queries, blocks, 300, 10)
    whole = queries @ corpus.T
    assert (rows == np.argsort(-whole, axis=1)[:, :10]).all()
    np.testing.assert_allclose(cosines, -np.sort(-whole, axis=1)[:, :10], atol=1e-6)
    rows, cosines = overlap.nearest_rows(queries, blocks[:1], 7, 10)  # a corpus of fewer
    assert (rows[:, 7:] == -1).all() and (np.sort(rows[:, :7], axis=1) == np.arange(7)).all()


def test_distances():
    one, other = (np.stack([overlap.small_copy(picture(i)) for i in range(a, a + 6)]) for a in (0, 100))
    assert overlap.distances(one, one) == pytest.approx(0, abs=0.02)
    assert overlap.distances(one, one[:, :, ::-1].copy()) == pytest.approx(0, abs=0.02)
    assert overlap.distances(one, (one * 0.6 + 30).astype(np.uint8)) == pytest.approx(0, abs=0.02)
    assert (overlap.distances(one, other) > 0.5).all()
    np.testing.assert_allclose(overlap.distances(one, other), overlap.distances(other, one), atol=1e-5)
    plain = np.full((1, 32, 32, 3), 200, np.uint8)
    assert overlap.distances(plain, plain) == pytest.approx(1)  # nothing to go by: equal files are found otherwise
    assert len(overlap.distances(one[:0], one[:0])) == 0


def test_windows_are_crops():
    """A window of a picture is what the crop of the image looks like, small."""
    import torch

    image = picture(7).resize((320, 320))
    whole = overlap._windows(torch.from_numpy(overlap.small_copy(image)[None]))[0]
    spans = overlap._window_spans()
    assert len(spans) == whole.shape[0] and spans == [*dict.fromkeys(spans)]
    mirrored = {((top, bottom), (round(1 - right, 6), round(1 - left, 6))) for (top, bottom), (left, right) in spans}
    assert mirrored == {((top, bottom), (round(left, 6), round(right, 6))) for (top, bottom), (left, right) in spans}
    for window, ((top, bottom), (left, right)) in zip(whole, spans, strict=True):
        crop = image.crop(tuple(round(320 * x) for x in (left, top, right, bottom)))
        mine = overlap._windows(torch.from_numpy(overlap.small_copy(crop)[None]))[0, 0]
        assert float((mine * window).sum()) > 0.8


def test_the_store_is_a_pair_store(corpus):
    assert len(PairStore.open(corpus / "store").locations) == 49


def test_gram_cluster_takes_the_file(corpus, data, tmp_path):
    """--exclude leaves out the images that were found, each once."""
    _, rows = check(corpus, data, tmp_path / "overlap.tsv")
    store = PairStore.open(corpus / "store")
    excluded = store.rows_of_images(tmp_path / "overlap.tsv")
    assert {store.locations[int(row)] for row in excluded} == {row["image"] for row in rows}
    shorter = tmp_path / "shorter.tsv"  # lines without their last cells, as people write them by hand
    shorter.write_text("image\tdataset\n" + "".join(f"{row['image']}\n" for row in rows))
    assert store.rows_of_images(shorter).tolist() == excluded.tolist()
