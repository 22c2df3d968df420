"""Datasets by split files: few-shot draws as CoOp's, base and new classes, and one sentence for what is missing."""

import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import gram_meta.plugin  # noqa: F401, fills the registries
from gram_meta.coop.launch import find_config
from gram_meta.datasets.base import SplitDataset, read_split, subsample
from gram_meta.datasets.emoji import DATASETS
from gram_meta.engine import DATASET_REGISTRY, Datum
from gram_meta.errors import GramError

CLASSES = ["ant", "bee", "cat", "dog", "eel"]


def entries(part, count, order):
    return [[f"{CLASSES[label]}/{part}_{i}.png", label, CLASSES[label]] for label in order for i in range(count)]


@pytest.fixture
def root(tmp_path):
    """EmojiAnimals with five classes that do not appear in the order of their labels; 6 / 5 / 2 images each."""
    folder = tmp_path / "data" / "emoji_animals"
    order = [2, 0, 4, 1, 3]
    split = {"train": entries("tr", 6, order), "val": entries("va", 5, order), "test": entries("te", 2, order)}
    for rows in split.values():
        for path, _, _ in rows:
            (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2)).save(folder / "images" / path)
    (folder / "split_zhou_EmojiAnimals.json").write_text(json.dumps(split))
    return tmp_path / "data"


def cfg(root, shots=-1, seed=1, group="all"):
    dataset = SimpleNamespace(ROOT=str(root), NUM_SHOTS=shots, SUBSAMPLE_CLASSES=group, OUTSIDE_ROOT=False)
    return SimpleNamespace(DATASET=dataset, SEED=seed)


def load(root, **options):
    return DATASET_REGISTRY.get("EmojiAnimals")(cfg(root, **options))


def names(items):
    return [os.path.basename(os.path.dirname(item.impath)) + "/" + os.path.basename(item.impath) for item in items]


def test_the_emoji_datasets_are_registered():
    for name, cls in DATASETS.items():
        assert DATASET_REGISTRY.get(name) is cls and issubclass(cls, SplitDataset)
        assert cls.__name__ == name and cls.split_file == f"split_zhou_{name}.json"


def test_every_dataset_of_the_emoji_world_is_known():
    world = pytest.importorskip("gram_meta.demo.world", reason="the demo's packages are not installed")
    for spec in world.SPECS.values():
        dataset = next(cls for cls in DATASETS.values() if cls.dataset_dir == spec.folder)
        assert dataset.split_file == spec.split_file
        config = find_config(f"emoji_{spec.name}", "datasets")
        assert f'NAME: "{dataset.__name__}"' in config.read_text()


def test_everything(root):
    data = load(root)
    assert (len(data.train_x), len(data.val), len(data.test)) == (30, 25, 10)
    assert data.classnames == CLASSES and data.num_classes == 5
    assert all(isinstance(item, Datum) for item in data.test)
    assert data.few_shot == {"path": "", "sha256": ""}
    assert not (root / "emoji_animals/split_fewshot").exists()


@pytest.mark.parametrize(("shots", "val_shots"), [(1, 1), (2, 2), (5, 4), (16, 4)])
def test_few_shot_is_drawn_as_coop_draws_it(root, shots, val_shots):
    """random.seed(seed), then random.sample per label in the order of first appearance: training, then validation."""
    data = load(root, shots=shots, seed=3)
    random.seed(3)
    expected = {}
    for part, wanted in (("tr", shots), ("va", val_shots)):
        groups = [entries(part, 6 if part == "tr" else 5, [label]) for label in (2, 0, 4, 1, 3)]
        expected[part] = [
            row[0] for group in groups for row in (random.sample(group, wanted) if len(group) >= wanted else group)
        ]
    assert names(data.train_x) == expected["tr"] and names(data.val) == expected["va"]
    assert len(data.test) == 10  # never cut


def test_few_shot_files_hold_relative_paths_and_are_used_again(root, capsys):
    first = load(root, shots=2)
    path = root / "emoji_animals/split_fewshot/shot_2-seed_1.json"
    stored = json.loads(path.read_text())
    assert stored["shots"] == 2 and stored["seed"] == 1 and len(stored["train"]) == 10
    assert str(root) not in path.read_text()
    assert first.few_shot["path"] == str(path) and len(first.few_shot["sha256"]) == 64
    stored["train"] = stored["train"][::-1]  # so that a second load differs from a second draw
    path.write_text(json.dumps(stored))
    moved = root.with_name("moved")
    root.rename(moved)
    again = load(moved, shots=2)
    assert names(again.train_x) == names(first.train_x)[::-1]
    assert names(load(moved, shots=2, seed=2).train_x) != names(first.train_x)
    assert "Loading preprocessed few-shot data from" in capsys.readouterr().out


def test_drawing_leaves_the_global_generator_alone(root):
    random.seed(11)
    expected = random.random()
    random.seed(11)
    load(root, shots=2)
    assert random.random() == expected


def test_an_open_seed_is_not_stored(root):
    load(root, shots=2, seed=-1)
    assert not (root / "emoji_animals/split_fewshot").exists()


def test_a_read_only_root_keeps_the_draw_in_memory(root, monkeypatch, capsys):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)  # the first step of every write
        data = load(root, shots=2)
    assert "cannot be written (Permission denied)" in capsys.readouterr().out
    assert data.few_shot["path"] == "" and len(data.few_shot["sha256"]) == 64
    again = load(root, shots=2)
    assert names(data.train_x) == names(again.train_x)
    assert data.few_shot["sha256"] == again.few_shot["sha256"]  # of the file that could not be written


def test_few_shot_of_another_split_is_refused(root):
    load(root, shots=2)
    split = root / "emoji_animals/split_zhou_EmojiAnimals.json"
    contents = json.loads(split.read_text())
    contents["train"].pop()
    split.write_text(json.dumps(contents))
    with pytest.raises(
        GramError, match="was drawn from something else than the split_zhou_EmojiAnimals.json there now"
    ):
        load(root, shots=2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda stored: {**stored, "train": []}, "expected training images of all 5 classes, found none of 5 of them"),
        (lambda stored: {**stored, "train": stored["train"][:-2]}, "all 5 classes, found none of 1 of them"),
        (
            lambda stored: {**stored, "train": stored["train"] + stored["train"][:1]},
            "at most 2 images of a class, found 3",
        ),
        (lambda stored: {**stored, "train": [["x.png", 0, "ant"]]}, "names x.png, which is no train image"),
        (lambda stored: {**stored, "val": stored["train"]}, "which is no val image"),
        (lambda stored: {**stored, "train": 5}, "expected a few-shot subset"),
        (lambda stored: [], "expected a few-shot subset"),
    ],
)
def test_few_shot_files_of_wrong_contents_are_refused(root, change, says):
    load(root, shots=2)
    path = root / "emoji_animals/split_fewshot/shot_2-seed_1.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(GramError, match=says) as error:
        load(root, shots=2)
    assert str(path) in str(error.value) and "remove it to draw anew" in str(error.value)


def test_base_and_new_classes(root):
    """The larger half is base; labels start at 0 again; the few-shot file is shared by both."""
    everything = load(root, shots=2)
    base, new = load(root, shots=2, group="base"), load(root, shots=2, group="new")
    assert base.classnames == ["ant", "bee", "cat"] and new.classnames == ["dog", "eel"]
    assert sorted(names(base.train_x) + names(new.train_x)) == sorted(names(everything.train_x))
    for data in (base, new):
        for item in [*data.train_x, *data.val, *data.test]:
            assert data.classnames[item.label] == item.classname
    stored = sorted(path.name for path in (root / "emoji_animals/split_fewshot").iterdir())
    assert stored == ["shot_2-seed_1.json", "shot_2-seed_1.pkl"]
    with pytest.raises(GramError, match="SUBSAMPLE_CLASSES is 'old'"):
        load(root, group="old")
    with pytest.raises(GramError, match="has none of them"):
        subsample({"train": [("a", 0, "a")], "val": [], "test": []}, "new")


def test_missing_things_are_named(root, tmp_path):
    with pytest.raises(GramError, match="emoji_animals: expected the folder of EmojiAnimals under DATASET.ROOT"):
        load(tmp_path / "nowhere")
    folder = root / "emoji_animals"
    (folder / "images/bee/te_0.png").unlink()
    (folder / "images/bee/te_1.png").unlink()
    with pytest.raises(GramError, match=r"bee/te_0.png: .* \(2 of 65 images are missing\)"):
        load(root)
    split = folder / "split_zhou_EmojiAnimals.json"
    split.rename(folder / "other.json")
    with pytest.raises(GramError, match="split_zhou_EmojiAnimals.json: expected a split file"):
        load(root)


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        ("[]", "expected {"),
        ('{"train": []}', "expected {"),
        ('{"train": [["a", 0]], "test": []}', "found another row"),
        ('{"train": [["a", "x", "a"]], "test": []}', "found another row"),
        ('{"train": [], "test": [["a", 0, "a"]]}', "expected images in 'train'"),
        ('{"train": [["a", 1, "a"]], "test": [["a", 1, "a"]]}', "expected training labels 0 to 0, found 1"),
        ('{"train": [["a", 0, "a"]], "test": [["a", 1, "b"]]}', "'test' has labels without a training image"),
        ('{"train": [["a", 0, "a"]], "test": [["b", 0, "b"]]}', "one class name for label 0, found 'a' and 'b'"),
        ("{", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ('{"train": ' + "9" * 5000 + "}", "expected JSON"),
        ('{"train": null, "test": []}', "found 'None' for a list of rows"),
        ('{"train": {"abc": 1}, "test": []}', "for a list of rows"),
        ('{"train": ["abc"], "test": []}', "found another row: abc"),
        ('{"train": [["a", "0", "a"]], "test": []}', "found another row"),
        ('{"train": [["a", 0.5, "a"]], "test": []}', "found another row"),
        ('{"train": [["a", true, "a"]], "test": []}', "found another row"),
        ('{"train": [[null, 0, "a"]], "test": []}', "found another row"),
        ('{"train": [["a", 0, {"b": 1}]], "test": []}', "found another row"),
        (r'{"train": [["a\ud800", 0, "a"]], "test": []}', "expected JSON"),
        ('{"train": [["a", 0, "_ _"]], "test": [["a", 0, "_ _"]]}', "expected a class name for label 0, found '_ _'"),
    ],
)
def test_broken_split_files(tmp_path, contents, says):
    path = tmp_path / "split.json"
    path.write_text(contents)
    with pytest.raises(GramError, match=says) as error:
        read_split(path)
    assert str(path) in str(error.value)


def test_without_validation_images(tmp_path):
    path = tmp_path / "split.json"
    path.write_text('{"train": [["a", 0, "a"], ["b", 0, "a"]], "test": [["c", 0, "a"]]}')
    files = SplitDataset.files(path, read_split(path))
    splits, facts = files.subset(read_split(path), 1, 5)
    assert len(splits["train"]) == 1 and splits["val"] == [] and facts["path"]
