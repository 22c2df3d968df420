"""Images of datasets: one reader for training, embed, predict and check-data, and what happens to broken files."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import gram_meta.plugin  # noqa: F401, fills the registries
from gram_meta import engine
from gram_meta.cli import main
from gram_meta.coop import launch
from gram_meta.engine.builtin.utils import read_image as read_for_training
from gram_meta.engine.options import extend_cfg
from gram_meta.errors import GramError
from gram_meta.images import is_read_otherwise, read_image
from gram_meta.trainers import base

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
    assert is_read_otherwise(str(tmp_path / kind))


@pytest.mark.parametrize("mode", ORDINARY)
def test_ordinary_jpegs_are_the_same_in_both_readings(tmp_path, mode):
    path = tmp_path / "plain.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path, quality=90)
    theirs = Image.open(path).convert("RGB").tobytes()
    assert loaded(path).tobytes() == loaded(path, as_coop=True).tobytes() == read_image(path)[0].tobytes() == theirs
    assert not is_read_otherwise(str(path))


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


# --- broken images of a dataset -----------------------------------------------------------------------------


@pytest.fixture
def data(tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data")
    return tmp_path / "data"


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def train(root, out, options, *more):
    flags = ["--root", root, "--seed", 1, "--trainer", "CoOp", "--output-dir", out, *more]
    opts = [
        "DATASET.NAME",
        "EmojiFood",
        "DATASET.NUM_SHOTS",
        2,
        "DATALOADER.NUM_WORKERS",
        0,
        "TRAINER.COOP.PREC",
        "fp32",
    ]
    return launch.train([str(word) for word in (*flags, *opts, *options)], quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("as_coop", [False, True])
def test_a_run_says_which_images_coop_would_read_otherwise(data, tmp_path, tiny_options, as_coop):
    turned(data / "emoji_food/images/red_train_0.png", 3)
    turned(data / "emoji_food/images/red_train_1.png", 3)
    train(data, tmp_path / "out", tiny_options, "DATALOADER.COOP_DECODING", as_coop, "OPTIM.MAX_EPOCH", 1)
    note = "Note: CoOp would read 2 of 8 training images otherwise (EXIF turns"
    assert (note in (tmp_path / "out/log.txt").read_text()) == (not as_coop)


def test_all_broken_images_are_named_before_training(data, tmp_path, tiny_options):
    images = data / "emoji_food/images"
    for name in ("red_train_0.png", "blue_val_0.png", "grey_test_1.png"):
        cut(images / name)
    (images / "red_test_0.png").write_bytes(b"<html>404</html>")
    with pytest.raises(GramError) as error:
        train(data, tmp_path / "out", tiny_options)
    text = str(error.value)
    assert text.startswith(f"{images}: 4 of 20 images cannot be used: ") and text.endswith("; restore them")
    for name in ("red_train_0.png", "blue_val_0.png", "grey_test_1.png"):
        assert f"{name} (broken image)" in text
    assert "red_test_0.png (not an image)" in text
    assert not (tmp_path / "out").exists()


def test_a_test_image_that_turns_out_broken_costs_no_training(data, tmp_path, tiny_options, monkeypatch):
    monkeypatch.setattr("gram_meta.datasets.base.DECODED", 0)  # as of a large test set, whose headers alone are read
    images, out = data / "emoji_food/images", tmp_path / "out"
    whole = {name: (images / name).read_bytes() for name in ("blue_test_0.png", "grey_test_1.png")}
    for name in whole:
        cut(images / name)
    with pytest.raises(GramError) as error:
        train(data, out, tiny_options)
    text = str(error.value)
    assert text.startswith(f"{images}: 2 of 8 images cannot be used: blue_test_0.png (broken image), grey_test_1.png")
    assert f"what was trained is kept in {out}: restore or replace the images, then run the same command again" in text
    trained = (out / "prompt_learner/model.pth.tar-1").read_bytes()
    for name, content in whole.items():
        (images / name).write_bytes(content)
    tested = train(data, tmp_path / "tested", tiny_options, "--eval-only", "--model-dir", out)
    resumed = train(data, out, tiny_options)
    assert tested["metrics"]["total"] == resumed["metrics"]["total"] == 8
    assert tested["metrics"]["accuracy"] == resumed["metrics"]["accuracy"]
    assert (out / "prompt_learner/model.pth.tar-1").read_bytes() == trained


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "when"), [("CoOp", "AT_STEPS (1,)"), ("VPT", "PER_EPOCH True")])
def test_a_broken_image_costs_an_evaluation_on_the_way_alone(data, tmp_path, tiny_options, monkeypatch, trainer, when):
    """Before the first step it ends the run; CoOp begins with a broken image, VPT's breaks after that."""
    monkeypatch.setattr("gram_meta.datasets.base.DECODED", 0)
    image, out, add = data / "emoji_food/images/grey_test_1.png", tmp_path / "out", base.PromptTrainer.add_to_curve
    whole = image.read_bytes()

    def then_broken(trainer, step):
        add(trainer, step)
        cut(image)

    monkeypatch.setattr(base.PromptTrainer, "add_to_curve", then_broken)
    if trainer == "CoOp":
        cut(image)
    key, value = when.split()
    options = (*tiny_options, f"TRAINER.{trainer.upper()}.PREC", "fp32", f"TEST.{key}", value)
    with pytest.raises(GramError, match="1 of 8 images cannot be used: grey_test_1.png .* what was trained is kept"):
        train(data, out, options, "--trainer", trainer)
    printed = f"step 1: not evaluated: {image}: expected an image, found: broken image"
    assert printed in (out / "log.txt").read_text()
    image.write_bytes(whole)
    assert train(data, out, options, "--trainer", trainer)["metrics"]["total"] == 8
    assert (out / "log.txt").read_text().count("epoch [1/1] batch [1/1]") == 1, "it was trained once"
    cut(image)
    with pytest.raises(GramError, match=f"^{image}: expected an image, found: broken image"):
        train(data, tmp_path / "new", (*options, "TEST.AT_STEPS", "(0,)"), "--trainer", trainer)


def test_without_few_shot_a_broken_image_is_named_by_training(data, tmp_path, tiny_options, monkeypatch):
    monkeypatch.setattr("gram_meta.datasets.base.DECODED", 0)
    cut(data / "emoji_food/images/red_train_0.png")
    with pytest.raises(GramError, match=r"red_train_0.png: expected an image, found: broken image"):
        train(data, tmp_path / "out", ("DATASET.NUM_SHOTS", -1, *tiny_options))


def own_folder(root):
    for label, name in enumerate(("apple", "banana")):
        (root / "mine" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (32, 32), (90 * label, 10 * number, 0)).save(root / "mine" / name / f"{number}.png")
    return root / "mine"


def test_after_removing_a_broken_image_the_way_on_is_named(tmp_path, tiny_options):
    folder, options = own_folder(tmp_path), ("DATASET.NAME", "ImageFolder", "DATASET.FOLDER", "mine", *tiny_options)
    train(tmp_path, tmp_path / "first", options)
    split = json.loads((folder / "split.json").read_text())
    for path in (folder / split["train"][0][0], folder / split["test"][0][0]):
        cut(path)
    way = f"restore them, or remove them and split.json and split_fewshot in {folder}, which are then made anew"
    (folder / "split_fewshot/shot_2-seed_1.json").unlink()
    (folder / "split_fewshot/shot_2-seed_1.pkl").unlink()
    with pytest.raises(GramError) as error:
        train(tmp_path, tmp_path / "out", ("DATASET.NUM_SHOTS", 5, *options))
    assert "2 of 20 images cannot be used" in str(error.value) and str(error.value).endswith(way)
    for path in (split["train"][0][0], split["test"][0][0]):
        (folder / path).unlink()
    with pytest.raises(GramError, match=r"split.json names this image, found no such file \(2 of ") as error:
        train(tmp_path, tmp_path / "out", options)
    assert str(error.value).endswith(way)
    (folder / "split.json").unlink()
    shutil.rmtree(folder / "split_fewshot")
    assert train(tmp_path, tmp_path / "out", options)["metrics"]["total"] == 5


def test_pipes_and_dangling_links_among_images_do_not_hang(tmp_path, tiny_options):
    folder = own_folder(tmp_path)
    os.mkfifo(folder / "apple/pipe.png")
    (folder / "apple/link.png").symlink_to("nowhere.png")
    assert main(["check-data", str(tmp_path), "--datasets", "mine", "--deep"]) == 1
    with pytest.raises(GramError, match=r"(pipe|link).png: .* names this image, found no such file \(2 of 15"):
        train(tmp_path, tmp_path / "out", ("DATASET.NAME", "ImageFolder", "DATASET.FOLDER", "mine", *tiny_options))


def test_links_to_folders_and_images_are_followed(tmp_path, tiny_options):
    own_folder(tmp_path / "elsewhere")
    (tmp_path / "mine").symlink_to(tmp_path / "elsewhere/mine")
    image = tmp_path / "mine/apple/0.png"
    image.rename(tmp_path / "kept.png")
    image.symlink_to(tmp_path / "kept.png")
    options = ("DATASET.NAME", "ImageFolder", "DATASET.FOLDER", "mine", *tiny_options)
    assert train(tmp_path, tmp_path / "out", options)["metrics"]["total"] == 6


@pytest.mark.parametrize("outer", ["/etc/passwd.png", "../secret.png", "apple/../../secret.png"])
def test_paths_outside_the_folder_are_refused_unless_allowed(tmp_path, tiny_options, outer):
    folder = own_folder(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "secret.png")
    outer = outer.replace("/etc/passwd.png", str(tmp_path / "secret.png"))
    rows = [[f"{name}/{n}.png", label, name] for label, name in enumerate(("apple", "banana")) for n in range(3)]
    split = {"train": rows, "test": [*rows, [outer, 0, "apple"]]}
    (folder / "split.json").write_text(json.dumps(split))
    options = ("DATASET.NAME", "ImageFolder", "DATASET.FOLDER", "mine", *tiny_options)
    with pytest.raises(GramError, match=r"found .*secret.png \(1 of 13 lead outside, which only DATASET.OUTSIDE_ROOT"):
        train(tmp_path, tmp_path / "out", options)
    assert main(["check-data", str(tmp_path), "--datasets", "mine"]) == 1
    result = train(tmp_path, tmp_path / "out", ("DATASET.OUTSIDE_ROOT", True, *options))
    assert result["metrics"]["total"] == 7
