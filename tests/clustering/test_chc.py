"""Cross-modal hierarchical clustering: Eq. 3, the filter, topics and domains on features with a known
truth."""

import json
import math
import unicodedata
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_mutual_info_score

from gram_meta.cli import main
from gram_meta.clustering import hierarchy as h
from gram_meta.clustering.agreement import agreement, read_truth
from gram_meta.clustering.chc import cluster_pairs
from gram_meta.clustering.domains import domain_minimum, domains_of
from gram_meta.clustering.hierarchy import Hierarchy
from gram_meta.clustering.settings import ChcSettings
from gram_meta.clustering.topics import filtered
from gram_meta.clustering.words import characters, tokenizer, tokens, topic_words
from gram_meta.config import get_meta_config, load_meta_config
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError

# --- Eq. 3 --------------------------------------------------------------------------------------------------

# Four topics. The numbers below were computed by hand: N_wl, N_l and L_w by counting, log by a table.
CAPTIONS = ["dog dog park", "dog ball", "cat park", "cat milk", "bird sky", "bird park bird", "fish sea"]
TOPIC = [0, 0, 1, 1, 2, 2, 3]
LN_2, LN_4_3 = 0.693147, 0.287682


def test_topic_words_by_hand():
    words = topic_words(CAPTIONS, TOPIC, 4)
    # Topic 0: dog dog park dog ball, N_l = 5. dog: 3/5 ln(4/2); ball: 1/5 ln(4/2); park is in 3 topics: 1/5
    # ln(4/4) = 0.
    assert [word for word, _ in words[0]] == ["dog", "ball", "park"]
    assert [score for _, score in words[0]] == pytest.approx([0.6 * LN_2, 0.2 * LN_2, 0.0], abs=1e-6)
    # Topic 1: cat park cat milk, N_l = 4.
    assert words[1][0] == ("cat", pytest.approx(0.346574, abs=1e-6))
    # Topic 2: bird sky bird park bird, N_l = 5.
    assert words[2][0] == ("bird", pytest.approx(0.415888, abs=1e-6))
    # Topic 3: fish sea, equal scores 1/2 ln 2, equal counts: the alphabet decides.
    assert words[3] == [("fish", pytest.approx(0.346574, abs=1e-6)), ("sea", pytest.approx(0.346574, abs=1e-6))]


def test_a_word_in_two_of_four_topics():
    words = topic_words(["dog dog sea", "cat sea", "bird", "fish"], [0, 1, 2, 3], 4)
    assert dict(words[0])["sea"] == pytest.approx(LN_4_3 / 3, abs=1e-6)  # L_w = 2: 1/3 ln(4/3)
    assert dict(words[1])["sea"] == pytest.approx(LN_4_3 / 2, abs=1e-6)


def test_equal_scores_go_to_the_more_frequent_word():
    # Everything in L - 1 of L = 3 topics scores 0, whatever its count.
    words = topic_words(["bb bb aa", "aa bb cc", "cc cc"], [0, 1, 2], 3)
    assert words[0] == [("bb", 0), ("aa", 0)] and [word for word, _ in words[1]] == ["aa", "bb", "cc"]


@pytest.mark.parametrize("topics", [1, 2])
def test_fewer_than_three_topics_say_why(topics):
    with pytest.raises(GramError, match=rf"expected at least 3, found {topics}.*log\(L/\(L_w\+1\)\)"):
        topic_words(CAPTIONS[:topics], range(topics), topics)


def test_tokens():
    text = "The dog's BIG ball, 3 cats_and 2nd Straße; a x-ray! don't 猫猫 été"
    assert list(tokens(text)) == ["dog", "big", "ball", "cats", "nd", "straße", "ray", "don", "猫猫", "été"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("एक काला कुत्ता में", ["एक", "काला", "कुत्ता", "में"]),  # Hindi: marks are vowels
        ("ஒரு நாய்", ["ஒரு", "நாய்"]),  # Tamil
        ("একটি কুকুর", ["একটি", "কুকুর"]),  # Bengali
        ("หมา สีดำ", ["หมา", "สีดำ"]),  # Thai, with spaces
        ("כֶּלֶב רָץ", ["כֶּלֶב", "רָץ"]),  # Hebrew with vowels
        ("كَلْبٌ وَ", ["كَلْبٌ"]),  # Arabic with vowels; the second word has one letter
        ("می‌خواهم", ["می\u200cخواهم"]),  # Persian, with a joiner
        ("ශ්‍රී", ["ශ්\u200dරී"]),  # Sinhala, likewise
        ("une FORÊT à x̂", ["une", "forêt"]),  # of two words, the accent is no letter
        ("검은 개", ["검은", "개"]),  # Korean: a sign is a syllable, and may be a word
        ("黑色 的 狗", ["黑色", "的", "狗"]),  # Chinese, cut into words before
        ("but\u00adter dog\ufe0f", ["butter", "dog"]),  # a soft hyphen, a variation selector
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_marks_belong_to_words(text, expected, form):
    expected = [unicodedata.normalize("NFC", word) for word in expected]
    assert list(tokens(unicodedata.normalize(form, text))) == expected


CHINESE = [["一只小狗在草地上跑", "小狗在睡觉", "白色的小狗"], ["红色的自行车", "自行车在路上", "一辆自行车"]]
CHINESE += [["一只猫在睡觉", "猫在沙发上", "白色的猫"]]


def test_words_of_scripts_without_spaces(monkeypatch):
    """The words are those that a reader of Chinese would choose: little dog, bicycle, cat."""
    captions, topic = sum(CHINESE, []), [0, 0, 0, 1, 1, 1, 2, 2, 2]
    best = topic_words(captions, topic, 3, split=tokenizer("characters"))
    assert [of_topic[0][0] for of_topic in best] == ["小狗", "自行车", "猫"]
    assert all(
        len(word) <= 4 and not any(word in other for other, _ in best[1][:at]) for at, (word, _) in enumerate(best[1])
    )
    assert list(characters("iphone手机 a dog")) == ["iphone", "手", "手机", "机", "dog"]
    import gram_meta.clustering.words as module

    monkeypatch.setattr(module, "cut", lambda text: iter(text.split("的")), raising=False)
    assert list(tokens("白色的 猫, 的…", tokenizer("gram_meta.clustering.words.cut"))) == ["白色", "猫,"]


@pytest.mark.parametrize("name", ["jieba", "no.such.function", "json.dumps", "math.sqrt", ""])
def test_a_tokenizer_that_is_none_is_one_sentence(name):
    with pytest.raises(GramError, match="CHC.WORDS.TOKENIZER: expected words, characters, or a function"):
        ChcSettings.from_config(make_config("CHC.WORDS.TOKENIZER", name))


def test_captions_without_spaces_are_reported(caplog):
    store = make_store()
    names = ["小狗", "白猫", "汽车", "大树", "帆船", "房子", "什么"]
    store.captions = Column(f"{names[topic]}{row}在这里" for row, topic in enumerate(store.truth.topic))
    cluster_pairs(store, make_config())
    assert "100 % of the letters are of scripts without spaces" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        found = cluster_pairs(store, make_config("CHC.WORDS.TOKENIZER", "characters"))
        assert sorted(topic.word for topic in found.topics) == sorted(names[:6])
        cluster_pairs(make_store(), make_config())
    assert not caplog.records


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text("abc ", max_size=12), st.integers(0, 3)), min_size=1, max_size=12), st.randoms())
def test_topic_words_do_not_depend_on_the_order_of_captions(rows, random):
    captions, topic = zip(*rows, strict=True)
    words = topic_words(captions, topic, 4)
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert topic_words(*zip(*shuffled, strict=True), 4) == words
    for of_topic in words:
        scores = [score for _, score in of_topic]
        assert scores == sorted(scores, reverse=True) and all(map(math.isfinite, scores))


# --- filter -------------------------------------------------------------------------------------------------


def test_the_filter_drops_the_lowest():
    similarity = np.array([0.3, 0.1, 0.5, 0.1, 0.2], np.float32)
    assert sorted(filtered(similarity, 0.6, -1.0)) == [1, 3]
    assert sorted(filtered(similarity, 0.8, -1.0)) == [3]  # among equals the later one goes
    assert sorted(filtered(similarity, 1.0, -1.0)) == []
    assert sorted(filtered(similarity, 0.9, 0.25)) == [1, 3, 4]  # a threshold stands above the share


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1, 1, width=16), min_size=1, max_size=50), st.floats(0.01, 1))
def test_the_filter_keeps_the_best_share(similarity, keep):
    similarity = np.array(similarity, np.float32)
    dropped = filtered(similarity, keep, -1.0)
    kept = np.setdiff1d(np.arange(len(similarity)), dropped)
    assert len(kept) == math.ceil(round(keep * len(similarity), 6)) and len(kept) > 0
    if len(dropped):
        assert similarity[dropped].max() <= similarity[kept].min()


# --- topics and domains on features with a known truth ------------------------------------------------------

TOPICS, DOMAINS, PER_DOMAIN = 6, 3, 14
NAMES = ["dog", "cat", "car", "tree", "boat", "house"]


def unit(array):
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def make_store(seed=0, topics=TOPICS, domains=DOMAINS, per_domain=PER_DOMAIN, captions_per_image=1, noise=20, wrong=18):
    """Pairs of `topics` concepts, in `domains` looks each; some that belong nowhere, and some with a low
    similarity."""
    random = np.random.default_rng(seed)
    topic = np.repeat(np.arange(topics), domains * per_domain)
    domain = np.tile(np.repeat(np.arange(domains), per_domain), topics)
    images = len(topic)
    looks = random.standard_normal((topics, domains, 32))
    concepts = random.standard_normal((topics, 24))
    image = np.repeat(np.arange(images), captions_per_image)
    sentence = concepts[topic[image]] + 0.1 * random.standard_normal((len(image), 24))
    pictures = looks[topic, domain] + 0.2 * random.standard_normal((images, 32))
    names = [NAMES[number % len(NAMES)] for number in topic[image]]
    captions = [f"a {name} number {row}" for row, name in enumerate(names)]
    label = topic[image]
    similarity = random.uniform(0.3, 0.4, len(image))
    similarity[random.choice(len(image), wrong, replace=False)] = 0.1
    if noise:
        image = np.concatenate([image, np.arange(images, images + noise)])
        sentence = np.concatenate([sentence, 3 * random.standard_normal((noise, 24))])
        pictures = np.concatenate([pictures, random.standard_normal((noise, 32))])
        captions += [f"nothing of note {row}" for row in range(noise)]
        label = np.concatenate([label, np.full(noise, -1)])
        similarity = np.concatenate([similarity, np.full(noise, 0.35)])
    locations = [f"images/{row}.png" for row in range(len(pictures))]
    store = SimpleNamespace(
        path=SimpleNamespace(resolve=lambda: "/a/store"),
        manifest={"settings": {"source": {"kind": "tsv"}}},
        captions=Column(captions),
        image=image.astype(np.int64),
        locations=Column(locations),
        image_features=unit(pictures).astype(np.float16),
        sentence_features=unit(sentence).astype(np.float16),
        similarity=similarity.astype(np.float32),
        fingerprint="a" * 64,
        clip_fingerprint="b" * 64,
        sentence_fingerprint="c" * 64,
        truth=SimpleNamespace(topic=label, domain=domain, wrong=similarity < 0.2),
    )
    return Sized(store)


class Column(list):
    def take(self, rows):
        return [self[row] for row in rows]


class Sized:
    def __init__(self, store):
        self.__dict__.update(store.__dict__)

    def __len__(self):
        return len(self.captions)


def make_config(*opts):
    quick = ["CHC.TOPICS.REDUCTION", "pca", "CHC.TOPICS.MIN_CLUSTER_SIZE", "10", "CHC.FILTER.THRESHOLD", "0.2"]
    shots = ["TASKS.SUPPORT_SHOTS", "2", "TASKS.QUERY_SHOTS", "6"]
    return load_meta_config([], [*quick, *shots, *opts])


@pytest.fixture(scope="module")
def store():
    return make_store()


@pytest.fixture(scope="module")
def hierarchy(store):
    return cluster_pairs(store, make_config())


def test_topics_and_domains_are_the_true_ones(store, hierarchy):
    assert len(hierarchy.topics) == TOPICS
    assert sorted(topic.word for topic in hierarchy.topics) == sorted(NAMES)
    assert adjusted_mutual_info_score(store.truth.topic[hierarchy.pair], hierarchy.topic) > 0.95
    for number in range(TOPICS):
        rows = (hierarchy.topic == number) & (store.truth.topic[hierarchy.pair] >= 0)
        truth = store.truth.domain[hierarchy.image[rows]]
        assert adjusted_mutual_info_score(truth, hierarchy.domain[rows]) > 0.95


def test_what_was_dropped_is_known(store, hierarchy):
    assert np.array_equal(np.flatnonzero(hierarchy.fates == h.FILTERED), np.flatnonzero(store.truth.wrong))
    noise = store.truth.topic == -1
    assert (hierarchy.fates[noise] == h.NOISE).mean() > 0.2 + (hierarchy.fates[~noise] == h.NOISE).mean()
    counts = dict(hierarchy.manifest["pairs"])
    assert counts.pop("in") == len(store) == sum(counts.values())
    assert counts["filtered"] == 18


@pytest.mark.slow
def test_umap_gives_the_same_hierarchy_twice():
    """The paper's way, UMAP and all: the true topics, and the same bytes twice for a seed."""
    pytest.importorskip("umap", reason="umap-learn is not installed")
    store = make_store(seed=1)
    config = make_config("CHC.TOPICS.REDUCTION", "umap", "CHC.TOPICS.NEIGHBORS", "10")
    once, twice = cluster_pairs(store, config), cluster_pairs(store, config)
    assert once.fingerprint == twice.fingerprint
    assert once.topics == twice.topics and once.manifest == twice.manifest
    assert np.array_equal(once.fates, twice.fates)
    assert once.manifest["reproducible"] is True
    assert adjusted_mutual_info_score(store.truth.topic[once.pair], once.topic) > 0.9


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    topics=st.integers(3, 6),
    domains=st.integers(1, 4),
    per_domain=st.integers(4, 14),
    captions_per_image=st.integers(1, 3),
    noise=st.integers(0, 10),
    k=st.integers(2, 5),
)
def test_invariants_of_a_hierarchy(seed, topics, domains, per_domain, captions_per_image, noise, k):
    store = make_store(seed, topics, domains, per_domain, captions_per_image, noise, wrong=2)
    config = make_config("CHC.DOMAINS.K", str(k), "CHC.TOPICS.COMPONENTS", "3")
    try:
        found = cluster_pairs(store, config)
    except GramError as error:
        assert "expected topics that can fill" in str(error) or "expected at least" in str(error)
        return
    assert np.all(np.diff(found.pair) > 0)
    assert np.array_equal(found.image, store.image[found.pair])
    assert np.array_equal(found.pair, np.flatnonzero(found.fates == h.KEPT))
    assert sorted(set(found.topic.tolist())) == list(range(len(found.topics)))
    sizes = [topic.size for topic in found.topics]
    assert sizes == sorted(sizes, reverse=True) == np.bincount(found.topic).tolist()
    for number, topic in enumerate(found.topics):
        rows = found.topic == number
        of_image = {}
        for image, domain in zip(found.image[rows].tolist(), found.domain[rows].tolist(), strict=True):
            assert of_image.setdefault(image, domain) == domain, "one image in two domains of a topic"
        images = np.bincount(list(of_image.values())).tolist()
        assert images == topic.domains == sorted(images, reverse=True)
        assert sum(images) == topic.images
        assert 2 <= len(images) <= k
        assert min(images) >= domain_minimum(ChcSettings.from_config(config), len(images))
        assert topic.words[0] == (topic.word, topic.score) and topic.score > 0


def test_an_image_with_many_captions_counts_once():
    """Images, not captions, make a topic large enough."""
    store = make_store(domains=2, per_domain=4, captions_per_image=5, noise=0, wrong=0)
    with pytest.raises(GramError, match=r"found none of 6 \(topic with too few images: 6\)"):
        cluster_pairs(store, make_config("TASKS.QUERY_SHOTS", "7"))
    found = cluster_pairs(store, make_config("TASKS.QUERY_SHOTS", "4"))
    assert [topic.images for topic in found.topics] == [8] * 6 and [topic.size for topic in found.topics] == [40] * 6


@pytest.mark.slow
def test_topics_that_cannot_fill_a_task_are_dropped_and_counted(caplog):
    store = make_store(noise=0, wrong=0)
    few = store.truth.topic == 5  # one of six topics is left with a single look
    store.image_features[store.image[few]] = store.image_features[store.image[few]][0]
    with caplog.at_level("INFO"):
        found = cluster_pairs(store, make_config())
    assert len(found.topics) == 5 and found.manifest["topics_found"] == 6
    assert found.manifest["topics_dropped"]["topic without two domains"] == 1
    assert (found.fates == h.FEW_DOMAINS).sum() == DOMAINS * PER_DOMAIN
    assert "dropped: 1 of 6 topics (topic without two domains)" in caplog.text


def test_topics_without_words_are_dropped_and_counted():
    store = make_store(noise=0, wrong=0)
    store.captions[:] = [
        "123 the of" if number == 2 else caption
        for caption, number in zip(store.captions, store.truth.topic, strict=True)
    ]
    found = cluster_pairs(store, make_config())
    assert len(found.topics) == 5 and found.manifest["topics_dropped"]["topic without a word"] == 1


def test_small_domains_make_fewer():
    random = np.random.default_rng(0)
    centres = random.standard_normal((3, 16))
    features = np.concatenate([centres[u] + 0.05 * random.standard_normal((n, 16)) for u, n in enumerate((20, 15, 3))])
    config = ChcSettings.from_config(make_config("CHC.DOMAINS.K", "3"))
    label = domains_of(features.astype(np.float32), config)
    assert sorted(np.bincount(label).tolist(), reverse=True) == np.bincount(label).tolist()
    assert len(np.bincount(label)) == 2, "the third domain of 3 images cannot serve a task of 2 + 6 shots"
    assert (
        domains_of(features[:35].astype(np.float32), ChcSettings.from_config(make_config("CHC.DOMAINS.K", "2"))).sum()
        == 15
    )
    assert domains_of(features[:1].repeat(30, 0), config) is None


def test_domains_ignore_the_length_of_features():
    random = np.random.default_rng(0)
    centres = random.standard_normal((2, 16))
    features = np.concatenate([centres[u] + 0.05 * random.standard_normal((20, 16)) for u in (0, 1)])
    scaled = features * random.uniform(0.01, 100, (40, 1))
    config = ChcSettings.from_config(make_config("CHC.DOMAINS.K", "2"))
    assert adjusted_mutual_info_score(np.repeat([0, 1], 20), domains_of(scaled.astype(np.float32), config)) == 1


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["CHC.FILTER.KEEP", "0.0"], "CHC.FILTER.KEEP: expected more than 0 and at most 1, found 0.0"),
        (["CHC.DOMAINS.K", "1"], "CHC.DOMAINS.K: expected at least 2 .* found 1"),
        (["CHC.TOPICS.REDUCTION", "tsne"], "CHC.TOPICS.REDUCTION: expected umap or pca, found 'tsne'"),
        (["CHC.TOPICS.SELECTION", "all"], "expected eom or leaf"),
        (["CHC.TOPICS.MIN_SAMPLES", "0"], "expected at least 1"),
        (["CHC.TOPICS.MIN_CLUSTER_SIZE", "10000"], "expected at least 10000 pairs after the filter, found 254"),
        (["CHC.FILTER.THRESHOLD", "0.9"], "expected at least .* pairs after the filter, found 0"),
        (["CHC.TOPICS.MIN_CLUSTER_SIZE", "120"], "expected at least 3, found"),
        (["TASKS.SUPPORT_SHOTS", "50"], "expected topics that can fill support and query sets, found none of"),
    ],
)
def test_unusable_settings_are_one_sentence(store, opts, words):
    with pytest.raises(GramError, match=words):
        cluster_pairs(store, make_config(*opts))


# --- files --------------------------------------------------------------------------------------------------


def test_a_hierarchy_survives_its_files(hierarchy, tmp_path):
    hierarchy.save(tmp_path / "h")
    read = Hierarchy.open(tmp_path / "h")
    for name in ("pair", "image", "topic", "domain", "fates"):
        assert np.array_equal(getattr(read, name), getattr(hierarchy, name))
    assert read.topics == hierarchy.topics and read.manifest == hierarchy.manifest
    assert read.fingerprint == hierarchy.fingerprint
    first = {path.name: path.read_bytes() for path in (tmp_path / "h").iterdir()}
    hierarchy.save(tmp_path / "h")  # over an older one
    assert {path.name: path.read_bytes() for path in (tmp_path / "h").iterdir()} == first


def test_damaged_hierarchies_are_one_sentence(hierarchy, tmp_path):
    with pytest.raises(GramError, match="expected a hierarchy .*, found no topics.json"):
        Hierarchy.open(tmp_path)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(GramError, match="found other files"):
        hierarchy.save(tmp_path)
    (tmp_path / "topics.json").write_text('{"topics": ["cats"]}')  # of another program
    with pytest.raises(GramError, match="found other files"):
        hierarchy.save(tmp_path)
    assert (tmp_path / "topics.json").read_text() == '{"topics": ["cats"]}'
    (tmp_path / "topics.json").unlink()
    for name, change, words in [
        ("hierarchy.parquet", lambda p: p.write_bytes(b""), "expected a whole hierarchy"),
        ("fates.npy", lambda p: p.write_bytes(b""), "expected a whole hierarchy"),
        ("fates.npy", lambda p: p.unlink(), "expected a whole hierarchy"),
        ("fates.npy", lambda p: np.save(p, np.zeros(3, np.uint8)), "expected files of one hierarchy"),
        ("topics.json", lambda p: p.write_text("[]"), "expected the topics of a hierarchy"),
        ("topics.json", lambda p: p.write_text(p.read_text().replace('"format": 1', '"format": 2')), "found format 2"),
    ]:
        hierarchy.save(tmp_path / "h")
        change(tmp_path / "h" / name)
        with pytest.raises(GramError, match=words):
            Hierarchy.open(tmp_path / "h")


def test_changed_hierarchies_are_one_sentence(hierarchy, tmp_path):
    """Each change leaves files that can be read and that agree with each other in size."""

    def column(name, change):
        def rewrite(path):
            table = pq.read_table(path / "hierarchy.parquet").to_pydict()
            pq.write_table(pa.table(table | {name: change(np.array(table[name]))}), path / "hierarchy.parquet")

        return rewrite

    def topics(change):
        def rewrite(path):
            content = json.loads((path / "topics.json").read_text())
            change(content)
            (path / "topics.json").write_text(json.dumps(content))

        return rewrite

    belong = "expected files of one hierarchy"
    for change, words in [
        (column("image", lambda a: a[::-1]), "hierarchy.parquet: expected .*: it has changed"),
        (column("pair", lambda a: a + 1), belong),
        (column("image", lambda a: a - a.max()), belong),
        (column("topic", lambda a: a + 1), belong),
        (column("domain", lambda a: a + 3), belong),
        (topics(lambda content: content["topics"][0].update(word="bear")), "topics.json: expected SHA-256"),
        (topics(lambda content: content.update(sha256="")), None),
        (topics(lambda content: (content.update(sha256=""), content["pairs"].update(noise=-1))), belong),
    ]:
        hierarchy.save(tmp_path / "h")
        change(tmp_path / "h")
        if words is None:
            Hierarchy.open(tmp_path / "h")  # of an earlier version
            continue
        with pytest.raises(GramError, match=words):
            Hierarchy.open(tmp_path / "h")


TOPIC_ENTRY = {"word": "cat", "score": 1.0, "size": 2, "images": 2, "domains": [1, 1]}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"topics": {}}, "topics: expected array, found object"),
        ({"topics": [3]}, r"topics\[0\]: expected object, found int"),
        ({"topics": [{"word": 5}]}, r"topics\[0\].word: expected str, found int"),
        ({"pairs": {"in": "all"}}, "pairs.*: expected int, found str"),
        ({"fingerprints": [1, 2]}, "fingerprints: expected object, found array"),
        ({"fingerprints": {"store": 1}}, "fingerprints.*: expected str, found int"),
        ({"store": None}, "store: expected str, found null"),
        ({"topics": [{**TOPIC_ENTRY, "words": [[7, 1.0]]}]}, "topics.*words.*: expected str, found int"),
        ({"topics": [{**TOPIC_ENTRY, "words": ["cat"]}]}, "topics.*words.*: expected array, found str"),
        ({"topics": [{**TOPIC_ENTRY, "words": [["cat"]]}]}, "topics.*words.*: expected array of length 2, found 1"),
        ({"files": {"fates.npy": {"bytes": "many", "sha256": ""}}}, "files.*bytes: expected int, found str"),
    ],
)
def test_topics_of_other_types_are_one_sentence(hierarchy, tmp_path, change, words):
    hierarchy.save(tmp_path / "h")
    content = json.loads((tmp_path / "h" / "topics.json").read_text()) | change | {"sha256": ""}
    (tmp_path / "h" / "topics.json").write_text(json.dumps(content))
    with pytest.raises(GramError, match=f"topics.json: {words}"):
        Hierarchy.open(tmp_path / "h")


def test_rows_of_another_store_are_one_sentence(store, hierarchy):
    changed = replace(hierarchy, image=np.roll(hierarchy.image, 1))
    with pytest.raises(GramError, match="expected pairs and images of .*, found other rows"):
        changed.check_store(store)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fingerprint", "expected contents aaaaaaaaaaaa, found ffffffffffff"),
        ("clip_fingerprint", "expected CLIP bbbbbbbbbbbb, found ffffffffffff"),
        ("sentence_fingerprint", "expected Sentence-BERT cccccccccccc, found ffffffffffff"),
    ],
)
def test_another_store_is_refused(store, hierarchy, name, words):
    hierarchy.check_store(store)
    with pytest.raises(GramError, match=words):
        hierarchy.check_store(SimpleNamespace(**{**store.__dict__, name: "f" * 64}))


@pytest.mark.parametrize(
    ("opts", "excluded", "words"),
    [
        (["CHC.FILTER.THRESHOLD", "0.3"], None, "made with CHC.FILTER.THRESHOLD 0.2, expected the same, found 0.3"),
        (["TASKS.SUPPORT_SHOTS", "3"], None, "made with TASKS.SUPPORT_SHOTS 2, expected the same, found 3"),
        ([], [0, 1], "made with --exclude of other images"),
    ],
)
def test_a_hierarchy_is_not_replaced_by_another_unasked(store, hierarchy, tmp_path, opts, excluded, words):
    """Meta-checkpoints refer to it. Settings of TASKS that `gram cluster` does not read make no other hierarchy."""
    hierarchy.save(tmp_path / "h")
    same = ChcSettings.from_config(make_config("TASKS.WAYS", "7"))
    found = h.finished_before(tmp_path / "h", store, same, None)
    assert found is not None and found.fingerprint == hierarchy.fingerprint
    assert h.finished_before(tmp_path / "new", store, same, None) is None
    with pytest.raises(GramError, match=f"^{tmp_path / 'h'}: holds a hierarchy {words}; .* --force"):
        h.finished_before(tmp_path / "h", store, ChcSettings.from_config(make_config(*opts)), excluded)
    other = SimpleNamespace(**{**store.__dict__, "fingerprint": "f" * 64})
    with pytest.raises(GramError, match="made with the store 'aaaaaaaaaaaa', expected the same, found 'ffffffffffff'"):
        h.finished_before(tmp_path / "h", other, same, None)


# --- agreement with a truth ---------------------------------------------------------------------------------


def test_agreement_with_the_truth(store, hierarchy):
    truth = {
        "image": [store.locations[image] for image in store.image],
        "concept": [str(number) for number in store.truth.topic],
        "style": [str(store.truth.domain[image]) if image < 252 else "none" for image in store.image],
        "caption_is_wrong": ["1" if wrong else "0" for wrong in store.truth.wrong],
    }
    report = agreement(hierarchy, store, truth)
    assert report["matched"] == len(store)
    assert report["topics"]["concept"]["all"] > 0.95 and abs(report["topics"]["style"]["all"]) < 0.05
    assert report["domains"]["style"]["mean"] > 0.9 and report["domains"]["style"]["topics"] == TOPICS
    quality = report["filter"]
    assert (quality["precision"], quality["recall"], quality["right captions kept"]) == (1, 1, 1)
    assert quality["wrong in topics"] == 0
    assert report["noise"] == pytest.approx((hierarchy.fates == h.NOISE).sum() / (len(store) - 18))

    # half of the marks moved to captions that passed: 9 of 18 dropped are wrong, 9 of 18 wrong are dropped
    marks = np.array(truth["caption_is_wrong"])
    wrong, passed = np.flatnonzero(marks == "1")[:9], np.flatnonzero(marks == "0")[:9]
    marks[wrong], marks[passed] = "0", "1"
    quality = agreement(hierarchy, store, {**truth, "caption_is_wrong": marks.tolist()})["filter"]
    assert (quality["precision"], quality["recall"]) == (0.5, 0.5)
    assert quality["right captions kept"] == pytest.approx(1 - 9 / (len(store) - 18))


def test_truth_of_pairs_is_found_by_image_and_caption():
    store = make_store(captions_per_image=2, noise=0, wrong=0)
    found = cluster_pairs(store, make_config())
    images = [store.locations[image] for image in store.image]
    wrong = ["yes" if row % 2 else "no" for row in range(len(store))]
    truth = {"image": images, "caption": list(store.captions), "caption_is_wrong": wrong}
    backwards = {name: column[::-1] for name, column in truth.items()}
    assert agreement(found, store, backwards)["filter"]["wrong"] == len(store) // 2
    del truth["caption"]
    with pytest.raises(GramError, match="expected a column caption beside caption_is_wrong"):
        agreement(found, store, truth)


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_truth_is_read_from_any_table(tmp_path, suffix):
    import pandas as pd

    path = tmp_path / f"truth{suffix}"
    table = pd.DataFrame(
        {"image": ["a.png", "b.png"], "extra": [1, 2], "concept": ["x", "y"], "caption_is_wrong": [0, 1]}
    )
    table.to_csv(path, sep="\t" if suffix == ".tsv" else ",", index=False)
    assert read_truth(path) == {"image": ["a.png", "b.png"], "concept": ["x", "y"], "caption_is_wrong": ["0", "1"]}


def test_unusable_truths_are_one_sentence(store, hierarchy, tmp_path):
    (tmp_path / "a.tsv").write_text("image\tblah\n")
    for name, words in [("a.tsv", "expected a column image and any of concept"), ("b.tsv", "found none")]:
        with pytest.raises(GramError, match=words):
            read_truth(tmp_path / name)
    with pytest.raises(GramError, match="found none of them; its images look like 'images/0.png'"):
        agreement(hierarchy, store, {"image": ["x.png"], "concept": ["dog"]})
    with pytest.raises(GramError, match="expected 0 or 1 .*, found 'maybe'"):
        agreement(hierarchy, store, {"image": ["images/0.png"], "caption_is_wrong": ["maybe"]})


# --- commands -----------------------------------------------------------------------------------------------


def test_the_commands_on_a_tiny_corpus(tmp_path, capsys):
    """gram embed -> cluster -> inspect, in this process, on 180 small pictures of six words in two colours
    each."""
    from PIL import Image

    corpus, random = tmp_path / "corpus", np.random.default_rng(0)
    (corpus / "images").mkdir(parents=True)
    pairs, truth = ["image\tcaption"], ["image\tconcept\tstyle\tsource\tcaption_is_wrong"]
    for number in range(180):
        name, style = NAMES[number % 6], ("dark", "light")[number // 6 % 2]
        pixels = random.integers(0, 90, (24, 24, 3), dtype=np.uint8) + (160 if style == "light" else 0)
        Image.fromarray(pixels.astype(np.uint8)).save(corpus / "images" / f"{number}.png")
        pairs.append(f"images/{number}.png\t{name} {name} {name} {name}")
        truth.append(f"images/{number}.png\t{name}\t{style}\tours\t0")
    (corpus / "pairs.tsv").write_text("\n".join(pairs))
    (corpus / "truth.tsv").write_text("\n".join(truth))

    store, out = tmp_path / "store", tmp_path / "hierarchy"
    assert main(["cluster", str(store), "-o", str(out)]) == 2
    assert "expected a pair store" in capsys.readouterr().err
    options = ["--backbone", "random-tiny", "--sentence-model", "hash:64"]
    assert main(["embed", str(corpus / "pairs.tsv"), "-o", str(store), *options]) == 0
    assert len(PairStore.open(store)) == 180

    (tmp_path / "small.yaml").write_text("TASKS: {SUPPORT_SHOTS: 2, QUERY_SHOTS: 4}\nCHC: {FILTER: {KEEP: 1.0}}\n")
    settings = ["CHC.TOPICS.REDUCTION", "pca", "CHC.TOPICS.MIN_CLUSTER_SIZE", "10", "CHC.DOMAINS.K", "2"]
    command = ["cluster", str(store), "-o", str(out), "--config-file", str(tmp_path / "small.yaml"), *settings]
    assert main(command) == 0
    assert sorted(topic.word for topic in Hierarchy.open(out).topics) == sorted(NAMES)
    assert main([*command, "CHC.TOPIC.NEIGHBORS", "3"]) == 2
    assert "did you mean 'CHC.TOPICS.NEIGHBORS'" in capsys.readouterr().err

    # Meta-checkpoints refer to a finished hierarchy: the same command does not make it again; hidden files go.
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / ".sample.npz").write_bytes(b"left by a kill at the end")
    assert main(command) == 0
    assert "finished before, nothing to do" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert main([*command, "--force"]) == 0
    assert (out / "topics.json").stat().st_mtime_ns > times["topics.json"]

    assert main(["inspect", str(out), "--truth", str(corpus / "truth.tsv"), "--topics", "2"]) == 0
    text = capsys.readouterr().out
    assert "and 4 smaller topics" in text and "6 topics with 6 different words, of 6 found; reproducible" in text
    assert "concept" in text and "filter on wrong captions" in text
    assert main(["inspect", str(out), "--truth", str(corpus / "truth.tsv"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["agreement"]["topics"]["concept"]["all"] == pytest.approx(1)
    assert len(report["topics"]) == 6 and report["pairs"]["in"] == 180

    # A store made anew from other captions is another store.
    (corpus / "pairs.tsv").write_text("\n".join(pairs[:-1]))
    assert main(["embed", str(corpus / "pairs.tsv"), "-o", str(tmp_path / "other"), *options]) == 0
    assert main(["inspect", str(out), "--truth", str(corpus / "truth.tsv"), "--store", str(tmp_path / "other")]) == 2
    assert "was made from another store" in capsys.readouterr().err


def test_defaults_are_in_the_tree():
    chc = get_meta_config().CHC
    assert chc.SEED >= 0, "reproducible unless asked otherwise"
    assert chc.TOPICS.REDUCTION == "umap"
