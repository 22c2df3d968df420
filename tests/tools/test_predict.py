"""`gram predict` and its Python: what a trainer's own evaluation computes, for files as they really come."""

import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.training import meta_of, train_flags
from PIL import Image

import gram_meta.plugin  # noqa: F401, fills the registries
from gram_meta.backbone.clip import load_backbone
from gram_meta.cli import main
from gram_meta.coop import launch
from gram_meta.engine import TRAINER_REGISTRY
from gram_meta.errors import GramError
from gram_meta.method.checkpoint import MetaCheckpoint, save_meta_checkpoint
from gram_meta.method.prompts import initial_prompts
from gram_meta.runs.reader import read_classes, read_saved
from gram_meta.tools import predict as module
from gram_meta.tools.predict import Predictor, default_batch_size, find_images

pytestmark = pytest.mark.usefixtures("one_loading")

NODES = {"CoCoOp": "COCOOP", "CoCoOpGRAM": "COCOOP", "VPT": "VPT", "VPTGRAM": "VPT"}
NODES |= {"JointPrompt": "JOINT", "UniGRAM": "JOINT"}
TOKENS = {"CoOpGRAM": (4, 0), "CoCoOpGRAM": (4, 0), "VPTGRAM": (0, 4), "UniGRAM": (2, 2)}
CASES = {
    "ZeroshotCLIP": (),
    "CoOp": ("TRAINER.COOP.CTX_INIT", "a photo of a"),
    "CoOp csc": ("TRAINER.COOP.CSC", "True", "TRAINER.COOP.N_CTX", "3"),
    "CoOp middle": ("TRAINER.COOP.CLASS_TOKEN_POSITION", "middle", "TRAINER.COOP.N_CTX", "4"),
    "CoOp csc front": (
        *("TRAINER.COOP.CSC", "True", "TRAINER.COOP.N_CTX", "2"),
        *("TRAINER.COOP.CLASS_TOKEN_POSITION", "front"),
    ),
    "CoCoOp": ("TRAINER.COCOOP.CTX_INIT", "a photo of a"),
    "VPT": ("TRAINER.VPT.CTX_INIT", "a drawing of the"),
    "JointPrompt": (),
    "CoOpGRAM": ("TRAINER.COOP.CTX_INIT", "a photo of a"),
    "CoCoOpGRAM": ("TRAINER.COCOOP.CTX_INIT", "a photo of a"),
    "VPTGRAM": (),
    "UniGRAM": (),
}


@pytest.fixture(scope="module")
def metas(backbone, tmp_path_factory):
    """A meta-checkpoint for every GRAM trainer."""
    folder = tmp_path_factory.mktemp("meta")
    for trainer, (text, visual) in TOKENS.items():
        template = {"PROMPT": {"TEMPLATE": "a picture of {}!"}}
        meta = meta_of(backbone, text, visual, conditional=trainer == "CoCoOpGRAM", seed=3, config=template)
        save_meta_checkpoint(folder / f"{trainer}.safetensors", meta)
    return folder


def flags(case, data, out, metas, *opts):
    trainer = case.split()[0]
    if trainer in TOKENS:
        opts = (*opts, "TRAINER.GRAM.CHECKPOINT", metas / f"{trainer}.safetensors")
    options = """MODEL.BACKBONE.NAME random-tiny INPUT.SIZE (32,32) INPUT.INTERPOLATION bicubic
        INPUT.TRANSFORMS ('random_flip','normalize') INPUT.PIXEL_MEAN [0.5,0.4,0.3]
        INPUT.PIXEL_STD [0.26862954,0.26130258,0.27577711] DATASET.NUM_SHOTS 2 DATALOADER.TRAIN_X.BATCH_SIZE 4
        DATALOADER.NUM_WORKERS 0 OPTIM.NAME sgd OPTIM.LR 0.5 OPTIM.MAX_EPOCH 2 TRAIN.CHECKPOINT_FREQ 1""".split()
    precision = (f"TRAINER.{NODES.get(trainer, 'COOP')}.PREC", "fp32")
    return train_flags(data, out, trainer, *options, *precision, *CASES.get(case, ()), *opts)


@pytest.fixture(scope="module")
def runs(tiny_data, metas, tmp_path_factory):
    """runs(case): the folder of a finished run, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")

    def run(case):
        out = folder / case.replace(" ", "_")
        if not out.exists():
            launch.train(flags(case, tiny_data, out, metas), quiet=True)
        return out

    return run


@pytest.fixture
def test_images(tiny_data):
    """(path, class name) of the test split, in its order."""
    folder = tiny_data / "emoji_food"
    split = json.loads((folder / "split_zhou_EmojiFood.json").read_text())
    return [(str(folder / "images" / file), name) for file, _, name in split["test"]]


@pytest.fixture
def image(test_images):
    return test_images[0][0]


def table(text):
    return list(csv.DictReader(text.splitlines()))


# ----------------------------------------------------------------------------------- equal to the trainers' evaluation


@pytest.mark.parametrize("case", CASES)
def test_probabilities_are_those_of_the_trainers_own_evaluation(case, runs, tiny_data, metas, test_images, tmp_path):
    run = runs(case)
    rows = Predictor.load(run)([path for path, _ in test_images])

    args = launch.build_parser().parse_args(flags(case, tiny_data, tmp_path, metas))
    trainer = TRAINER_REGISTRY.get(case.split()[0])(launch.setup_cfg(args))
    if case != "ZeroshotCLIP":
        trainer.load_model(str(run))
    trainer.set_model_mode("eval")
    with torch.no_grad():
        expected = torch.cat([trainer.model_inference(batch["img"]) for batch in trainer.test_loader]).softmax(1)
    np.testing.assert_allclose([row.probabilities for row in rows], expected.numpy(), atol=2e-7)
    assert rows[0].classnames == trainer.dm.dataset.classnames

    right = sum(row.classname == name for row, (_, name) in zip(rows, test_images, strict=True))
    metrics = json.loads((run / "results.json").read_text())["metrics"]
    assert (right, len(rows)) == (metrics["correct"], metrics["total"])


def test_no_dataset_is_needed(runs, tiny_data, image, tmp_path):
    """With the run's folder alone, moved, and the images somewhere else."""
    shutil.copytree(runs("CoOpGRAM"), tmp_path / "run")
    shutil.copy(image, tmp_path / "a.png")
    config = json.loads((tmp_path / "run" / "results.json").read_text())
    config["config"]["DATASET"]["ROOT"] = "/nowhere"
    (tmp_path / "run" / "results.json").write_text(json.dumps(config))
    (row,) = Predictor.load(tmp_path / "run")(tmp_path / "a.png")
    (same,) = Predictor.load(runs("CoOpGRAM"))(image)
    assert np.array_equal(row.probabilities, same.probabilities)
    assert row.classname in ("red", "green", "blue", "grey") and row.probability == row.top(1)[0][1]


def test_images_are_decoded_as_in_the_run(runs, tmp_path):
    """CoOp's decoding leaves a picture on its side, and takes 16-bit grey for white."""
    shutil.copytree(runs("ZeroshotCLIP"), tmp_path / "coop")
    path = tmp_path / "coop" / "results.json"
    results = json.loads(path.read_text())
    results["config"]["DATALOADER"]["COOP_DECODING"] = True
    path.write_text(json.dumps(results))
    grey = Image.fromarray(np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16))
    grey.save(tmp_path / "deep.png")
    grey.convert("RGB").save(tmp_path / "white.png")
    coop, ours = Predictor.load(tmp_path / "coop"), Predictor.load(runs("ZeroshotCLIP"))
    deep, white = tmp_path / "deep.png", tmp_path / "white.png"
    for source in (deep, Image.open(deep)):
        assert np.array_equal(coop(source)[0].probabilities, ours(white)[0].probabilities)
        assert not np.array_equal(ours(source)[0].probabilities, ours(white)[0].probabilities)


def test_an_epoch_can_be_chosen_and_the_last_is_the_default(runs, image, capsys):
    run = runs("CoOp")
    first, last = (Predictor.load(run, epoch=epoch) for epoch in (1, None))
    assert (first.saved.epoch, last.saved.epoch) == (1, 2)
    assert not np.allclose(first(image)[0].probabilities, last(image)[0].probabilities, atol=1e-6)
    file = Predictor.load(run / "prompt_learner" / "model.pth.tar-1")
    assert np.array_equal(file(image)[0].probabilities, first(image)[0].probabilities)
    assert main(["predict", "--model-dir", str(run), "--load-epoch", "7", image]) == 2
    assert "epoch 7" in (printed := capsys.readouterr().err) and "1, 2" in printed


def test_a_run_without_results_says_its_options_elsewhere(runs, image, tmp_path):
    expected = Predictor.load(runs("CoOp middle"))(image)[0].probabilities
    shutil.copytree(runs("CoOp middle"), tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    assert np.array_equal(Predictor.load(tmp_path / "run")(image)[0].probabilities, expected)  # run.json
    (tmp_path / "run" / "run.json").unlink()
    assert np.array_equal(Predictor.load(tmp_path / "run")(image)[0].probabilities, expected)  # log.txt


def test_an_evaluation_is_its_runs_prompts_on_its_own_classes(tiny_data, metas, runs, test_images, tmp_path):
    out = tmp_path / "new"
    opts = ("DATASET.SUBSAMPLE_CLASSES", "new")
    argv = ["--eval-only", "--model-dir", str(runs("CoOp")), *flags("CoOp", tiny_data, out, metas, *opts)]
    metrics = launch.train(argv, quiet=True)["metrics"]
    predictor = Predictor.load(out)
    assert predictor.classnames == ["blue", "grey"]
    rows = predictor([path for path, name in test_images if name in ("blue", "grey")])
    names = [name for _, name in test_images if name in ("blue", "grey")]
    assert sum(row.classname == name for row, name in zip(rows, names, strict=True)) == metrics["correct"]


# ------------------------------------------------------------------------------------------------- official CoOp runs


@pytest.fixture
def official(tmp_path, backbone):
    """What CoOp's own train.py leaves: its log, and a checkpoint with fp16 prompts, class tokens and a scheduler
    object."""
    run = tmp_path / "official"
    (run / "prompt_learner").mkdir(parents=True)
    context = torch.randn(4, backbone.text_width, generator=torch.Generator().manual_seed(5)).half()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    state = {
        "state_dict": {"ctx": context, "token_prefix": torch.zeros(3, 1, 64), "token_suffix": torch.zeros(3, 72, 64)},
        "epoch": 50,
        "scheduler": {"successor": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50), "last_epoch": 50},
    }
    torch.save(state, run / "prompt_learner" / "model.pth.tar-50")
    (run / "log.txt").write_text(
        "***************\n** Arguments **\n***************\nbackbone: \nmodel_dir: \ntrainer: CoOp\n************\n** "
        "Config **\n************\nDATASET:\n  NAME: OxfordPets\nINPUT:\n  INTERPOLATION: bicubic\n"
        "  PIXEL_MEAN: [0.48145466, 0.4578275, 0.40821073]\n  PIXEL_STD: [0.26862954, 0.26130258, 0.27577711]\n"
        "  SIZE: (32, 32)\n  TRANSFORMS: ('random_resized_crop', 'random_flip', 'normalize')\n"
        "MODEL:\n  BACKBONE:\n    NAME: random-tiny\nTRAINER:\n  COOP:\n    CLASS_TOKEN_POSITION: front\n    CSC: "
        "False\n    CTX_INIT: \n    N_CTX: 4\n    PREC: fp16\n  NAME: CoOp\nCollecting env info ...\n** System info "
        "**\n"
    )
    return run, context.float()


def test_an_official_run_serves_with_names_for_its_classes(official, backbone, image, tmp_path, capsys):
    run, context = official
    with pytest.raises(GramError, match=r"official: expected class names in it, found none; give --classes"):
        Predictor.load(run)
    predictor = Predictor.load(run, classes=["cat", "dog", "sea_lion"])
    assert (predictor.saved.trainer, predictor.saved.epoch, predictor.backbone.precision) == ("CoOp", 50, "fp32")

    from gram_meta.trainers.coop import PlacedText  # the log says that the context stands behind the name

    features = PlacedText(backbone, ["cat", "dog", "sea_lion"], 4, "front").features(context)
    pixels = backbone.preprocess()(Image.open(image).convert("RGB"))[None]
    logits = backbone.logit_scale * backbone.encode_images(pixels) @ features.T
    np.testing.assert_allclose(predictor(image)[0].probabilities, logits.softmax(1)[0], atol=1e-6)


def test_a_bare_official_checkpoint_needs_a_backbone(official, image, tmp_path):
    run, _ = official
    shutil.copy(run / "prompt_learner" / "model.pth.tar-50", tmp_path / "alone.pth")
    with pytest.raises(
        GramError,
        match="expected a results.json or log.txt .* which names its CLIP, found none; name it with --backbone",
    ):
        Predictor.load(tmp_path / "alone.pth", classes=["cat", "dog"])
    row = Predictor.load(tmp_path / "alone.pth", classes=["cat", "dog"], backbone="random-tiny")(image)[0]
    assert row.probabilities.shape == (2,) and abs(row.probabilities.sum() - 1) < 1e-6


# --------------------------------------------------------------------------------------------------- meta-checkpoints


@pytest.mark.parametrize("trainer", TOKENS)
def test_a_meta_checkpoint_serves_as_it_is(trainer, metas, runs, backbone, image):
    file = metas / f"{trainer}.safetensors"
    with pytest.raises(GramError, match="give --classes"):
        Predictor.load(file)
    predictor = Predictor.load(file, classes="red, green, blue, grey")
    assert predictor.saved.trainer in ("CoOp", "CoCoOp", "VPT", "JointPrompt")
    row = predictor(image)[0]
    assert row.probabilities.shape == (4,) and np.isfinite(row.probabilities).all()
    if trainer == "VPTGRAM":  # the sentence of the meta-training, not a default
        texts = [f"a picture of {name}!" for name in predictor.classnames]
        prompt = predictor.saved.state_dict["visual_ctx"]
        pixels = backbone.preprocess()(Image.open(image).convert("RGB"))[None]
        with torch.no_grad():
            logits = backbone.logit_scale * backbone.encode_images(pixels, prompt) @ backbone.encode_texts(texts).T
        np.testing.assert_allclose(row.probabilities, logits.softmax(1)[0], atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ classes


def test_prompts_transfer_to_other_classes(runs, image):
    run = runs("CoOp")
    new = Predictor.load(run, classes=["cat", "dog", "sea_lion"])
    assert new(image)[0].probabilities.shape == (3,)
    same = Predictor.load(run, classes=["grey", "red", "blue", "green"])  # another order, the same probabilities
    assert dict(same(image)[0].top(4)) == pytest.approx(dict(Predictor.load(run)(image)[0].top(4)), abs=1e-6)


def test_contexts_per_class_know_no_other_classes(runs):
    with pytest.raises(GramError, match=r"a context for each class of training \(CSC\)"):
        Predictor.load(runs("CoOp csc"), classes=["cat", "dog"])
    assert Predictor.load(runs("CoOp csc"), classes=["red", "green", "blue", "grey"]).classnames


def test_names_come_from_words_and_files(tmp_path):
    assert read_classes(" cat,dog , sea  lion,") == ["cat", "dog", "sea lion"]
    (tmp_path / "names.txt").write_text("﻿cat\n\n sea lion\n", encoding="utf-8")
    assert read_classes(str(tmp_path / "names.txt")) == ["cat", "sea lion"]
    (tmp_path / "classnames.txt").write_text("n01440764 tench\nn01443537 goldfish carp\n")
    assert read_classes(str(tmp_path / "classnames.txt")) == ["tench", "goldfish carp"]
    split = {"train": [["b.jpg", 1, "dog"], ["a.jpg", 0, "cat"]], "test": [["c.jpg", 2, "fox"]]}
    (tmp_path / "split_zhou_X.json").write_text(json.dumps(split))
    assert read_classes(str(tmp_path / "split_zhou_X.json")) == ["cat", "dog", "fox"]
    (tmp_path / "list.json").write_text('["cat", "dog"]')
    assert read_classes(str(tmp_path / "list.json")) == ["cat", "dog"]


@pytest.mark.parametrize(
    "words, what",
    [
        ("cat, dog,  cat", "expected each class name once, found 'cat' again"),
        ("cat", "at least two"),
        ("", "at least two"),
        ("names.txt", "no such file"),
        ("BAD.json", "split file in CoOp"),
    ],
)
def test_bad_lists_of_classes_are_reported(words, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("BAD.json").write_text('{"train": 3}')
    with pytest.raises(GramError, match=what):
        read_classes(words)


# ------------------------------------------------------------------------------------------------------------- images


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder of images as they really come; good ones and bad ones by name."""
    folder = tmp_path_factory.mktemp("images") / "zoo"
    (folder / "deeper" / "still").mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 60, 3), np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(folder / "plain.png")
    picture.save(folder / "deeper" / "UPPER.JPG", "JPEG")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("P").save(folder / "palette.gif")
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    picture.rotate(90, expand=True).save(folder / "turned.png", exif=turned)
    grey = np.asarray(picture.convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(grey).save(folder / "shallow.png")
    Image.new("1", (16_000, 16_000)).save(folder / "bomb.png")
    whole = (folder / "deeper" / "UPPER.JPG").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "deeper" / "still" / "text.png").write_text("no image")
    (folder / "notes.txt").write_text("not looked at")
    (folder / "._plain.png").write_bytes(b"macOS's own")
    (folder / "deeper" / "loop").symlink_to(folder, target_is_directory=True)
    return folder


GOOD = ["cmyk.jpg", "deep.png", "deeper/UPPER.JPG", "palette.gif", "plain.png", "shallow.png", "turned.png"]
BAD = {
    "bomb.png": "too many pixels",
    "deeper/still/text.png": "not an image",
    "empty.jpg": "empty file",
    "truncated.jpg": "broken image",
}


@pytest.mark.slow
def test_a_folder_is_its_images_sorted_and_broken_ones_are_reported(zoo, runs, capsys):
    status = main(["predict", "--model-dir", str(runs("CoOp")), str(zoo), "--format", "csv", "--topk", "9"])
    printed = capsys.readouterr()
    rows = table(printed.out)
    assert status == 0
    images = list(dict.fromkeys(row["image"] for row in rows))
    assert images == [str(zoo / name) for name in GOOD]
    assert [row["rank"] for row in rows[:5]] == ["1", "2", "3", "4", "1"]  # four classes, fewer than asked for
    for name, reason in BAD.items():
        assert f"{zoo / name}: {reason}; left out" in printed.err
    assert (
        "7 images classified, 4 left out (broken image: 1, empty file: 1, not an image: 1, too many pixels: 1)"
        in printed.err
    )
    assert "loop" not in printed.out and "notes" not in printed.err


@pytest.mark.slow
def test_images_are_seen_as_people_see_them(zoo, runs):
    predictor = Predictor.load(runs("CoOp"))
    plain, turned, deep, shallow = (
        row.probabilities for row in predictor([zoo / f"{name}.png" for name in ("plain", "turned", "deep", "shallow")])
    )
    np.testing.assert_allclose(turned, plain, atol=1e-6)
    np.testing.assert_allclose(deep, shallow, atol=1e-6)
    assert not np.allclose(plain, shallow, atol=1e-4)


def test_rows_stand_in_the_order_given_whatever_is_broken(zoo, runs):
    predictor = Predictor.load(runs("CoOp"), batch_size=2)
    given = ["empty.jpg", "plain.png", "truncated.jpg", "bomb.png", "deep.png", "gone.png"]
    rows = predictor([zoo / name for name in given])
    assert [Path(row.image).name for row in rows] == given
    errors = ["empty file", "", "broken image", "too many pixels", "", "missing file"]
    assert [row.error for row in rows] == errors
    assert rows[0].classname == "" and np.isnan(rows[0].probability) and rows[0].top(2) == []
    alone = predictor(zoo / "deep.png")[0].probabilities
    np.testing.assert_allclose(rows[4].probabilities, alone, atol=1e-6)


def test_pil_images_are_taken(zoo, runs):
    predictor = Predictor.load(runs("VPT"))
    opened = Image.open(zoo / "turned.png")
    rows = predictor([opened, zoo / "turned.png", Image.new("LA", (20, 10))])
    assert np.array_equal(rows[0].probabilities, rows[1].probabilities)
    assert (rows[0].image, rows[2].image, rows[2].error) == (str(zoo / "turned.png"), "", "")


@pytest.mark.slow
def test_worker_processes_change_nothing(zoo, runs, tmp_path):
    many = [zoo / name for name in (*GOOD, *BAD)] * 3
    here, there = (Predictor.load(runs("CoOp"), batch_size=4, workers=n)(many) for n in (0, 2))
    assert [row.image for row in here] == [row.image for row in there] == list(map(str, many))
    assert [row.error for row in here] == [row.error for row in there]
    assert all(np.array_equal(a.probabilities, b.probabilities) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_endless_stream_is_answered_as_it_comes(workers, runs, image):
    asked = itertools.count()
    endless = (image for _ in asked)
    stream = Predictor.load(runs("CoOp"), batch_size=8, workers=workers).stream(endless)
    for _, row in zip(range(50), stream, strict=False):
        assert row.classname
    assert next(asked) < 200  # a few batches ahead, not all
    stream.close()


def test_class_sentences_are_encoded_once(runs, image, monkeypatch):
    predictor = Predictor.load(runs("CoOp"), batch_size=1)
    calls = []
    encode = type(predictor.backbone).encode_text
    monkeypatch.setattr(type(predictor.backbone), "encode_text", lambda *a, **k: calls.append(1) or encode(*a, **k))
    predictor([image] * 5)
    assert len(calls) <= 1


def test_a_batch_that_does_not_fit_is_halved(runs, test_images):
    predictor = Predictor.load(runs("CoOp"))
    paths = [path for path, _ in test_images]
    expected = predictor(paths)
    whole, sizes = predictor._classifier.model_inference, []

    def small(pixels):
        sizes.append(len(pixels))
        if len(pixels) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return whole(pixels)

    predictor._classifier.model_inference = small
    rows = predictor(paths)
    assert sizes == [8, 4, 2, 2, 4, 2, 2]
    for a, b in zip(rows, expected, strict=True):
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-6)
    predictor._classifier.model_inference = lambda pixels: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError())
    with pytest.raises(GramError, match="not enough memory for one image"):
        predictor(paths)


def test_default_batch_size_follows_device_and_model(monkeypatch, backbone):
    assert default_batch_size(backbone) == 32

    def on_gpu(free, shape):
        tokens, width, size = shape
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
        visual = SimpleNamespace(positional_embedding=range(tokens))
        gpu = SimpleNamespace(
            device=torch.device("cuda"),
            dtype=torch.float16,
            image_size=size,
            visual_width=width,
            is_vit=True,
            model=SimpleNamespace(visual=visual),
        )
        return default_batch_size(gpu)

    base16, large = (197, 768, 224), (577, 1024, 336)
    assert on_gpu(24 << 30, base16) == 256
    assert 1 <= on_gpu(1 << 30, large) < on_gpu(4 << 30, large) <= 256
    assert on_gpu(1 << 20, large) == 1


# ------------------------------------------------------------------------------------------------------- command line


@pytest.mark.slow
def test_formats(runs, zoo, tmp_path, capsys):
    run, images = str(runs("CoOp")), [str(zoo / "plain.png"), str(zoo / "deep.png")]
    expected = Predictor.load(run)(images)
    assert main(["predict", "--model-dir", run, *images, "--topk", "2"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    (name, p), (second, q) = expected[0].top(2)
    assert first == f"{images[0]}: {name} {100 * p:.1f} %, {second} {100 * q:.1f} %"
    out = tmp_path / "new" / "rows.json"
    assert main(["predict", "--model-dir", run, *images, "-o", str(out)]) == 0
    assert capsys.readouterr().out == ""
    rows = json.loads(out.read_text())
    assert [row["image"] for row in rows] == images
    assert rows[1]["classes"] == [
        {"class": expected[1].classname, "probability": pytest.approx(expected[1].probability)}
    ]
    assert np.float32(rows[0]["classes"][0]["probability"]) == np.float32(expected[0].probability)  # unrounded
    assert main(["predict", "--model-dir", run, *images, "-o", str(tmp_path / "rows.csv")]) == 0
    assert [row["class"] for row in table((tmp_path / "rows.csv").read_text())] == [row.classname for row in expected]


def test_names_of_files_that_are_no_text_and_classes_with_commas(runs, zoo, tmp_path, capsys):
    odd = os.fsdecode(bytes(tmp_path) + b"/\xff,odd.png")
    shutil.copy(zoo / "plain.png", odd)
    (tmp_path / "names.txt").write_text('cat, "the big"\ndog\n')
    command = ["predict", "--model-dir", str(runs("CoOp")), "--classes", str(tmp_path / "names.txt"), odd, "--format"]
    assert main([*command, "csv"]) == 0
    (row,) = table(capsys.readouterr().out)
    assert row["image"].endswith("\ufffd,odd.png") and row["class"] in ('cat, "the big"', "dog")
    assert main([*command, "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["image"] == row["image"]


def test_exit_status_says_whether_anything_was_classified(runs, zoo, tmp_path, capsys):
    command = ["predict", "--model-dir", str(runs("CoOp"))]
    assert main([*command, str(zoo / "empty.jpg"), str(zoo / "plain.png")]) == 0
    assert main([*command, str(zoo / "empty.jpg"), "gone.png", "--format", "json"]) == 1
    printed = capsys.readouterr()
    assert printed.out.endswith("[]\n") and "0 images classified, 2 left out" in printed.err
    (tmp_path / "nothing").mkdir()
    assert main([*command, str(tmp_path / "nothing")]) == 1
    assert f"{tmp_path / 'nothing'}: no image files in this folder" in capsys.readouterr().err
    assert main([*command, str(zoo), "--topk", "0"]) == 2


def test_a_file_is_written_whole_or_not_at_all(runs, image, tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.csv"
    out.write_text("as it was\n")
    whole = Predictor.probabilities
    monkeypatch.setattr(Predictor, "probabilities", lambda self, pixels: (_ for _ in ()).throw(KeyboardInterrupt))
    command = ["predict", "--model-dir", str(runs("CoOp")), image, "-o"]
    assert main([*command, str(out)]) == 130
    assert out.read_text() == "as it was\n" and list(tmp_path.iterdir()) == [out]
    monkeypatch.setattr(Predictor, "probabilities", whole)
    (tmp_path / "file").write_text("")
    assert main([*command, str(tmp_path / "file" / "x.csv")]) == 2
    assert f"{tmp_path}/file/x.csv: cannot be written (File exists)" in capsys.readouterr().err


def test_what_cannot_be_used_is_one_sentence(runs, image, tmp_path, metas, capsys):
    def refused(*arguments):
        assert main(["predict", *arguments, image]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gram predict: ")]
        return line

    assert "found no such folder" in refused("--model-dir", str(tmp_path / "gone"))
    below = runs("CoOp").parent
    assert "runs with checkpoints below" in refused("--model-dir", str(below))
    assert "--device" in refused("--model-dir", str(runs("CoOp")), "--device", "warp")
    assert "batch size: expected at least 1" in refused("--model-dir", str(runs("CoOp")), "--batch-size", "0")
    other = refused("--model-dir", str(runs("CoOp")), "--backbone", "random-tiny-RN")
    assert "expected the backbone it was made with, random-tiny" in other
    other = refused("--model-dir", str(metas / "UniGRAM.safetensors"), "--classes", "a, b", "--backbone", "gram-small")
    assert "expected the backbone it was made with, random-tiny" in other
    torch.save({"state_dict": {"compound": torch.zeros(1)}}, tmp_path / "maple.pth")
    line = refused("--model-dir", str(tmp_path / "maple.pth"), "--classes", "a, b", "--backbone", "random-tiny")
    assert "expected learned prompts" in line and "compound" in line
    torch.save({"state_dict": {"ctx": torch.zeros(2, 64)}, "trainer": "MaPLe"}, tmp_path / "other.pth")
    line = refused("--model-dir", str(tmp_path / "other.pth"), "--classes", "a, b", "--backbone", "random-tiny")
    assert "found those of MaPLe" in line and "CoOpGRAM" in line
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 50)
    assert "meta-checkpoint" in refused("--model-dir", str(tmp_path / "broken.safetensors"), "--classes", "a, b")


def test_prompts_of_another_width_are_refused(official, tmp_path):
    run, _ = official
    with pytest.raises(
        GramError, match=r"expected ctx of shape \(\d+, 128\), found \(\d+, 64\); gram-small may not be"
    ):
        Predictor.load(run, classes=["cat", "dog"], backbone="gram-small")


def test_words_that_the_packaged_model_has_never_seen_are_reported(metas, capsys, tmp_path):
    clip = load_backbone("gram-small")
    meta = MetaCheckpoint(initial_prompts(clip, 4, 0), None, "gram-small", clip.fingerprint)
    save_meta_checkpoint(tmp_path / "m.safetensors", meta)
    Predictor.load(tmp_path / "m.safetensors", classes=["fox", "zeppelin"])
    assert "never seen words of 1 of 2 classes (zeppelin)" in capsys.readouterr().err


def test_precision_is_the_runs_on_a_gpu_and_float32_on_a_cpu(runs, image):
    assert module._precision("fp16", asked=False, device="cpu") == "fp32"
    assert module._precision("fp16", asked=False, device="cuda") == "fp16"
    assert module._precision("amp", asked=True, device="cpu") == "fp32"
    asked = Predictor.load(runs("CoOp"), precision="bf16")
    assert asked.backbone.precision == "bf16"
    np.testing.assert_allclose(
        asked(image)[0].probabilities, Predictor.load(runs("CoOp"))(image)[0].probabilities, atol=0.1
    )


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_ends_it_quietly(runs, zoo):
    code = "import sys; from gram_meta.cli import main; sys.exit(main(sys.argv[1:]))"
    images = [str(zoo / "plain.png")] * 4000
    process = subprocess.Popen(
        [sys.executable, "-c", code, "predict", "--model-dir", str(runs("CoOp")), "--workers", "0", *images],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "plain.png" in process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(120) == 0 and "Traceback" not in errors and "BrokenPipe" not in errors


def test_three_lines_of_python_as_documented(runs, image, capsys):
    text = (Path(__file__).resolve().parents[2] / "docs" / "guide" / "predict.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    exec(code.replace("output/dtd/CoOpGRAM/seed1", str(runs("CoOpGRAM"))).replace("photo.jpg", image), {})
    assert image in capsys.readouterr().out


def test_find_images_takes_what_is_given(zoo, tmp_path):
    picture = Image.new("RGB", (4, 4))
    (tmp_path / "none").mkdir()
    given = [zoo / "deeper" / "still", picture, "gone.png", str(tmp_path / "none"), zoo / "notes.txt"]
    found = list(find_images(given))
    below = str(zoo / "deeper" / "still" / "text.png")
    assert found == [below, picture, "gone.png", str(tmp_path / "none"), zoo / "notes.txt"]


def test_read_saved_of_a_run_under_training(runs, tmp_path):
    """Killed between its checkpoint and its results: the checkpoint says enough."""
    shutil.copytree(runs("VPT"), tmp_path / "run", ignore=shutil.ignore_patterns("results.json", "log.txt"))
    saved = read_saved(tmp_path / "run")
    assert (
        saved.classnames == ["red", "green", "blue", "grey"] and saved.backbone == "random-tiny" and saved.fingerprint
    )
