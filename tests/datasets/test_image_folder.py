"""ImageFolder: which folders are classes, which are splits, and what is refused because it may be both."""

import os
import re
from types import SimpleNamespace

import pytest
from PIL import Image

import gram_meta.plugin  # noqa: F401, fills the registries
from gram_meta.cli import main
from gram_meta.engine import DATASET_REGISTRY
from gram_meta.errors import GramError

CLASSES = ("apple", "banana", "carrot")
DEFAULTS = {"NUM_SHOTS": -1, "SUBSAMPLE_CLASSES": "all", "OUTSIDE_ROOT": False}


def plant(base, count, classes=CLASSES):
    for name in classes:
        (base / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (4, 4)).save(base / name / f"{base.name}{number}.png")


def load(root, folder="mine", **options):
    dataset = SimpleNamespace(**{**DEFAULTS, "ROOT": str(root), "FOLDER": folder, **options})
    return DATASET_REGISTRY.get("ImageFolder")(SimpleNamespace(DATASET=dataset, SEED=1))


def counts(data):
    return len(data.train_x), len(data.val), len(data.test)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ({"train": 4, "valid": 2}, (12, 0, 6)),
        ({"Train": 4, "Test": 2}, (12, 0, 6)),
        ({"TRAINING": 4, "Testing": 2}, (12, 0, 6)),
        ({"training": 4, "validation": 2, "test": 3}, (12, 6, 9)),
        ({"train": 4, "dev": 2, "eval": 3}, (12, 6, 9)),
        ({"data/train": 4, "data/val": 2}, (12, 0, 6)),
        ({"a/b/train": 4, "a/b/test": 2}, (12, 0, 6)),
        ({"seg_train/seg_train": 4, "seg_test/seg_test": 2}, (12, 0, 6)),
        ({"training_set/training_set": 4, "test_set/test_set": 2}, (12, 0, 6)),
        ({"Training": 10}, (15, 6, 9)),
        ({"images/photos": 10}, (15, 6, 9)),
        ({"trn": 4, "tst": 2}, (12, 0, 6)),
        ({"trainset": 4, "ValSet": 2}, (12, 0, 6)),
        ({"TrainImages": 4, "test_1": 2}, (12, 0, 6)),
    ],
)
def test_the_usual_names_of_splits_are_no_classes(tmp_path, capsys, folders, expected):
    for folder, count in folders.items():
        plant(tmp_path / "mine" / folder, count)
    data = load(tmp_path)
    assert data.classnames == list(CLASSES) and counts(data) == expected
    out = capsys.readouterr().out
    numbers = dict(zip(("train", "val", "test"), expected, strict=True))
    images = ", ".join(f"{part} {number}" for part, number in numbers.items() if number)
    assert f"3 classes (apple, banana, carrot); images: {images} (" in out
    assert main(["check-data", str(tmp_path), "--datasets", "mine"]) == 0
    assert "3 classes (apple, banana, carrot)" in capsys.readouterr().out


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("names", [("bus", "train"), ("bullet_train", "crash_test", "bus"), ("bullet_train", "bus")])
def test_a_class_may_be_called_like_a_split(tmp_path, names, nested):
    for name in names:
        plant(tmp_path / "mine" / name, 4, classes=("inside", "outside") if nested else (".",))
    if nested and names != ("bullet_train", "bus"):  # may be a split
        with pytest.raises(GramError, match=r"mine: expected class folders, or folders of splits .* beside bus"):
            load(tmp_path)
    else:
        assert load(tmp_path).classnames == sorted(name.replace("_", " ") for name in names)


@pytest.mark.parametrize(
    ("folders", "flat", "says"),
    [
        (["train", "test", "cats"], [], "found test beside cats"),
        (["train", "valid"], ["labels"], "found train beside labels"),
        (["train", "val", "valid"], [], "expected one folder each .* found train, val, valid"),
        (["val", "test"], [], "expected one folder each .* found test, val"),
        (["train"], ["test"], "test: expected class folders with images, found none"),
        ([], ["train", "test"], "train: expected class folders with images, found none"),
        ([], ["train", "test", "extra"], "found test beside extra"),
        (["train1", "train2", "test"], [], "expected one folder each .* found test, train1, train2"),
        (["setA/train", "setA/test", "setB/train"], [], "setA: expected a class folder, found the splits test, train"),
        ([], ["only"], "expected at least two classes, found only alone"),
    ],
)
def test_what_may_be_classes_or_splits_is_refused(tmp_path, folders, flat, says):
    for folder in folders:
        plant(tmp_path / "mine" / folder, 2)
    for folder in flat:
        plant(tmp_path / "mine" / folder, 2, classes=(".",))
    with pytest.raises(GramError, match=says):
        load(tmp_path)
    assert not (tmp_path / "mine/split.json").exists()
    assert main(["check-data", str(tmp_path), "--datasets", "mine"]) == 1


def test_what_is_left_out_or_may_be_meant_otherwise_is_printed(tmp_path, capsys):
    for domain in ("art", "photo"):
        plant(tmp_path / "mine" / domain, 4)
    (tmp_path / "mine/phone").mkdir()
    (tmp_path / "mine/phone/a.heic").touch()
    assert load(tmp_path).classnames == ["art", "photo"]
    out = capsys.readouterr().out
    assert (
        "each of the classes art, photo, ... holds the folders apple, banana, carrot; if those are the classes" in out
    )
    assert f"{tmp_path / 'mine'}: folders without an image that can be read are left out: phone" in out


@pytest.mark.parametrize("name", [b"apple/\xff.png", b"\xff/0.png"])
def test_a_name_that_is_not_utf8_is_one_sentence(tmp_path, name):
    plant(tmp_path / "mine", 2)
    path = os.fsencode(tmp_path / "mine") + b"/" + name
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "wb").close()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(GramError, match="expected a name in UTF-8, found another; rename the file or its folder"):
        load(tmp_path)
    assert not (tmp_path / "mine/split.json").exists()


def test_two_spellings_of_one_name_are_the_same_class_name(tmp_path, capsys):
    plant(tmp_path / "mine", 2, classes=("caf\u00e9", "cafe\u0301"))
    load(tmp_path)
    assert "classes of the same name" in capsys.readouterr().out


def test_an_old_split_file_whose_classes_are_splits_is_refused(tmp_path):
    plant(tmp_path / "mine/train", 4)
    plant(tmp_path / "mine/valid", 2)
    rows = '["train/apple/train0.png", 0, "train"], ["valid/apple/valid0.png", 1, "valid"]'
    (tmp_path / "mine/split.json").write_text(f'{{"train": [{rows}], "test": [{rows}]}}')
    with pytest.raises(GramError, match=r"split.json: expected classes, found the names of splits \(train, valid\)"):
        load(tmp_path)
    (tmp_path / "mine/split.json").unlink()
    assert load(tmp_path).classnames == list(CLASSES)


@pytest.mark.parametrize("name", ["_", "__ _", "   "])
def test_a_class_needs_a_name(tmp_path, name):
    plant(tmp_path / "mine", 2, classes=("apple", name))
    with pytest.raises(GramError, match="expected a class folder whose name has more than spaces and underscores"):
        load(tmp_path)
    rows = f'["apple/mine0.png", 0, "apple"], ["{name}/mine0.png", 1, "{name}"]'
    (tmp_path / "mine/split.json").write_text(f'{{"train": [{rows}], "test": [{rows}]}}')
    with pytest.raises(GramError, match=re.escape(f"split.json: expected a class name for label 1, found {name!r}")):
        load(tmp_path)
