"""CoOp's fifteen datasets and ImageFolder on small trees of the real layout; few-shot pickles; gram check-data."""

import json
import math
import os
import pickle
import random
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import gram_meta.plugin  # noqa: F401, fills the registries
from gram_meta.cli import main
from gram_meta.datasets import check as checking
from gram_meta.datasets import pickles
from gram_meta.datasets.base import SplitDataset
from gram_meta.engine import DATASET_REGISTRY, Datum
from gram_meta.errors import GramError

PARTS = {"train": 6, "val": 5, "test": 3}  # images of each class

# name -> (folder, folder of images, [(class name, path of its image number n of a part)])
SPLIT_TREES = {
    "Caltech101": (
        "caltech-101",
        "101_ObjectCategories",
        {
            "accordion": "accordion/image_{n:04}.jpg",
            "airplane": "airplanes/image_{n:04}.jpg",
            "face": "Faces/image_{n:04}.jpg",
            "gerenuk": "gerenuk/image_{n:04}.jpg",
            "yin_yang": "yin_yang/image_{n:04}.jpg",
        },
    ),
    "OxfordPets": (
        "oxford_pets",
        "images",
        {
            "abyssinian": "Abyssinian_{n}.jpg",
            "american_bulldog": "american_bulldog_{n}.jpg",
            "bengal": "Bengal_{n}.jpg",
            "sphynx": "Sphynx_{n}.jpg",
            "yorkshire_terrier": "yorkshire_terrier_{n}.jpg",
        },
    ),
    "StanfordCars": (
        "stanford_cars",
        "",
        {
            "2000 AM General Hummer SUV": "cars_{part}/{n:05}.jpg",
            "2012 Acura RL Sedan": "cars_{part}/1{n:04}.jpg",
            "2012 Audi S6 Sedan": "cars_{part}/2{n:04}.jpg",
            "1993 Geo Metro Convertible": "cars_{part}/3{n:04}.jpg",
            "2012 smart fortwo Convertible": "cars_{part}/4{n:04}.jpg",
        },
    ),
    "OxfordFlowers": (
        "oxford_flowers",
        "jpg",
        {
            "pink primrose": "image_0{n:04}.jpg",
            "canterbury bells": "image_1{n:04}.jpg",
            "english marigold": "image_2{n:04}.jpg",
            "bird of paradise": "image_3{n:04}.jpg",
            "blackberry lily": "image_4{n:04}.jpg",
        },
    ),
    "Food101": (
        "food-101",
        "images",
        {
            "apple_pie": "apple_pie/{n}.jpg",
            "beef_tartare": "beef_tartare/{n}.jpg",
            "club_sandwich": "club_sandwich/{n}.jpg",
            "ramen": "ramen/{n}.jpg",
            "waffles": "waffles/{n}.jpg",
        },
    ),
    "SUN397": (
        "sun397",
        "SUN397",
        {
            "abbey": "a/abbey/sun_{n}.jpg",
            "outdoor apartment_building": "a/apartment_building/outdoor/sun_{n}.jpg",
            "indoor badminton_court": "b/badminton_court/indoor/sun_{n}.jpg",
            "wave": "w/wave/sun_{n}.jpg",
            "youth_hostel": "y/youth_hostel/sun_{n}.jpg",
        },
    ),
    "DescribableTextures": (
        "dtd",
        "images",
        {
            "banded": "banded/banded_{n:04}.jpg",
            "blotchy": "blotchy/blotchy_{n:04}.jpg",
            "lacelike": "lacelike/lacelike_{n:04}.jpg",
            "woven": "woven/woven_{n:04}.jpg",
            "zigzagged": "zigzagged/zigzagged_{n:04}.jpg",
        },
    ),
    "EuroSAT": (
        "eurosat",
        "2750",
        {
            "Annual Crop Land": "AnnualCrop/AnnualCrop_{n}.jpg",
            "Forest": "Forest/Forest_{n}.jpg",
            "Highway or Road": "Highway/Highway_{n}.jpg",
            "River": "River/River_{n}.jpg",
            "Sea or Lake": "SeaLake/SeaLake_{n}.jpg",
        },
    ),
    "UCF101": (
        "ucf101",
        "UCF-101-midframes",
        {
            "Apply_Eye_Makeup": "Apply_Eye_Makeup/v_ApplyEyeMakeup_g{n:02}_c01.jpg",
            "Archery": "Archery/v_Archery_g{n:02}_c01.jpg",
            "Basketball": "Basketball/v_Basketball_g{n:02}_c01.jpg",
            "Tai_Chi": "Tai_Chi/v_TaiChi_g{n:02}_c01.jpg",
            "Yo_Yo": "Yo_Yo/v_YoYo_g{n:02}_c01.jpg",
        },
    ),
}

VARIANTS = ["707-320", "A340-300", "Boeing 717", "F/A-18", "MD-11"]
SYNSETS = {
    "n01440764": "tench",
    "n01443537": "goldfish",
    "n01484850": "great white shark",
    "n02012849": "crane",
    "n03126707": "crane",
    "n04141076": "sax",
    "n06596364": "comic book",
    "n07697537": "hot dog",
    "n09229709": "bubble",
    "n12057211": "yellow lady's slipper",
    "n13133613": "corn cob",
}
SHIFTED = {
    "ImageNetV2": ("imagenetv2", "imagenetv2-matched-frequency-format-val"),
    "ImageNetSketch": ("imagenet-sketch", "images"),
    "ImageNetA": ("imagenet-adversarial", "imagenet-a"),
    "ImageNetR": ("imagenet-rendition", "imagenet-r"),
}
FEW_SHOT = [*SPLIT_TREES, "FGVCAircraft", "ImageNet"]
ALL = [*FEW_SHOT, *SHIFTED]


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def plant(root, name):
    """A tree of the dataset's real layout; returns {part: [(relative path, label, class name)]} as CoOp has it."""
    if name in SPLIT_TREES:
        return plant_split(root, name)
    if name == "FGVCAircraft":
        return plant_aircraft(root)
    return plant_imagenet(root) if name == "ImageNet" else plant_shifted(root, name)


def plant_split(root, name):
    folder, images, classes = SPLIT_TREES[name]
    labels = random.Random(name).sample(range(5), 5)  # a split file's rows do not follow the order of labels
    split, number = {}, 0
    for part, count in PARTS.items():
        split[part] = []
        for label in labels:
            title, pattern = list(classes.items())[label]
            for _ in range(count):
                number += 1
                image = pattern.format(n=number, part="test" if part == "test" else "train")
                touch(root / folder / images / image)
                split[part].append((image, label, title))
    (root / folder / f"split_zhou_{name}.json").write_text(json.dumps(split))
    return split


def plant_aircraft(root):
    folder, split, number = root / "fgvc_aircraft", {}, 34309
    (folder / "images").mkdir(parents=True)
    (folder / "variants.txt").write_text("\n".join(VARIANTS) + "\n")
    for part, count in PARTS.items():
        split[part] = []
        for _ in range(count):
            for label in (3, 0, 4, 1, 2):
                number += 7
                touch(folder / "images" / f"{number:07}.jpg")
                split[part].append((f"{number:07}.jpg", label, VARIANTS[label]))
        lines = [f"{image[:-4]} {name}" for image, _, name in split[part]]
        (folder / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
    return split


def plant_imagenet(root):
    folder, split = root / "imagenet", {"train": [], "val": []}
    split["test"] = split["val"]
    for label, (synset, name) in enumerate(SYNSETS.items()):
        for part, count in (("train", 6), ("val", 3)):
            for number in range(count):
                image = f"{part}/{synset}/{synset}_{number * 37 % 11}.JPEG"
                touch(folder / "images" / image)
                split[part].append((image, label, name))
    (folder / "classnames.txt").write_text("".join(f"{synset} {name}\n" for synset, name in SYNSETS.items()))
    for part in ("train", "val"):
        split[part].sort()
    return split


def plant_shifted(root, name):
    folder, images = SHIFTED[name]
    kept = list(SYNSETS.items())[1::2] if name in ("ImageNetA", "ImageNetR") else list(SYNSETS.items())
    entries = []
    for label, (synset, title) in enumerate(kept):
        for number in range(3):
            image = f"{label if name == 'ImageNetV2' else synset}/{number}.jpg"
            touch(root / folder / images / image)
            entries.append((image, label, title))
    if name in ("ImageNetA", "ImageNetR"):
        (root / folder / images / "README.txt").write_text("read me")
    (root / folder / "classnames.txt").write_text("".join(f"{synset} {title}\n" for synset, title in SYNSETS.items()))
    return {"train": entries, "test": entries}


def cfg(root, shots=-1, seed=1, group="all", folder=""):
    dataset = SimpleNamespace(
        ROOT=str(root), NUM_SHOTS=shots, SUBSAMPLE_CLASSES=group, FOLDER=folder, OUTSIDE_ROOT=False
    )
    return SimpleNamespace(DATASET=dataset, SEED=seed)


def load(name, root, **options):
    return DATASET_REGISTRY.get(name)(cfg(root, **options))


def images_of(root, name):
    cls = DATASET_REGISTRY.get(name)
    return os.path.join(root, cls.dataset_dir, cls.image_dir)


def rows(items, images):
    """(relative path, label, class name) of each Datum."""
    return [(os.path.relpath(item.impath, images), item.label, item.classname) for item in items]


def drawn(entries, shots):
    """CoOp's draw, on the global generator: random.sample per label in the order of first appearance."""
    labels = dict.fromkeys(label for _, label, _ in entries)
    groups = [[entry for entry in entries if entry[1] == label] for label in labels]
    return [entry for group in groups for entry in (random.sample(group, shots) if len(group) >= shots else group)]


# --- the fifteen --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_labels_and_class_names_are_coops(name, tmp_path):
    split, data = plant(tmp_path, name), load(name, tmp_path)
    images = images_of(tmp_path, name)
    assert rows(data.train_x, images) == split["train"] and rows(data.test, images) == split["test"]
    if "val" in split:
        assert rows(data.val, images) == split["val"]
    else:
        assert data.val is None and data.train_x is data.test
    titles = {label: title for _, label, title in split["train"]}
    assert data.classnames == [titles[label] for label in sorted(titles)] and data.num_classes == len(titles)
    assert data.few_shot == {"path": "", "sha256": ""}


def test_numbered_folders_are_places_in_the_list_of_names(tmp_path):
    """Folder 10 of ImageNetV2 comes after folder 9, not after folder 1."""
    plant(tmp_path, "ImageNetV2")
    data = load("ImageNetV2", tmp_path)
    assert data.lab2cname[10] == "corn cob" and data.lab2cname[2] == "great white shark"
    assert {item.label for item in data.test if "/10/" in item.impath} == {10}


@pytest.mark.parametrize("name", FEW_SHOT)
def test_base_and_new_halves(name, tmp_path):
    split = plant(tmp_path, name)
    whole, base, new = (load(name, tmp_path, group=group) for group in ("all", "base", "new"))
    half = math.ceil(whole.num_classes / 2)
    assert base.classnames == whole.classnames[:half] and new.classnames == whole.classnames[half:]
    images = images_of(tmp_path, name)
    expected = [(image, label - half, title) for image, label, title in split["test"] if label >= half]
    assert rows(new.test, images) == expected
    assert rows(base.train_x, images) == [entry for entry in split["train"] if entry[1] < half]


@pytest.mark.parametrize("name", FEW_SHOT)
@pytest.mark.parametrize("shots", [1, 5])
def test_few_shot_subsets_are_coops(name, shots, tmp_path):
    split, data = plant(tmp_path, name), load(name, tmp_path, shots=shots, seed=2)
    random.seed(2)
    train = drawn(split["train"], shots)
    val = split["val"] if name == "ImageNet" else drawn(split["val"], min(shots, 4))
    images = images_of(tmp_path, name)
    assert rows(data.train_x, images) == train and rows(data.val, images) == val
    assert rows(data.test, images) == split["test"]
    again = load(name, tmp_path, shots=shots, seed=2)
    assert rows(again.train_x, images) == train and again.few_shot == data.few_shot
    new = load(name, tmp_path, shots=shots, seed=2, group="new")
    assert new.few_shot == data.few_shot and Counter(item.label for item in new.train_x)[0] == shots


@pytest.mark.parametrize("name", ["ImageNet", "ImageNetSketch", "ImageNetR", "ImageFolder"])
def test_subsets_do_not_depend_on_the_file_systems_order(name, tmp_path, monkeypatch):
    folder = "animals" if name == "ImageFolder" else ""
    for here in ("a", "b"):
        if folder:
            plant_animals(tmp_path / here / folder)
        else:
            plant(tmp_path / here, name)
    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error):
            return None

    ours = load(name, tmp_path / "a", shots=2, folder=folder)
    monkeypatch.setattr(os, "scandir", Reversed)
    theirs = load(name, tmp_path / "b", shots=2, folder=folder)
    first, second = (
        [rows(part, tmp_path / here) for part in (data.train_x, data.test)]
        for here, data in (("a", ours), ("b", theirs))
    )
    assert first == second and len(first[0]) > 0


@pytest.mark.parametrize("name", SHIFTED)
def test_sets_for_testing_alone(name, tmp_path, capsys):
    plant(tmp_path, name)
    data = load(name, tmp_path, shots=16)
    assert "is for testing alone; DATASET.NUM_SHOTS 16 means nothing" in capsys.readouterr().out
    assert len(data.train_x) == len(data.test) and not list(tmp_path.rglob("split_fewshot"))
    with pytest.raises(GramError, match="SUBSAMPLE_CLASSES is 'base'; expected 'all'"):
        load(name, tmp_path, group="base")


# --- what can be wrong with a tree --------------------------------------------------------------------------


def test_a_missing_split_file_says_where_it_is(tmp_path):
    for name, (folder, _, _) in SPLIT_TREES.items():
        (tmp_path / folder).mkdir()
        with pytest.raises(GramError, match=rf"split_zhou_{name}.json: expected a split file .* https://drive"):
            load(name, tmp_path)


def test_missing_and_strange_things_in_class_folders(tmp_path):
    def broken(change, says, name="ImageNet"):
        root = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        plant(root, name)
        change(root / DATASET_REGISTRY.get(name).dataset_dir)
        with pytest.raises(GramError, match=says):
            load(name, root)

    def flat_val(folder):
        shutil.rmtree(folder / "images/val")
        touch(folder / "images/val/ILSVRC2012_val_00000001.JPEG")

    def drop(name):
        return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    broken(drop("images/val"), "images/val: expected class folders like n01440764, found no such folder")
    broken(flat_val, "images/val: expected class folders like n01440764, found none; images that lie there side by")
    broken(drop("images/val/n02012849"), r"images/val: expected the class folders of train, found no n02012849 \(1 of")
    broken(drop("classnames.txt"), "classnames.txt: expected lines of .* CoOp has it from https://drive")
    broken(lambda f: touch(f / "images/train/zebra/a.JPEG"), "zebra: expected a class folder that classnames.txt names")
    broken(
        lambda f: (
            (f / "images/train/n00000001").mkdir()
            or (f / "classnames.txt").write_text("n00000001 nothing\n" + (f / "classnames.txt").read_text())
        ),
        "n00000001: expected images of 'nothing', found none",
    )
    broken(drop("imagenetv2-matched-frequency-format-val/3"), "val/3: expected the images of 'crane'", "ImageNetV2")
    broken(drop("variants.txt"), "variants.txt: expected the file that comes with the images", "FGVCAircraft")
    broken(
        lambda f: (f / "images_variant_val.txt").write_text("0034316 Zeppelin NT\n"),
        "images_variant_val.txt, line 1: expected \"image variant\", found '0034316 Zeppelin NT'",
        "FGVCAircraft",
    )
    broken(drop("images/0034316.jpg"), r"0034316.jpg: .* \(1 of 70 images are missing\)", "FGVCAircraft")


# --- pickles ------------------------------------------------------------------------------------------------


def coop_pickle(root, name, shots, seed, places):
    """Write a few-shot pickle as CoOp does, of a root elsewhere."""
    folder = root / DATASET_REGISTRY.get(name).dataset_dir / "split_fewshot"
    folder.mkdir(exist_ok=True)
    pickles.write_pickle(folder / f"shot_{shots}-seed_{seed}.pkl", places)
    return folder / f"shot_{shots}-seed_{seed}.pkl"


@pytest.mark.parametrize("name", FEW_SHOT)
def test_coops_pickles_are_taken_over(name, tmp_path, capsys):
    """Another draw than ours, made under another root by CoOp: it is used, stored as JSON, and given the new paths."""
    split = plant(tmp_path, name)
    cls, images = DATASET_REGISTRY.get(name), images_of(tmp_path, name)
    elsewhere = os.path.join("/scratch/old data", cls.dataset_dir, cls.image_dir)
    random.seed(99)
    kept = {"train": drawn(split["train"], 2)} | ({} if name == "ImageNet" else {"val": drawn(split["val"], 2)})
    path = coop_pickle(
        tmp_path,
        name,
        2,
        1,
        {
            part: [(os.path.join(elsewhere, image), label, title) for image, label, title in entries]
            for part, entries in kept.items()
        },
    )
    data = load(name, tmp_path, shots=2)
    assert rows(data.train_x, images) == kept["train"]
    assert f"Loading preprocessed few-shot data from {path}" in capsys.readouterr().out
    stored = json.loads(path.with_suffix(".json").read_text())
    assert [tuple(row) for row in stored["train"]] == kept["train"]
    with open(path, "rb") as file:
        renewed = pickle.load(file)  # as CoOp's own code does
    assert set(renewed) == set(kept) and type(renewed["train"][0]) is Datum
    for part, entries in kept.items():
        assert rows(renewed[part], images) == entries
        assert all(os.path.isfile(item.impath) and item.domain == 0 for item in renewed[part])


def test_the_export_follows_the_root(tmp_path):
    plant(tmp_path / "a", "EuroSAT")
    first = load("EuroSAT", tmp_path / "a", shots=2)
    shutil.move(tmp_path / "a", tmp_path / "b")
    second = load("EuroSAT", tmp_path / "b", shots=2)
    assert [item.impath.replace("/a/", "/b/") for item in first.train_x] == [item.impath for item in second.train_x]
    path = tmp_path / "b/eurosat/split_fewshot/shot_2-seed_1.pkl"
    with open(path, "rb") as file:
        assert [item.impath for item in pickle.load(file)["train"]] == [item.impath for item in second.train_x]
    before = path.stat().st_mtime_ns
    load("EuroSAT", tmp_path / "b", shots=2)
    assert path.stat().st_mtime_ns == before  # not written again for nothing


def test_json_wins_over_a_pickle_that_disagrees(tmp_path, capsys):
    split = plant(tmp_path, "EuroSAT")
    ours = load("EuroSAT", tmp_path, shots=2)
    images = images_of(tmp_path, "EuroSAT")
    random.seed(99)
    other = {
        part: [(os.path.join(images, image), label, title) for image, label, title in drawn(split[part], 2)]
        for part in ("train", "val")
    }
    path = coop_pickle(tmp_path, "EuroSAT", 2, 1, other)
    content = path.read_bytes()
    again = load("EuroSAT", tmp_path, shots=2)
    assert rows(again.train_x, images) == rows(ours.train_x, images) and path.read_bytes() == content
    assert "holds another subset than the JSON beside it; the JSON holds here" in capsys.readouterr().out


class Evil:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (self.place,)


def evil_pickles(place):
    yield pickle.dumps({"train": [Evil(place)], "val": []}, 2)
    yield pickle.dumps(Evil(place), 0)
    yield (
        b"\x80\x02cgram_meta.datasets.pickles\nos.mkdir\nX"
        + len(place).to_bytes(4, "little")
        + place.encode()
        + b"\x85R."
    )
    # Datum itself is no way in: neither its attributes nor calls of it
    yield b"\x80\x04\x8c\x20dassl.data.datasets.base_dataset\x8c\x0eDatum.__init__\x93."
    yield b"\x80\x02cdassl.data.datasets.base_dataset\nDatum\nX\x01\x00\x00\x00a\x85R."
    yield b"\x80\x02Pid\n."
    yield b"not a pickle"
    yield b""


def test_a_malicious_pickle_does_not_run(tmp_path):
    place = str(tmp_path / "was_here")
    plant(tmp_path, "EuroSAT")
    path = tmp_path / "eurosat/split_fewshot/shot_2-seed_1.pkl"
    path.parent.mkdir()
    for content in evil_pickles(place):
        path.write_bytes(content)
        with pytest.raises(GramError, match="shot_2-seed_1.pkl: expected CoOp's few-shot records .* without running"):
            load("EuroSAT", tmp_path, shots=2)
        assert not os.path.exists(place)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with pytest.raises(FileExistsError):  # the same bytes do run in an ordinary unpickler
        for _ in range(2):
            pickle.loads(pickle.dumps(Evil(place)))


def test_a_refused_pickle_beside_a_json_is_left_alone(tmp_path, capsys):
    plant(tmp_path, "EuroSAT")
    load("EuroSAT", tmp_path, shots=2)
    path = tmp_path / "eurosat/split_fewshot/shot_2-seed_1.pkl"
    path.write_bytes(pickle.dumps(Evil(str(tmp_path / "was_here"))))
    load("EuroSAT", tmp_path, shots=2)
    assert "it is left alone, the JSON beside it holds" in capsys.readouterr().out
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda row: (row[0], row[1] + 1, row[2]), "the label 1, expected 0 as in the split_zhou_EuroSAT.json"),
        (lambda row: ("/data/eurosat/2750/Forest/none.jpg", *row[1:]), "which is no train image"),
        (lambda row: ("", *row[1:]), "which is no train image"),
    ],
)
def test_pickles_of_another_split_are_refused(tmp_path, change, says):
    split = plant(tmp_path, "EuroSAT")
    images = images_of(tmp_path, "EuroSAT")
    entries = {
        part: [(os.path.join(images, image), *rest) for image, *rest in sorted(split[part], key=lambda r: r[1])]
        for part in ("train", "val")
    }
    entries = {part: [entry for entry in of_part if entry[1] == 0][:1] for part, of_part in entries.items()}
    entries["train"] = [change(row) for row in entries["train"]]
    coop_pickle(tmp_path, "EuroSAT", 1, 1, entries)
    with pytest.raises(GramError, match=says):
        load("EuroSAT", tmp_path, shots=1)


def test_odd_pickles_are_one_sentence(tmp_path):
    split = plant(tmp_path, "EuroSAT")
    path = tmp_path / "eurosat/split_fewshot/shot_1-seed_1.pkl"
    path.parent.mkdir()
    images = images_of(tmp_path, "EuroSAT")
    entries = [(os.path.join(images, image), *rest) for image, *rest in split["train"]]
    for contents, says in (
        ([], 'found no list under "train"'),
        ({"train": [], "test": []}, "found 'test' beside them"),
        ({"train": 5}, "found no list under 'train'"),
        ({"train": [], "val": 5}, "found no list under 'val'"),
        ({"train": [], "val": []}, "expected training images of all 5 classes, found none of 5 of them"),
        ({"train": ["a.jpg"], "val": []}, "without an image, a label or a class name"),
    ):
        path.write_bytes(pickle.dumps(contents))
        with pytest.raises(GramError, match=says):
            load("EuroSAT", tmp_path, shots=1)
    for places, says in (
        ({"train": entries, "val": []}, "expected at most 1 images of a class, found 6"),
        ({"train": entries[:1]}, "expected images under 'val', found none"),
    ):
        pickles.write_pickle(path, places)
        with pytest.raises(GramError, match=says):
            load("EuroSAT", tmp_path, shots=1)


def test_other_names_in_a_pickle_are_reported(tmp_path, capsys):
    split = plant(tmp_path, "ImageNet")
    images = images_of(tmp_path, "ImageNet")
    entries = [
        (os.path.join(images, image), label, "crane bird" if label == 3 else title)
        for image, label, title in split["train"][::6]
    ]
    coop_pickle(tmp_path, "ImageNet", 1, 1, {"train": entries})
    assert load("ImageNet", tmp_path, shots=1).classnames[3] == "crane"
    assert "calls 1 classes by other names ('crane bird' for 'crane', ...)" in capsys.readouterr().out


def test_a_read_only_root_serves_everything(tmp_path, monkeypatch, capsys):
    def refuse(*args, **options):
        raise PermissionError(30, "Read-only file system")

    writable, read_only = tmp_path / "a", tmp_path / "b"
    for root in (writable, read_only):
        for name in ("EuroSAT", "ImageNet"):
            plant(root, name)
        plant_animals(root / "animals")
    for name in ("EuroSAT", "ImageNet", "ImageFolder"):
        expected = load(name, writable, shots=2, folder="animals")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", refuse)  # the first step of every write
            data = load(name, read_only, shots=2, folder="animals")
        assert rows(data.train_x, read_only) == rows(expected.train_x, writable)
        assert data.few_shot == {"path": "", "sha256": expected.few_shot["sha256"]}
        assert "cannot be written (Read-only file system)" in capsys.readouterr().out
    assert not list(read_only.rglob("*.pkl")) and not list(read_only.rglob("split_fewshot"))


# --- ImageFolder --------------------------------------------------------------------------------------------


def plant_animals(folder, count=10):
    for name in ("sea_lion", "dog", "red_fox"):
        for number in range(count):
            touch(folder / name / f"{number}.jpg")
    touch(folder / "dog/puppies/small.png")
    for odd in ("dog/.hidden.jpg", "dog/notes.txt", ".git/a.jpg", "empty/readme.txt", "stray.jpg"):
        touch(folder / odd)


def test_class_folders_are_split_by_a_fixed_rule(tmp_path, capsys):
    plant_animals(tmp_path / "animals")
    data = load("ImageFolder", tmp_path, folder="animals")
    assert data.classnames == ["dog", "red fox", "sea lion"]
    counts = [Counter(item.classname for item in part) for part in (data.train_x, data.val, data.test)]
    assert [counter["red fox"] for counter in counts] == [5, 2, 3]
    assert [counter["dog"] for counter in counts] == [6, 2, 3]  # 11 images: 5.5 is rounded to the even number
    used = [item.impath for part in (data.train_x, data.val, data.test) for item in part]
    assert len(used) == len(set(used)) == 31
    assert "the split is kept in" in capsys.readouterr().out
    stored = (tmp_path / "animals/split.json").read_text()
    assert str(tmp_path) not in stored
    touch(tmp_path / "animals/dog/late.jpg")
    again = load("ImageFolder", tmp_path, folder="animals")
    assert [item.impath for item in again.train_x] == [item.impath for item in data.train_x]
    assert "does not know 1 images that are there" in capsys.readouterr().out
    shutil.move(tmp_path / "animals/sea_lion", tmp_path / "gone")
    with pytest.raises(GramError, match=r"sea_lion/\d.jpg: split.json names this image, found no such file \(10 of 31"):
        load("ImageFolder", tmp_path, folder="animals")
    shutil.move(tmp_path / "gone", tmp_path / "animals/sea_lion")
    (tmp_path / "animals/split.json").unlink()
    other = load("ImageFolder", tmp_path, folder="animals")  # other classes keep their split
    assert rows(other.test, tmp_path)[4:] == rows(data.test, tmp_path)[3:]


def test_split_folders_are_taken_as_they_are(tmp_path):
    folder = tmp_path / "mine"
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        for name in ("n2", "n1"):
            for number in range(count):
                touch(folder / part / name / f"{number}.jpg")
    (folder / "classnames.txt").write_text("n1 sea lion\nn2 dog\n")
    data = load("ImageFolder", tmp_path, folder="mine", shots=2)
    assert data.classnames == ["sea lion", "dog"] and not (folder / "split.json").exists()
    assert (len(data.train_x), len(data.val), len(data.test)) == (4, 4, 6)
    assert all("/train/" in item.impath for item in data.train_x)
    shutil.rmtree(folder / "test")  # as ImageNet: val is for testing
    data = load("ImageFolder", tmp_path, folder="mine")
    assert data.val == [] and all("/val/" in item.impath for item in data.test) and len(data.test) == 4
    shutil.rmtree(folder / "val")
    data = load("ImageFolder", tmp_path, folder="mine")
    assert data.classnames == ["sea lion", "dog"] and len(data.test) == 2


def test_unusable_folders_are_one_sentence(tmp_path):
    with pytest.raises(GramError, match="DATASET.FOLDER is ''; expected the folder"):
        load("ImageFolder", tmp_path)
    with pytest.raises(GramError, match="nowhere: expected the folder of ImageFolder under DATASET.ROOT"):
        load("ImageFolder", tmp_path, folder="nowhere")
    touch(tmp_path / "flat/a.jpg")
    with pytest.raises(GramError, match="flat: expected class folders with images, found none"):
        load("ImageFolder", tmp_path, folder="flat")
    touch(tmp_path / "one/dog/a.jpg")
    with pytest.raises(GramError, match="dog/a.jpg: expected at least two images of 'dog'"):
        load("ImageFolder", tmp_path, folder="one")
    for image in ("train/dog/a.jpg", "test/dog/b.jpg", "test/cat/c.jpg"):
        touch(tmp_path / "parts" / image)
    with pytest.raises(GramError, match="test/cat: expected a class that has training images"):
        load("ImageFolder", tmp_path, folder="parts")
    touch(tmp_path / "parts/train/cat/d.jpg")
    load("ImageFolder", tmp_path, folder="parts", shots=1)
    touch(tmp_path / "parts/train/cat/e.jpg")
    with pytest.raises(GramError, match="was drawn from something else than the class folders there now"):
        load("ImageFolder", tmp_path, folder="parts", shots=1)


def test_equal_names_are_reported(tmp_path, capsys):
    for name in ("n1", "n2"):
        for number in range(4):
            touch(tmp_path / "cranes" / name / f"{number}.jpg")
    (tmp_path / "cranes/classnames.txt").write_text("n1 crane\nn2 crane\n")
    load("ImageFolder", tmp_path, folder="cranes")
    assert "classes of the same name: 'crane' (0, 1); no text tells them apart" in capsys.readouterr().out


# --- gram check-data ----------------------------------------------------------------------------------------


@pytest.fixture
def small_numbers(monkeypatch):
    """The published numbers, replaced by those of the small trees."""
    from gram_meta.datasets.base import Published

    for name in ALL:
        cls = DATASET_REGISTRY.get(name)
        shifted = name in SHIFTED
        classes = len(SYNSETS) if name.startswith("ImageNet") else 5
        classes = 5 if name in ("ImageNetA", "ImageNetR") else classes
        train = None if shifted else 6 * classes
        val = 5 * classes if name not in SHIFTED and name != "ImageNet" else None
        new = Published((classes, train, val, 3 * classes), cls.published.sources, cls.published.note)
        monkeypatch.setattr(cls, "published", new)


def checked(root, *options, capsys):
    status = main(["check-data", str(root), "--json", *options])
    return status, {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}


def test_everything_that_is_fine_is_fine(tmp_path, small_numbers, capsys):
    for name in ALL:
        plant(tmp_path, name)
    status, found = checked(tmp_path, capsys=capsys)
    assert status == 0 and list(found) == list(checking.PAPER) and len(found) == 15
    assert {finding["state"] for finding in found.values()} == {"fine"}
    assert found["imagenet"]["images"] == {"train": 66, "test": 33}
    assert main(["check-data", str(tmp_path)]) == 0
    assert "15 fine" in capsys.readouterr().out


def test_what_is_missing_or_wrong_is_reported(tmp_path, small_numbers, capsys):
    for name in ("EuroSAT", "Food101", "OxfordPets", "SUN397", "ImageNet"):
        plant(tmp_path, name)
    (tmp_path / "eurosat/2750/Forest" / sorted(os.listdir(tmp_path / "eurosat/2750/Forest"))[0]).unlink()
    (tmp_path / "food-101/split_zhou_Food101.json").unlink()
    split = json.loads((tmp_path / "oxford_pets/split_zhou_OxfordPets.json").read_text())
    split["val"].pop()
    (tmp_path / "oxford_pets/split_zhou_OxfordPets.json").write_text(json.dumps(split))
    shutil.rmtree(tmp_path / "sun397/SUN397")
    next((tmp_path / "imagenet/images/train/n01440764").iterdir()).unlink()
    (tmp_path / "imagenet/preprocessed.pkl").write_bytes(b"cache")
    names = ["eurosat", "food101,OxfordPets", "sun397", "imagenet", "DTD"]
    status, found = checked(tmp_path, "--datasets", *names, capsys=capsys)
    assert status == 1
    problems = {name: " ".join(finding["problems"]) for name, finding in found.items()}
    assert "1 of 70 images are missing, such as Forest/Forest_" in problems["eurosat"]
    assert "expected a split file in CoOp's format" in problems["food101"]
    assert "expected 25 val images, found 24" in problems["oxford_pets"]
    assert "SUN397: expected the folder of images, found no such folder" in problems["sun397"]
    assert "expected 66 train images, found 65" in problems["imagenet"]
    assert found["dtd"]["state"] == "missing" and found["eurosat"]["state"] == "wrong"
    assert "preprocessed.pkl is a cache of CoOp's own code" in found["imagenet"]["notes"][0]
    assert main(["check-data", str(tmp_path), "--datasets", *names]) == 1
    text = capsys.readouterr().out
    assert "split_zhou_Food101.json: https://drive.google.com" in text and "CoOp's issue 90" in text
    assert "1 missing, 5 wrong" in text


def test_absent_datasets_take_one_line_unless_asked_for(tmp_path, small_numbers, capsys):
    plant(tmp_path, "EuroSAT")
    assert main(["check-data", str(tmp_path)]) == 1
    table, absent, counts = capsys.readouterr().out.strip().split("\n\n")
    assert [row.split()[:2] for row in table.splitlines()[2:]] == [["eurosat", "fine"]]
    names = ", ".join(name for name in checking.PAPER if name != "eurosat")
    assert absent == f"Not in this folder: {names} (--datasets NAME prints where to get one)"
    assert counts == "1 fine, 14 missing"
    assert main(["check-data", str(tmp_path), "--datasets", "dtd", "eurosat"]) == 1
    text = capsys.readouterr().out
    assert "dtd: no such folder" in text and "dtd-r1.0.1.tar.gz" in text and "Not in this folder" not in text
    (tmp_path / "empty").mkdir()
    assert main(["check-data", str(tmp_path / "empty")]) == 1
    assert capsys.readouterr().out.startswith("Not in this folder: imagenet, caltech101")


def test_few_shot_files_are_looked_at(tmp_path, small_numbers, capsys):
    plant(tmp_path / "a", "EuroSAT")
    load("EuroSAT", tmp_path / "a", shots=2)
    shutil.move(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/eurosat/split_fewshot/shot_4-seed_1.pkl").write_bytes(b"broken")
    capsys.readouterr()
    status, found = checked(tmp_path / "b", "--datasets", "eurosat", capsys=capsys)
    assert status == 0 and "the next run that uses it renews it" in found["eurosat"]["notes"][0]
    assert "refused without running it" in found["eurosat"]["notes"][1]
    path = tmp_path / "b/eurosat/split_fewshot/shot_2-seed_1.json"
    path.write_text(path.read_text().replace('"split_sha256": "', '"split_sha256": "0'))
    status, found = checked(tmp_path / "b", "--datasets", "eurosat", capsys=capsys)
    assert status == 1 and "was drawn from other images" in found["eurosat"]["problems"][0]


def test_deep_opens_images_of_any_folder(tmp_path, capsys):
    plant_animals(tmp_path / "animals", count=2)
    for path in (tmp_path / "animals").rglob("*.jpg"):
        Image.new("RGB", (2, 2)).save(path)
    (tmp_path / "animals/dog/0.jpg").write_bytes(b"no image")
    status, found = checked(tmp_path, "--datasets", "animals", capsys=capsys)
    assert status == 0 and found["animals"]["classes"] == 3
    assert not (tmp_path / "animals/split.json").exists()  # nothing is written
    status, found = checked(tmp_path, "--datasets", "animals", "--deep", capsys=capsys)
    assert status == 1 and found["animals"]["problems"] == [
        f"{tmp_path / 'animals'}: empty file: 1: dog/puppies/small.png",
        f"{tmp_path / 'animals'}: not an image: 1: dog/0.jpg",
    ]


def test_unknown_names_and_roots_are_one_sentence(tmp_path, capsys):
    assert main(["check-data", str(tmp_path), "--datasets", "caltech"]) == 2
    assert "--datasets caltech: expected the name of a dataset" in capsys.readouterr().err
    assert main(["check-data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: expected the folder that holds the datasets' folders" in capsys.readouterr().err


def test_published_numbers_and_configs():
    """Totals that the datasets' authors state: the parts have to add up to them."""
    totals = {
        "Caltech101": 8242,
        "OxfordPets": 7349,
        "StanfordCars": 16185,
        "OxfordFlowers": 8189,
        "Food101": 101000,
        "FGVCAircraft": 10000,
        "SUN397": 39700,
        "DescribableTextures": 5640,
        "EuroSAT": 27000,
        "UCF101": 13320,
        "ImageNet": 1331167,
        "ImageNetV2": 10000,
        "ImageNetSketch": 50889,
        "ImageNetA": 7500,
        "ImageNetR": 30000,
    }
    found = dict(checking.find_datasets(Path("/"), checking.PAPER))
    assert {cls.__name__ for cls in found.values()} == set(totals) == set(ALL)
    for cls in found.values():
        published = cls.published
        assert sum(filter(None, published.counts[1:])) == totals[cls.__name__]
        assert cls.split_file in ("", f"split_zhou_{cls.__name__}.json") and issubclass(cls, SplitDataset)
        assert cls.split_file == "" or "drive.google.com" in published.sources[cls.split_file]
