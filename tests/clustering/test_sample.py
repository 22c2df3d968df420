"""Clustering of many pairs: topics of a sample, the rule that assigns the others, k-means on a sample, what is left
out,
and runs that were interrupted."""

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score as ami

from gram_meta.cli import main
from gram_meta.clustering import chc, domains, sample, topics
from gram_meta.clustering import hierarchy as h
from gram_meta.clustering.chc import cluster_pairs
from gram_meta.clustering.domains import domains_of
from gram_meta.clustering.hierarchy import Hierarchy
from gram_meta.clustering.sample import Steps
from gram_meta.clustering.settings import ChcSettings
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError

pytestmark = pytest.mark.slow


def _shared():
    """The features with a known truth of test_clustering.py; a test file is no package."""
    path = Path(__file__).with_name("test_chc.py")
    spec = importlib.util.spec_from_file_location("shared_by_clustering_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shared = _shared()
make_config, make_store, unit = shared.make_config, shared.make_store, shared.unit

# --- the rule -------------------------------------------------------------------------------------------------------


def test_votes_by_hand():
    label = np.array([[0, 1, 1, -1], [-1, -1, -1, -1], [2, -1, -1, -1]])
    same = np.full((3, 4), 0.8)
    topic, share = sample.vote(label, same)  # equal cosines: every neighbour has one vote
    assert topic.tolist() == [1, -1, 2] and share.tolist() == pytest.approx([0.5, 0, 0.25])
    apart = np.array([[0.9, 0.7, 0.7, 0.7]])  # 0.2 farther: e^-2 = 0.1353 each
    topic, share = sample.vote(label[:1], apart)
    assert topic.tolist() == [0] and share[0] == pytest.approx(1 / (1 + 3 * 0.135335), abs=1e-5)


def test_thresholds_by_hand(monkeypatch):
    # Ten pairs, two of them noise by clustering: the common threshold drops the two least sure ones.
    topic = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    share = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 1.0, 0.95, 0.3, 0.2, 0.1])
    label = np.array([0, 0, 0, 0, 0, 1, 1, 1, -1, -1])
    common = np.quantile(share, 0.2)
    monkeypatch.setattr(sample, "SHRINK", 0)
    assert sample.thresholds(topic, share, label, 2).tolist() == pytest.approx([0.5, 0.3])
    monkeypatch.setattr(sample, "SHRINK", 5)
    own = sample.thresholds(topic, share, label, 3)
    assert own[0] == pytest.approx((5 * 0.5 + 5 * common) / 10) and own[2] == common  # nobody is in topic 2
    found = sample.verdict(topic, share, np.array([0.65, 0.3]))
    assert found.tolist() == [0, 0, 0, -1, -1, 1, 1, 1, -1, -1]


def test_captions_are_numbered_by_their_first_wanted_row():
    captions = ["a", "b", "a", "c", "b", "a"]
    wanted = np.array([False, True, True, True, True, True])
    assert sample.captions_by_number(captions, wanted).tolist() == [0, 1, 2, 0, 1]


def test_a_held_out_pair_is_not_its_own_neighbour():
    features = unit(np.random.default_rng(0).standard_normal((300, 16))).astype(np.float32)
    features[7] = features[3]  # found at the same distance as itself
    index = sample.nearest_index(features, 1)
    rows = np.arange(0, 300, 3)
    near, similarity = sample._others(index, features[rows], rows)
    assert near.shape == similarity.shape == (100, sample.NEIGHBOURS)
    assert not (near == rows[:, None]).any() and 7 in near[1]
    exact = np.sort(features[rows] @ features.T)[:, -2:-17:-1]
    assert np.abs(similarity - exact).mean() < 0.02


# --- topics from a sample -------------------------------------------------------------------------------------------


def large_store(seed=0):
    """1,080 pairs of six topics, 120 of none, and captions that say the same word for word."""
    store = make_store(seed, per_domain=60, noise=120, wrong=20)
    random = np.random.default_rng(seed)
    for row in random.choice(len(store), 150, replace=False).tolist():
        other = int(random.integers(0, len(store)))
        store.captions[row] = store.captions[other]
        # Features of one caption differ in the last bit between batches.
        store.sentence_features[row] = store.sentence_features[other] * np.float16(1.001)
        store.truth.topic[row] = store.truth.topic[other]
    return store


SAMPLED = ("CHC.TOPICS.SAMPLE", "400")


@pytest.fixture(scope="module")
def store():
    return large_store()


@pytest.fixture(scope="module")
def sampled(store):
    return cluster_pairs(store, make_config(*SAMPLED))


def test_a_sample_finds_the_true_topics(store, sampled):
    whole = cluster_pairs(store, make_config("CHC.TOPICS.SAMPLE", "0"))
    assert "sample" not in whole.manifest and len(sampled.topics) == 6
    label = np.full((2, len(store)), -1)
    for row, found in enumerate((whole, sampled)):
        label[row, found.pair] = found.topic
    both = (label >= 0).all(0)
    assert ami(label[0, both], label[1, both]) > 0.9
    assert ami(store.truth.topic[sampled.pair], sampled.topic) > 0.9
    # Noise: about as much as clustering everything says, and mostly the same pairs.
    noise = [found.fates == h.NOISE for found in (whole, sampled)]
    assert noise[1].mean() == pytest.approx(noise[0].mean(), abs=0.05)
    assert (noise[0] == noise[1]).mean() > 0.9


def test_the_manifest_says_how_the_sample_was_used(store, sampled, tmp_path):
    facts = sampled.manifest["sample"]
    passed = int((sampled.fates != h.FILTERED).sum())
    assert facts["pairs"] == 400 and facts["of"] == passed
    assert facts["rule"]["neighbours"] == sample.NEIGHBOURS
    held_out = facts["held_out"]
    assert held_out["precision"] > 0.95 and held_out["agreement"] > 0.85
    assert held_out["noise"] == pytest.approx(held_out["noise_by_clustering"], abs=0.05)
    assert facts["noise_of_all"] == pytest.approx((sampled.fates == h.NOISE).sum() / passed)
    sampled.save(tmp_path / "h")
    assert json.loads((tmp_path / "h" / "topics.json").read_text())["sample"] == facts


def test_equal_captions_share_their_topic(store, sampled):
    fate = dict(zip(range(len(store)), sampled.fates.tolist(), strict=True))
    topic = dict(zip(sampled.pair.tolist(), sampled.topic.tolist(), strict=True))
    groups: dict[str, set] = {}
    for row, caption in enumerate(store.captions):
        if fate[row] != h.FILTERED:
            groups.setdefault(caption, set()).add((fate[row], topic.get(row)))
    assert all(len(found) == 1 for found in groups.values())
    assert len(groups) < int((sampled.fates != h.FILTERED).sum()) - 50, "there are copies"


def test_a_sample_gives_the_same_hierarchy_twice(store, sampled):
    again = cluster_pairs(store, make_config(*SAMPLED))
    assert again.fingerprint == sampled.fingerprint and again.manifest == sampled.manifest
    assert np.array_equal(again.fates, sampled.fates)
    other = cluster_pairs(store, make_config(*SAMPLED, "CHC.SEED", "2"))
    assert other.fingerprint != sampled.fingerprint


def test_no_more_pairs_than_the_sample_are_clustered_whole(store):
    whole = cluster_pairs(store, make_config("CHC.TOPICS.SAMPLE", "0"))
    as_many = cluster_pairs(store, make_config("CHC.TOPICS.SAMPLE", str(len(store) - 20)))  # 20 are filtered out
    assert as_many.fingerprint == whole.fingerprint and "sample" not in as_many.manifest
    with pytest.raises(GramError, match="CHC.TOPICS.SAMPLE: expected 0, or at least 100 .*, found 50"):
        cluster_pairs(store, make_config("CHC.TOPICS.SAMPLE", "50"))


def test_a_sample_without_topics_is_one_sentence(store):
    with pytest.raises(GramError, match="topics: expected at least 3, found 0"):
        cluster_pairs(store, make_config(*SAMPLED, "CHC.TOPICS.MIN_CLUSTER_SIZE", "390"))


# --- domains --------------------------------------------------------------------------------------------------------


def test_domains_of_a_large_topic_come_from_a_sample_of_it():
    random = np.random.default_rng(0)
    truth = random.choice(3, 1000, p=[0.5, 0.3, 0.2])
    features = random.standard_normal((3, 16))[truth] + 0.1 * random.standard_normal((1000, 16))
    features *= 10 ** random.uniform(-4, 2, (1000, 1))  # lengths say nothing
    whole = domains_of(features.astype(np.float32), ChcSettings.from_config(make_config()))
    label = domains_of(features.astype(np.float32), ChcSettings.from_config(make_config("CHC.DOMAINS.SAMPLE", "200")))
    assert np.array_equal(label, whole) and ami(truth, label) == 1
    assert np.bincount(label).tolist() == sorted(np.bincount(label), reverse=True)
    tiny = features[:150].astype(np.float32)
    once = domains_of(tiny, ChcSettings.from_config(make_config("CHC.DOMAINS.SAMPLE", "200")))
    assert np.array_equal(once, domains_of(tiny, ChcSettings.from_config(make_config("CHC.DOMAINS.SAMPLE", "0"))))


@pytest.mark.parametrize("gather", [1, 100, 400])
def test_features_read_in_parts_make_no_difference(store, sampled, gather, monkeypatch):
    monkeypatch.setattr(domains, "GATHER", gather)
    monkeypatch.setattr(sample, "BATCH", 64)
    read = []

    class Watched(np.ndarray):
        def __getitem__(self, rows):
            if isinstance(rows, np.ndarray):
                read.append(rows)
            return super().__getitem__(rows)

    watched = large_store()
    watched.image_features = watched.image_features.view(Watched)
    again = cluster_pairs(watched, make_config(*SAMPLED))
    assert again.fingerprint == sampled.fingerprint
    assert all(np.all(np.diff(rows) > 0) for rows in read), "in the order of the file"
    largest = max(topic.images for topic in again.topics)
    assert max(map(len, read)) <= max(gather, largest)


# --- images to leave out --------------------------------------------------------------------------------------------


def test_excluded_images_have_a_fate_of_their_own(store):
    out = np.arange(0, 300, 3)
    found = cluster_pairs(store, make_config(), excluded=out)
    left = np.isin(store.image, out)
    assert np.array_equal(found.fates == h.EXCLUDED, left) and not np.isin(found.image, out).any()
    assert found.manifest["pairs"]["excluded"] == left.sum()
    assert sum(found.manifest["pairs"].values()) == 2 * len(store)
    assert h.FATE_NAMES[h.EXCLUDED] == "excluded" and h.FATE_NAMES[:2] == ("kept", "filtered")
    # The share that the filter keeps is one of the pairs that are left.
    share = make_config("CHC.FILTER.THRESHOLD", "-1.0", "CHC.FILTER.KEEP", "0.5")
    found = cluster_pairs(store, share, excluded=out)
    assert (found.fates == h.FILTERED).sum() == (len(store) - left.sum()) // 2
    nothing = cluster_pairs(store, make_config(), excluded=np.array([], np.int64))
    assert nothing.fingerprint == cluster_pairs(store, make_config()).fingerprint


def test_excluded_images_of_a_labelled_collection():
    store = make_store(noise=0, wrong=0)
    store.captions[:] = [caption.split(" number")[0] for caption in store.captions]
    labelled = make_config("CHC.LABELLED", "True")
    first = np.flatnonzero(store.truth.topic == 0)
    found = cluster_pairs(store, labelled, excluded=store.image[first])
    assert len(found.topics) == 5 and "a dog" not in [topic.word for topic in found.topics]
    assert (found.fates[first] == h.EXCLUDED).all()


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A store in files: 12,000 pairs of 40 topics in two looks."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, random, n = tmp_path_factory.mktemp("store"), np.random.default_rng(0), 12_000
    topic, look = random.integers(0, 40, n), random.integers(0, 2, n)
    sentence = unit(random.standard_normal((40, 32))[topic] + 0.4 * random.standard_normal((n, 32)))
    image = unit(random.standard_normal((80, 16))[2 * topic + look] + 0.2 * random.standard_normal((n, 16)))
    names = [
        a + b
        for a in ("bel", "dor", "fim", "gat", "hul", "kor", "lam", "mit")
        for b in ("o", "ast", "ine", "ur", "esk")
    ]
    captions = [f"a {names[number]} {row}" for row, number in enumerate(topic.tolist())]
    places = [f"images/{row}.png" for row in range(n)]
    pq.write_table(pa.table({"image": np.arange(n), "caption": captions}), folder / "captions.parquet")
    pq.write_table(pa.table({"location": places, "digest": ["0"] * n}), folder / "images.parquet")
    np.save(folder / "sentence_features.npy", sentence.astype(np.float16))
    np.save(folder / "image_features.npy", image.astype(np.float16))
    np.save(folder / "similarity.npy", np.full(n, 0.3, np.float32))
    models = {name: {"name": "x", "fingerprint": "0" * 64} for name in ("clip", "sentence_model")}
    source = {"kind": "tsv", "image_root": str(folder)}
    manifest = {"kind": "pair store", "format": 1, "finished": True, "fingerprint": "a" * 64}
    manifest["settings"] = {"source": source, **models}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def command(store, out, *opts):
    quick = ["CHC.TOPICS.REDUCTION", "pca", "CHC.TOPICS.COMPONENTS", "10", "CHC.FILTER.KEEP", "1.0"]
    return ["cluster", str(store), "-o", str(out), *quick, "CHC.TOPICS.SAMPLE", "3000", *opts]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_command_excludes_images(on_disk, tmp_path, capsys):
    overlap = tmp_path / "overlap.tsv"
    overlap.write_text("dataset\timage\nfood\timages/3.png\nfood\timages/7.png\nfood\timages/3.png\n")
    assert main(command(on_disk, tmp_path / "h", "--exclude", str(overlap))) == 0
    found = Hierarchy.open(tmp_path / "h")
    assert np.flatnonzero(found.fates == h.EXCLUDED).tolist() == [3, 7]
    for text, words in [
        ("image\nimages/3.png\nelsewhere/9.png\n", "found elsewhere/9.png"),
        ("picture\nimages/3.png\n", "expected a column image, found picture"),
        ("", "expected a column image, found an empty file"),
    ]:
        overlap.write_text(text)
        assert main(command(on_disk, tmp_path / "h", "--exclude", str(overlap))) == 2
        assert words in capsys.readouterr().err
    assert main(command(on_disk, tmp_path / "h", "--exclude", str(tmp_path / "none.tsv"))) == 2
    assert "expected a .tsv file of images to exclude" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(on_disk, tmp_path, monkeypatch, caplog):
    assert main(command(on_disk, tmp_path / "whole")) == 0
    whole = contents(tmp_path / "whole")
    assert sorted(whole) == ["fates.npy", "hierarchy.parquet", "topics.json"], "nothing hidden is left"

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sample.Rule, "assign", stop)
        with pytest.raises(KeyboardInterrupt):
            cluster_pairs(PairStore.open(on_disk), config_of(), scratch=tmp_path / "part")
    assert [path.name for path in (tmp_path / "part").iterdir()] == [".sample.npz"]
    with caplog.at_level("INFO"):
        with monkeypatch.context() as patch:
            patch.setattr(topics, "topics_of", stop)  # the longest part is not done again
            patch.setattr(chc, "domains_of", stop)
            with pytest.raises(KeyboardInterrupt):
                cluster_pairs(PairStore.open(on_disk), config_of(), scratch=tmp_path / "part")
        assert "found by an earlier run" in caplog.text
        assert sorted(contents(tmp_path / "part")) == [".assigned.npz", ".sample.npz"]
        assert main(command(on_disk, tmp_path / "part")) == 0
    assert contents(tmp_path / "part") == whole

    # What other settings or a damaged file left behind is not used.
    for name in ("sample", "assigned"):
        (tmp_path / "part" / f".{name}.npz").write_bytes(b"damaged")
    assert main(command(on_disk, tmp_path / "part")) == 0
    assert contents(tmp_path / "part") == whole
    key = Steps(tmp_path / "part")
    key.once("sample", "other settings", lambda: np.zeros(3000, np.int64))
    assert main(command(on_disk, tmp_path / "part")) == 0
    assert contents(tmp_path / "part") == whole


def config_of():
    from gram_meta.config import load_meta_config

    return load_meta_config([], command("", "")[4:])


SLOW_RULE = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
from gram_meta.clustering import sample

def learn(*arguments):
    print("the rule takes its time", file=sys.stderr, flush=True)
    time.sleep(600)

sample.Rule.learn = learn
from gram_meta.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_ctrl_c_leaves_nothing_half_written(on_disk, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_RULE, *command(on_disk, tmp_path / "h")], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert any("the rule takes its time" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert [path.name for path in (tmp_path / "h").iterdir()] == [".sample.npz"], "no half of a hierarchy"
    assert main(command(on_disk, tmp_path / "h")) == 0
    assert main(command(on_disk, tmp_path / "undisturbed")) == 0
    assert contents(tmp_path / "h") == contents(tmp_path / "undisturbed")


# --- repeated captions ----------------------------------------------------------------------------------------------


def repeated_store(often=300, some=6):
    """Six concepts of 60 captions each; two captions of their own, `often` times each; two concepts of 8 captions, each
    `some` times."""
    random = np.random.default_rng(0)
    concepts = unit(random.standard_normal((10, 64)))
    groups = [(c, 60, 1) for c in range(6)] + [(6, 1, often), (7, 1, often), (8, 8, some), (9, 8, some)]
    names = ["dog", "cat", "car", "tree", "boat", "house", "lamp", "shoe", "bird", "fish"]
    captions, features, topic = [], [], []
    for concept, texts, copies in groups:
        for text in range(texts):
            captions += [f"a {names[concept]} {text}"] * copies
            features += [unit(concepts[concept] + 0.05 * random.standard_normal(64))] * copies
            topic += [concept] * copies
    order = random.permutation(len(topic))
    store = make_store(per_domain=len(topic) // 18 + 1, noise=0, wrong=0)
    n = len(topic)
    store.captions = shared.Column(captions[row] for row in order)
    store.sentence_features = np.float16(np.array(features)[order] * random.uniform(0.999, 1.001, (n, 1)))
    store.image, store.similarity = np.arange(n), np.full(n, 0.3, np.float32)
    store.truth.topic = np.array(topic)[order]
    return store


@pytest.mark.parametrize("opts", [["CHC.TOPICS.REDUCTION", "umap"], ["CHC.TOPICS.SAMPLE", "400"]])
def test_repeated_captions_are_one_point(opts):
    store = repeated_store()
    settings = ChcSettings.from_config(
        make_config("CHC.TOPICS.MIN_CLUSTER_SIZE", "30", "CHC.FILTER.KEEP", "1.0", *opts)
    )
    fates = np.zeros(len(store), np.uint8)
    _, kept, label, words = topics.find_topics(store, settings, fates, Steps(None), False)
    assert len(kept) >= len(store) - 5, "hardly anything is noise"
    assert ami(store.truth.topic[kept], label) > 0.98
    assert {word[0][0] for word in words} == {*"dog cat car tree boat house lamp shoe bird fish".split()}
    found: dict[str, set] = {}
    for row, number in zip(kept, label, strict=True):
        found.setdefault(store.captions[row], set()).add(number)
    assert all(len(numbers) == 1 for numbers in found.values()), "all pairs of one caption have one topic"


def test_few_captions_of_many_pairs_are_not_sampled():
    """Four concepts of 18 captions in 400 pairs: a sample of 100 pairs would hold too few captions to vote."""
    store = repeated_store(often=40, some=20)
    opts = ["CHC.TOPICS.MIN_CLUSTER_SIZE", "30", "CHC.TOPICS.SAMPLE", "100", "CHC.FILTER.KEEP", "1.0"]
    fates = np.where(store.truth.topic < 6, h.EXCLUDED, 0).astype(np.uint8)
    config = ChcSettings.from_config(make_config(*opts))
    facts, kept, label, words = topics.find_topics(store, config, fates, Steps(None), False)
    assert not facts and len(kept) == 400 and ami(store.truth.topic[kept], label) > 0.99
    assert {word[0][0] for word in words} == {"lamp", "shoe", "bird", "fish"}


def test_copies_lie_around_their_point():
    points = np.array([[0.0, 0], [3, 4], [10, 10], [0, 1]])
    found = sample.spread(points, np.array([3, 1, 1, 1000]), 1)
    assert np.array_equal(found[[0, 3, 4, 5]], points)
    far = np.linalg.norm(found[5:] - points[3], axis=1)
    assert np.linalg.norm(found[:3], axis=1).max() <= 1 and 0.9 < far.max() <= 1
    assert (far < 0.5).mean() == pytest.approx(0.25, abs=0.05), "uniform over the disc"


def test_settings_that_count_pairs():
    features = unit(np.random.default_rng(0).standard_normal((9, 16))).astype(np.float32)
    settings = ChcSettings.from_config(make_config("CHC.TOPICS.MIN_CLUSTER_SIZE", "30"))
    copies = np.array([30, 500, 1, 1, 1, 1, 1, 1, 1])
    assert topics.topics_of(features, settings, copies).tolist() == [0, 1] + [-1] * 7
    assert topics.topics_of(features, settings, np.full(9, 30)).tolist() == list(range(9))
    label = np.array([0, 0, 1, 1, 2, -1, -1])
    copies = np.array([5, 6, 2, 2, 10, 9, 10])
    assert topics.large_enough(label, copies, 10).tolist() == [0, 0, -1, -1, 1, -1, 2]


# --- files that cannot be read or written ---------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_a_full_disk_is_one_sentence(on_disk, tmp_path, monkeypatch, capsys, at):
    """The disk is full while the first, second, ... file is written; then there is space again."""
    count, fsync = [0], os.fsync

    def full(descriptor):
        count[0] += 1
        if count[0] == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(command(on_disk, tmp_path / "h")) == 2
    where, _, reason = capsys.readouterr().err.splitlines()[-1].partition(": cannot be written ")
    assert where.startswith(f"gram cluster: {tmp_path / 'h'}/")
    assert reason == "(No space left on device); free some space and run the same command again"
    assert not list((tmp_path / "h").glob("*.part")) and not (tmp_path / "h" / "topics.json").exists()
    assert main(command(on_disk, tmp_path / "h")) == 0
    assert len(Hierarchy.open(tmp_path / "h").topics) == 38


def test_an_array_that_is_written_in_part_is_one_sentence(on_disk, tmp_path, monkeypatch, capsys):
    def save(*_, **__):
        raise OSError("1000 requested and 24 written")  # as numpy puts it

    monkeypatch.setattr(np, "save", save)
    assert main(command(on_disk, tmp_path / "h")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"{tmp_path / 'h'}/fates.npy: cannot be written (1000 requested and 24 written)")


@pytest.mark.parametrize("name", ["captions.parquet", "image_features.npy", "manifest.json"])
def test_a_file_that_cannot_be_read_is_one_sentence(on_disk, tmp_path, capsys, name):
    shutil.copytree(on_disk, tmp_path / "s")
    (tmp_path / "s" / name).unlink()
    (tmp_path / "s" / name).mkdir()
    assert main(command(tmp_path / "s", tmp_path / "h")) == 2
    assert str(tmp_path / "s") in capsys.readouterr().err.splitlines()[-1]
