"""The emoji in styles of their own: one dataset for all of them, one for each style, with the classes of the group."""

import csv
import json
from types import SimpleNamespace

import pytest
from PIL import Image

import gram_meta.plugin  # noqa: F401, fills the registries
from gram_meta.coop.launch import find_config
from gram_meta.datasets.emoji import NAMES, SHIFT_STYLES, STYLE_DATASETS
from gram_meta.engine import DATASET_REGISTRY
from gram_meta.errors import GramError

CLASSES = ["ant", "bee", "cow"]


@pytest.fixture
def root(tmp_path):
    """EmojiTravel and its shift: three classes; the styles come in turn, so that each has 2 / 1 / 2 pictures of a
    class."""
    for folder, title in (("emoji_travel", "EmojiTravel"), ("emoji_travel_shift", "EmojiTravelShift")):
        rows, split = [], {"train": [], "val": [], "test": []}
        for part, count in (("train", 6), ("val", 3), ("test", 6)):
            for label in (1, 0, 2):  # not in order
                for index in range(count):
                    file = f"{CLASSES[label]}/{part}_{index}.png"
                    split[part].append([file, label, CLASSES[label]])
                    rows.append({"image": f"images/{file}", "style": SHIFT_STYLES[index % 3], "source": "noto"})
                    path = tmp_path / folder / "images" / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (2, 2)).save(path)
        (tmp_path / folder / f"split_zhou_{title}.json").write_text(json.dumps(split))
        with open(tmp_path / folder / "truth.tsv", "w", newline="") as file:
            table = csv.DictWriter(file, ["image", "style", "source"], delimiter="\t")
            table.writeheader()
            table.writerows(rows)
    return tmp_path


def load(root, name, shots=-1, group="all"):
    dataset = SimpleNamespace(ROOT=str(root), NUM_SHOTS=shots, SUBSAMPLE_CLASSES=group, OUTSIDE_ROOT=False)
    return DATASET_REGISTRY.get(name)(SimpleNamespace(DATASET=dataset, SEED=1))


def pictures(items):
    return {item.impath.rpartition("/images/")[2] for item in items}


@pytest.mark.parametrize("group", ["all", "base", "new"])
def test_classes_and_labels_are_those_of_the_group(root, group):
    parent = load(root, "EmojiTravel", group=group)
    expected = {"all": CLASSES, "base": CLASSES[:2], "new": CLASSES[2:]}[group]
    for style in ("Shift", "Halftone", "Mosaic", "Shadow"):
        data = load(root, f"EmojiTravel{style}", group=group)
        assert data.classnames == parent.classnames == expected and data.lab2cname == parent.lab2cname
        for item in data.test:
            assert f"/emoji_travel_shift/images/{data.classnames[item.label]}/" in item.impath


def test_each_style_has_its_pictures_and_together_they_are_all(root):
    whole = load(root, "EmojiTravelShift")
    parts = {style: load(root, f"EmojiTravel{style.title()}") for style in SHIFT_STYLES}
    for split, count in (("train_x", 6), ("val", 3), ("test", 6)):
        of_styles = [pictures(getattr(data, split)) for data in parts.values()]
        assert [len(some) for some in of_styles] == [count] * 3
        assert set.union(*of_styles) == pictures(getattr(whole, split))
    assert pictures(parts["mosaic"].test) == {f"{name}/test_{i}.png" for name in CLASSES for i in (1, 4)}


def test_few_shots_of_a_style_are_its_own(root):
    """The styles share a split file and a folder, but not what was drawn from it."""
    for style in ("Shift", "Halftone", "Mosaic"):
        data = load(root, f"EmojiTravel{style}", shots=1)
        assert pictures(data.train_x) == pictures(load(root, f"EmojiTravel{style}", shots=1).train_x)
        assert len(data.train_x) == 3
        if style != "Shift":
            assert pictures(data.train_x) <= pictures(load(root, f"EmojiTravel{style}").train_x)


def test_a_style_that_a_class_lacks_or_no_table_is_one_sentence(root):
    truth = root / "emoji_travel_shift/truth.tsv"
    text = truth.read_text()
    lines = [line for line in text.splitlines() if "cow/test" not in line or "mosaic" not in line]
    truth.write_text("\n".join(lines) + "\n")
    with pytest.raises(GramError, match="'mosaic' for all 3 classes in 'test', found none for 1 of them"):
        load(root, "EmojiTravelMosaic")
    load(root, "EmojiTravelShadow")
    truth.write_text(text.replace("style", "kind"))
    with pytest.raises(GramError, match="expected the columns image and style"):
        load(root, "EmojiTravelShadow")
    truth.unlink()
    with pytest.raises(GramError, match="truth.tsv: expected the table of what was drawn"):
        load(root, "EmojiTravelShadow")


def test_every_group_has_them_and_their_config_files():
    assert len(STYLE_DATASETS) == len(NAMES) * len(SHIFT_STYLES)
    for name in NAMES:
        for style in ("shift", *SHIFT_STYLES):
            title = f"Emoji{name.title()}{style.title()}"
            dataset = DATASET_REGISTRY.get(title)
            assert dataset.dataset_dir == f"emoji_{name}_shift"
            assert dataset.split_file == f"split_zhou_Emoji{name.title()}Shift.json"
            assert f'NAME: "{title}"' in find_config(f"emoji_{name}_{style}", "datasets").read_text()


def test_they_are_the_shifts_of_the_emoji_world():
    world = pytest.importorskip("gram_meta.demo.world", reason="the demo's packages are not installed")
    assert {spec.folder for spec in world.SHIFTS.values()} == {f"emoji_{name}_shift" for name in NAMES}
    assert set(world.HELD_STYLES) == set(SHIFT_STYLES)
