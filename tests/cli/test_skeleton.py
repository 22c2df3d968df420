"""The walking skeleton: the whole path in small, through the command line, from image-text pairs to a table.

A random tiny CLIP and 200 drawn shapes: nothing here says how good anything is, only that the parts fit.
"""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gram_meta.cli import main
from gram_meta.files import read_json

pytestmark = pytest.mark.slow

SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar", "diamond", "corner")
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220)}
TINY = ["MODEL.BACKBONE.NAME", "random-tiny", "INPUT.SIZE", "(32, 32)"]
SMALL_CHC = ["CHC.TOPICS.MIN_CLUSTER_SIZE", "10", "CHC.TOPICS.NEIGHBORS", "8", "CHC.DOMAINS.K", "2"]
SMALL_TASKS = ["TASKS.WAYS", "2", "TASKS.SUPPORT_SHOTS", "2", "TASKS.QUERY_SHOTS", "4", "TASKS.HELD_OUT", "0.4"]
SMALL_RUN = ["OUTER.STEPS", "6", "OUTER.BATCH", "2", "EVAL.EVERY", "3", "EVAL.TASKS", "4", "CHECKPOINT.EVERY", "3"]


def draw(shape, colour, rng):
    """One shape of one colour on a grey ground, 40 pixels wide, somewhere near the middle."""
    image = Image.new("RGB", (40, 40), (int(rng.integers(150, 255)),) * 3)
    pen = ImageDraw.Draw(image)
    x, y, r = int(rng.integers(16, 24)), int(rng.integers(16, 24)), int(rng.integers(7, 13))
    box, fill = (x - r, y - r, x + r, y + r), COLOURS[colour]
    if shape == "circle":
        pen.ellipse(box, fill)
    elif shape == "square":
        pen.rectangle(box, fill)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill)
    elif shape == "cross":
        pen.line([(x - r, y), (x + r, y)], fill, 4)
        pen.line([(x, y - r), (x, y + r)], fill, 4)
    elif shape == "ring":
        pen.ellipse(box, outline=fill, width=3)
    elif shape == "bar":
        pen.rectangle((x - r, y - 3, x + r, y + 3), fill)
    elif shape == "diamond":
        pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill)
    else:
        pen.line([(x - r, y + r), (x - r, y - r), (x + r, y - r)], fill, 4)
    return image


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """200 pairs: a TSV of pictures and captions."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    lines = ["image\tcaption"]
    for index in range(200):
        shape = SHAPES[index % len(SHAPES)]
        colour = list(COLOURS)[index // len(SHAPES) % 3]
        draw(shape, colour, rng).save(folder / f"{index:03d}.png")
        # the shape outweighs all else, or UMAP's chance, which differs between processors, decides the topics
        lines.append(f"{index:03d}.png\t{shape} {shape} {shape} number {index}")
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.tsv"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few-shot dataset of six shapes in CoOp's layout, under the name of one that the project knows."""
    root = tmp_path_factory.mktemp("data")
    images = root / "emoji_animals" / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(1)
    split = {"train": [], "val": [], "test": []}
    for label, shape in enumerate(SHAPES[:6]):
        for number in range(12):
            name = f"{shape}-{number}.png"
            draw(shape, list(COLOURS)[number % 3], rng).save(images / name)
            part = "train" if number < 4 else "val" if number < 6 else "test"
            split[part].append([name, label, shape])
    (root / "emoji_animals" / "split_zhou_EmojiAnimals.json").write_text(json.dumps(split))
    return root


def train(trainer, data, out, *arguments, seed=1):
    config = "gram_small" if trainer == "ZeroshotCLIP" else "gram_small_c4_ep10_batch32_ctxv1"
    command = ["train", "--root", str(data), "--seed", str(seed), "--trainer", trainer, "--output-dir", str(out)]
    command += ["--dataset-config-file", "configs/datasets/emoji_animals.yaml"]
    command += ["--config-file", f"configs/trainers/{trainer}/{config}.yaml"]
    assert main([*command, *arguments]) == 0
    return read_json(out / "results.json")


def test_from_pairs_to_a_table(corpus, data, tmp_path, capsys):
    store, hierarchy, meta, out = (tmp_path / name for name in ("store", "hierarchy", "meta", "output"))
    embed = ["--backbone", "random-tiny", "--sentence-model", "hash:64", "--device", "cpu"]
    assert main(["embed", str(corpus), "-o", str(store), *embed]) == 0
    assert main(["cluster", str(store), "-o", str(hierarchy), *SMALL_CHC, *SMALL_TASKS]) == 0
    assert main(["inspect", str(hierarchy)]) == 0
    assert "circle" in capsys.readouterr().out
    pretrain = ["pretrain", "--store", str(store), "--hierarchy", str(hierarchy), "-o", str(meta), "--device", "cpu"]
    assert main([*pretrain, "BACKBONE.NAME", "random-tiny", *SMALL_TASKS, *SMALL_RUN]) == 0
    checkpoint = meta / "best.safetensors"
    assert checkpoint.is_file()

    gram = ["TRAINER.GRAM.CHECKPOINT", str(checkpoint)]
    short = [*TINY, "OPTIM.MAX_EPOCH", "2", "DATASET.NUM_SHOTS", "2"]
    for subsample in ("base", "new"):
        classes = ["DATASET.SUBSAMPLE_CLASSES", subsample]
        train("ZeroshotCLIP", data, out / f"zero-shot-{subsample}", "--eval-only", *TINY, *classes)
        start = out / f"start-{subsample}"
        train("CoOpGRAM", data, start, "--eval-only", *short, *gram, *classes)
        for trainer in ("CoOp", "CoOpGRAM"):
            for seed in (1, 2):
                extra = gram if trainer == "CoOpGRAM" else []
                trained = out / f"{trainer}-base-{seed}"
                test = [] if subsample == "base" else ["--eval-only", "--model-dir", str(trained)]
                here = trained if subsample == "base" else out / f"{trainer}-new-{seed}"
                train(trainer, data, here, *test, *short, *classes, *extra, seed=seed)
    capsys.readouterr()

    assert main(["report", str(out), "--format", "json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in report["rows"]] == ["ZeroshotCLIP", "CoOp", "CoOpGRAM", "CoOpGRAM, no step"]
    assert report["missing"] == [] and report["notes"] == [] and report["seeds"] == [1, 2]
    for row in report["rows"]:
        for column in ("base", "new", "H"):
            assert 0 <= row["cells"][column]["mean"] <= 100
    base = read_json(out / "CoOpGRAM-base-1" / "results.json")
    assert base["metrics"]["total"] == 18  # six test pictures of each of three classes
    assert base["meta_checkpoint"]["sha256"] and base["regulator"]
    assert main(["report", str(out)]) == 0
    print(capsys.readouterr().out)
