"""Labelled collections: class folders as pairs, and their classes as the topics of a hierarchy (Table 6, row 4)."""

import json
import logging
import os
from collections import Counter

import numpy as np
import pytest
from helpers import corpora
from helpers.corpora import good, skips
from PIL import Image

from gram_meta.cli import main
from gram_meta.clustering.chc import cluster_pairs
from gram_meta.clustering.hierarchy import Hierarchy
from gram_meta.config import load_meta_config
from gram_meta.corpus.sources import all_rows, classes, open_source
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError
from gram_meta.method.tasks import TaskConfig, TaskSampler


def tree(root, *images):
    for image in images:
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        (root / image).write_bytes(b"")
    return root


def rows_of(path, **options):
    return corpora.rows_of(path, format="classes", **options)


def test_folders_name_the_classes(tmp_path):
    tree(tmp_path, "sea_lion/b.jpg", "sea_lion/a.JPEG", "dog/deep/er/c.png", "dog/notes.txt", "stray.jpg")
    tree(tmp_path, ".cache/x.jpg", "__MACOSX/y.jpg", "dog/.hidden.jpg", "dog/.thumbs/z.jpg")
    rows = rows_of(tmp_path)
    assert good(rows) == [("dog/deep/er/c.png", "dog"), ("sea_lion/a.JPEG", "sea lion"), ("sea_lion/b.jpg", "sea lion")]
    assert skips(rows) == {classes.NO_CLASS: 1}


@pytest.mark.parametrize("below", ["train", "images/train", "Training", "images/trainset"])
def test_training_images_of_a_collection_with_splits(tmp_path, below):
    """ImageNet's layout: val/ is not read, and classnames.txt names the synsets."""
    tree(tmp_path / below, "n01440764/a.JPEG", "n02012849/b.JPEG", "n99999999/c.JPEG")
    tree(tmp_path / below / "../val", "n01440764/v.JPEG")
    (tmp_path / "classnames.txt").write_text("n01440764 tench\nn02012849\tcrane bird\nn0 elsewhere\n")
    for given in (tmp_path, tmp_path / below):
        rows = rows_of(given)
        assert good(rows) == [("n01440764/a.JPEG", "tench"), ("n02012849/b.JPEG", "crane bird")]
        assert skips(rows) == {classes.NOT_LISTED: 1}
    other = tmp_path / "other.txt"
    other.write_text("n99999999 thing, object\n")
    assert good(rows_of(tmp_path, classnames=other)) == [("n99999999/c.JPEG", "thing, object")]


def test_listed_folders_may_lie_deeper(tmp_path):
    """WebVision's layout: queries of two search engines."""
    tree(tmp_path, "google/q0001/a.jpg", "flickr/q0001/b.jpg", "flickr/q0002/c.jpg", "google/loose.jpg")
    (tmp_path / "classnames.txt").write_text("q0001 tench\nq0002 tench\n")
    source = open_source(tmp_path, format="classes")
    assert source.class_depth == 2
    rows = list(all_rows(source))
    assert len(good(rows)) == 3 and {name for _, name in good(rows)} == {"tench"}
    assert skips(rows) == {classes.NO_CLASS: 1}
    assert [classes.class_of(location, 2) for location, _ in good(rows)] == ["q0001", "q0002", "q0001"]


def test_a_class_called_train_is_a_class(tmp_path):
    tree(tmp_path, "train/a.jpg", "train/steam/b.jpg", "bus/c.jpg")
    assert good(rows_of(tmp_path)) == [("bus/c.jpg", "bus"), ("train/a.jpg", "train"), ("train/steam/b.jpg", "train")]


def test_links_to_class_folders_are_followed(tmp_path):
    tree(tmp_path / "all", "n1/a.jpg", "n2/b.jpg")
    (tmp_path / "subset").mkdir()
    os.symlink(tmp_path / "all/n2", tmp_path / "subset/n2")
    assert good(rows_of(tmp_path / "subset")) == [("n2/b.jpg", "n2")]


def test_equal_names_and_empty_classes_are_reported(tmp_path, caplog):
    tree(tmp_path, "n1/a.jpg", "n2/b.jpg", "n3/notes.txt")
    (tmp_path / "classnames.txt").write_text("n1 crane\nn2 Crane\nn3 dog\n")
    with caplog.at_level(logging.INFO):
        rows_of(tmp_path)
    assert "classes of the same name: 'crane' (n1, n2)" in caplog.text
    assert "class folders without an image (1): n3" in caplog.text and "3 classes named by" in caplog.text


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("n1\n", "line 1: expected \"folder class name\", found 'n1'"),
        ("n1 dog\n\nn1 cat\n", "line 3: expected each folder once, found 'n1' again"),
        ("\n \n", "found none"),
        ("n7 dog\n", "expected the names of folders below .*'n1', found none of them"),
        (b"n1 \xff", "expected UTF-8"),
    ],
)
def test_broken_lists_are_one_sentence(tmp_path, names, says):
    tree(tmp_path, "n1/a.jpg")
    (tmp_path / "classnames.txt").write_bytes(names if isinstance(names, bytes) else names.encode())
    with pytest.raises(GramError, match=says) as error:
        rows_of(tmp_path)
    assert "classnames.txt" in str(error.value)


def test_unusable_collections_are_one_sentence(tmp_path):
    with pytest.raises(GramError, match="nowhere: expected a folder of class folders, found no folder"):
        rows_of(tmp_path / "nowhere")
    with pytest.raises(GramError, match="expected class folders, found none"):
        rows_of(tree(tmp_path / "flat", "a.jpg"))
    with pytest.raises(GramError, match="expected images in class folders, found none"):
        rows_of(tree(tmp_path / "empty", "dog/notes.txt"))
    with pytest.raises(GramError, match="names.txt: expected lines of .* found no such file"):
        rows_of(tree(tmp_path / "list", "dog/a.jpg"), classnames=tmp_path / "names.txt")
    with pytest.raises(GramError, match="an image column does not belong to a folder of class folders"):
        rows_of(tmp_path / "list", image_column="image")
    with pytest.raises(GramError, match="belongs to a folder of class folders"):
        open_source(tmp_path / "list", classnames=tmp_path / "names.txt")
    with pytest.raises(GramError, match="format: expected auto, .* found 'folders'"):
        open_source(tmp_path, format="folders")
    with pytest.raises(GramError, match="give --format classes"):
        list(all_rows(open_source(tmp_path / "list")))


def test_a_list_of_another_collection_above_is_not_used(tmp_path):
    tree(tmp_path / "mine", "dog/a.jpg")
    (tmp_path / "classnames.txt").write_text("n1 tench\n")
    assert good(rows_of(tmp_path / "mine")) == [("dog/a.jpg", "dog")]


# --- from folders to tasks ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Six synsets of 20 pictures in two looks, two of them cranes, and one with too few pictures."""
    root, random = tmp_path_factory.mktemp("collection"), np.random.default_rng(0)
    names = ["tench", "crane", "sea lion", "crane", "dog", "cat", "rare bird"]
    (root / "classnames.txt").write_text("".join(f"n{k} {name}\n" for k, name in enumerate(names)))
    for k in range(len(names)):
        (root / f"train/n{k}").mkdir(parents=True)
        for number in range(20 if k < 6 else 3):
            pixels = random.integers(0, 90, (24, 24, 3)) + 160 * (number % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"train/n{k}/{number}.png")
    (root / "train/n4/broken.png").write_bytes(b"\x89PNG")
    return root


@pytest.fixture(scope="module")
def commands(collection, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    options = ["--backbone", "random-tiny", "--sentence-model", "hash:64", "--part-size", "32"]
    assert main(["embed", str(collection), "-o", str(out / "store"), "--format", "classes", *options]) == 0
    settings = ["TASKS.SUPPORT_SHOTS", "2", "TASKS.QUERY_SHOTS", "6", "CHC.DOMAINS.K", "2", "CHC.LABELLED", "True"]
    assert main(["cluster", str(out / "store"), "-o", str(out / "hierarchy"), *settings]) == 0
    return out


@pytest.mark.slow
def test_captions_are_class_names(commands):
    store = PairStore.open(commands / "store")
    assert len(store) == 123 and store.manifest["skipped"] == {"not an image": 1}
    assert Counter(store.captions) == {"tench": 20, "crane": 40, "sea lion": 20, "dog": 20, "cat": 20, "rare bird": 3}
    # a caption's features are the same in all of its pairs, and different from others'
    features = np.asarray(store.sentence_features)
    rows = [row for row, caption in enumerate(store.captions) if caption == "crane"]
    assert (features[rows] == features[rows[0]]).all() and (features[rows[0]] != features[0]).any()


def test_similarities_are_those_of_single_captions(commands, collection, tmp_path):
    """Each caption is encoded once per part; the features are those of a table of the same pairs."""
    store = PairStore.open(commands / "store")
    lines = [f"train/{location}\t{store.captions[row]}" for row, location in enumerate(store.locations)]
    (tmp_path / "pairs.tsv").write_text("image\tcaption\n" + "\n".join(lines))
    options = ["--backbone", "random-tiny", "--sentence-model", "hash:64", "--image-root", str(collection)]
    assert main(["embed", str(tmp_path / "pairs.tsv"), "-o", str(tmp_path / "store"), *options]) == 0
    table = PairStore.open(tmp_path / "store")
    np.testing.assert_allclose(store.similarity, table.similarity, atol=2e-3)
    assert (np.asarray(store.sentence_features) == np.asarray(table.sentence_features)).all()


def test_classes_are_the_topics(commands, capsys):
    store, hierarchy = PairStore.open(commands / "store"), Hierarchy.open(commands / "hierarchy")
    assert sorted(topic.word for topic in hierarchy.topics) == ["cat", "crane", "crane", "dog", "sea lion", "tench"]
    folders = [store.locations[row].split("/")[0] for row in hierarchy.image]
    for number, topic in enumerate(hierarchy.topics):
        of_topic = {folder for folder, of in zip(folders, hierarchy.topic, strict=True) if of == number}
        assert len(of_topic) == 1 and sum(topic.domains) == topic.images == topic.size == 20
        assert min(topic.domains) >= 5 and len(topic.domains) == 2
    assert hierarchy.manifest["labelled"] is True and hierarchy.manifest["topics_found"] == 7
    assert hierarchy.manifest["topics_dropped"]["topic with too few images"] == 1
    assert hierarchy.manifest["pairs"] == {
        "in": 123,
        "kept": 120,
        "filtered": 0,
        "noise": 0,
        "topic without a word": 0,
        "topic with too few images": 3,
        "topic without two domains": 0,
        "excluded": 0,
    }
    capsys.readouterr()
    assert main(["inspect", str(commands / "hierarchy")]) == 0
    text = capsys.readouterr().out
    assert "6 topics with 5 different words, of 7 found; reproducible; labelled" in text and "sea lion" in text
    assert main(["inspect", str(commands / "hierarchy"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labelled"] is True


def test_tasks_never_hold_both_cranes(commands):
    hierarchy = Hierarchy.open(commands / "hierarchy")
    sampler = TaskSampler(hierarchy, TaskConfig(5, 2, 6), seed=0)
    for number in range(20):
        assert sorted(sampler.draw(number).words) == ["cat", "crane", "dog", "sea lion", "tench"]


def test_without_the_key_a_labelled_store_says_so(commands, caplog):
    store = PairStore.open(commands / "store")
    settings = ["CHC.TOPICS.REDUCTION", "pca", "CHC.TOPICS.MIN_CLUSTER_SIZE", "10", "CHC.DOMAINS.K", "2"]
    config = load_meta_config([], [*settings, "TASKS.SUPPORT_SHOTS", "2", "TASKS.QUERY_SHOTS", "6"])
    with caplog.at_level(logging.INFO):
        assert cluster_pairs(store, config).manifest["labelled"] is False
    assert "CHC.LABELLED True makes its classes the topics" in caplog.text


@pytest.mark.slow
def test_captions_of_any_store_can_be_classes(collection, tmp_path, caplog, capsys):
    lines = ["image\tcaption"]
    for k in range(6):
        lines += [f"train/n{k}/{number}.png\t{['big', 'small'][k % 2]} thing" for number in range(20)]
    (collection / "labels.tsv").write_text("\n".join(lines))
    options = ["--backbone", "random-tiny", "--sentence-model", "hash:64"]
    assert main(["embed", str(collection / "labels.tsv"), "-o", str(tmp_path / "store"), *options]) == 0
    store, shots = PairStore.open(tmp_path / "store"), ["TASKS.SUPPORT_SHOTS", "2", "TASKS.QUERY_SHOTS", "6"]
    hierarchy = cluster_pairs(store, load_meta_config([], ["CHC.LABELLED", "True", *shots]))
    assert [(topic.word, topic.size) for topic in hierarchy.topics] == [("big thing", 60), ("small thing", 60)]
    with pytest.raises(GramError, match="are captions names of classes?"):
        cluster_pairs(store, load_meta_config([], ["CHC.LABELLED", "True", "TASKS.QUERY_SHOTS", "90"]))
