"""gram inspect --html: what the page holds, that nothing on it is taken for markup, and that a browser shows it."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from helpers.browser import CHROMIUM, OPTIONS, browse
from helpers.html import Page
from jinja2 import UndefinedError
from PIL import Image

from gram_meta.cli import main
from gram_meta.clustering.hierarchy import FATE_NAMES, FILTERED, KEPT, NOISE, Hierarchy, Topic
from gram_meta.corpus.store import PairStore
from gram_meta.report.html import hierarchy as hierarchy_page
from gram_meta.report.html.hierarchy import LEAST_POINTS, MAP_SIZE, View, map_rows

NASTY = '</li><script>alert("caption")</script><img src="https://example.org/x.png" onerror="alert(1)"> & \x07 cat'
TOPICS, PER_DOMAIN = 6, 20


def make_corpus(folder):
    """A store of 6 topics x 2 domains x 20 images with captions, 12 pairs of noise and 12 filtered; its hierarchy."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    words = ["cat", "dog", "boat", "cat", "lamp", NASTY]
    rows = []
    for topic in range(TOPICS + 1):
        for domain in range(2):
            for i in range(PER_DOMAIN if topic < TOPICS else 12):
                name = f"images/{topic}_{domain}_{i}.png"
                pixels = random.integers(0, 90, (24, 40, 3), dtype=np.uint8) + 70 * domain + 10 * topic
                Image.fromarray(pixels).save(folder / name)
                printed = "left over" if topic == TOPICS else words[topic].replace("\x07", "")
                rows.append((name, f"a {printed} number {i} {domain}"))
    table = "".join(f"{name}\t{caption}\n" for name, caption in [*rows, ("images/gone.png", "not there")])
    (folder / "pairs.tsv").write_text(f"image\tcaption\n{table}", encoding="utf-8")
    argv = ["embed", folder / "pairs.tsv", "-o", folder / "store", "--backbone", "random-tiny"]
    assert main([*map(str, argv), "--sentence-model", "hash:32", "--device", "cpu"]) == 0
    store = PairStore.open(folder / "store")
    kept = np.arange(TOPICS * 2 * PER_DOMAIN)
    fates = np.zeros(len(store), np.uint8)
    fates[len(kept) :: 2], fates[len(kept) + 1 :: 2] = FILTERED, NOISE
    topics = [
        Topic(word, 0.5, [[word, 0.5], ["next", 0.25]], 2 * PER_DOMAIN, 2 * PER_DOMAIN, [PER_DOMAIN] * 2)
        for word in words
    ]
    counts = np.bincount(fates, minlength=len(FATE_NAMES))
    manifest = {
        "store": str(folder / "store"),
        "fingerprints": {
            "store": store.fingerprint,
            "clip": store.clip_fingerprint,
            "sentence_model": store.sentence_fingerprint,
        },
        "reproducible": True,
        "config": {"TASKS": {"WAYS": 3, "SUPPORT_SHOTS": 2, "QUERY_SHOTS": 4}},
        "pairs": {"in": len(store), **dict(zip(FATE_NAMES, map(int, counts), strict=True))},
        "topics_found": TOPICS,
    }
    domain = kept // PER_DOMAIN % 2
    Hierarchy(kept, store.image[kept], kept // (2 * PER_DOMAIN), domain, topics, fates, manifest).save(
        folder / "hierarchy"
    )
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def inspect(corpus, page, *words):
    assert main(["inspect", str(corpus / "hierarchy"), "--html", str(page), *map(str, words)]) == 0
    return Page(page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(corpus, tmp_path_factory):
    return inspect(corpus, tmp_path_factory.mktemp("page") / "page.html")


@pytest.mark.slow
def test_it_holds_what_it_should(page):
    headings = [a["id"] for a in page.all("h2")]
    assert headings == [f"{key}-title" for key in ("pairs", "sizes", "map", "topics", "task", "dropped", "settings")]
    assert [a["id"] for a in page.all("article", **{"class": "topic"})] == [f"topic-{i}" for i in range(TOPICS)]
    strips = [a for a in page.all("div", **{"class": "strip"}) if a["aria-label"].startswith("Images of domain")]
    assert len(strips) == 2 * TOPICS
    # 8 of each domain, 3 classes of 2 + 4, 8 filtered and 8 of noise
    assert len(page.all("img")) == 8 * 2 * TOPICS + 3 * 6 + 16
    for words in ("pairs 264", "images 264", "topics 6", "different words 5", "visual domains 12", "A 3-way task"):
        assert words in page.text, words
    assert "missing file 1" in page.text  # skipped by gram embed
    assert "a CLIP with random weights" in page.text


def test_words_of_several_topics_are_marked(page):
    assert "data-repeated" in page.all("article", id="topic-0")[0]
    assert "data-repeated" not in page.all("article", id="topic-1")[0]
    assert [a["title"] for a in page.all("span", **{"class": "badge"}) if "title" in a] == [
        "also the word of topics 3",
        "also the word of topics 0",
    ]


def test_a_task_has_its_support_in_one_domain(page):
    shown = re.findall(r"class \d .*? support (.*?) query (.*?)(?=class|Dropped)", page.text)
    assert len(shown) == 3
    for support, query in shown:
        assert len(set(re.findall(r"domain (\d)", support))) == 1
        assert set(re.findall(r"domain (\d)", query)) == {"0", "1"}


def test_it_asks_for_nothing_from_outside_and_runs_its_own_script_alone(page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "poster", "srcset"):
            if name in attributes:
                assert attributes[name].startswith(("data:image/", "#")), (tag, attributes)
    assert len(page.all("script")) == 1 and not page.all("link") and not page.all("iframe")
    policy = next(a for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")["content"]
    assert "default-src 'none'" in policy and "sha256-" in policy
    assert '<script>alert("caption")</script>' in page.text  # as text


def test_a_word_that_is_a_script_is_inert(page, corpus):
    """Topic 5 has it: in its heading, its captions, the table of all topics and the text that is searched."""
    (topic,) = page.all("article", id="topic-5")
    assert topic["data-find"].startswith(NASTY.replace("\x07", "\N{REPLACEMENT CHARACTER}").lower())
    assert page.text.count('<script>alert("caption")</script>') >= 3 and "\x07" not in page.text
    assert len(page.all("script")) == 1 and not [a for a in page.all("img") if "onerror" in a]


def groups_of(page):
    """Return topic -> the attributes of its points; "": pairs in no topic."""
    return {a.get("data-topic", ""): a for a in page.all("path")}


def places_of(group):
    """Return the places (n, 2) of a group of points."""
    return np.array(re.findall(r"M([\d.]+) ([\d.]+)h0", group["d"]), float)


def test_the_map_has_a_point_for_each_pair_that_passed_the_filter(page, corpus):
    hierarchy = Hierarchy.open(corpus / "hierarchy")
    captions = hierarchy.open_store().captions
    groups = groups_of(page)
    assert sorted(groups) == ["", *map(str, range(TOPICS))] and "The 252 pairs that passed the filter" in page.text
    for name, group in groups.items():
        if name:
            pairs, word = hierarchy.pair[hierarchy.topic == int(name)], hierarchy.topics[int(name)].word
            assert group["data-word"] == word.replace("\x07", "\N{REPLACEMENT CHARACTER}")
            assert ("data-repeated" in group) == (word == "cat")
        else:
            pairs = np.flatnonzero(hierarchy.fates == NOISE)
            assert "data-word" not in group
        shown = [line[:119] for line in group["data-captions"].split("\n")]
        assert shown == [" ".join(caption.split())[:119] for caption in captions.take(pairs)]
        places = places_of(group)
        assert len(places) == len(pairs) and (places >= 0).all() and (places <= MAP_SIZE).all()
    # A word on the map leads to the topic's entry, and back.
    assert [a["href"] for a in page.all("a") if a["href"].startswith("#topic-")] == [
        f"#topic-{i}" for i in range(TOPICS)
    ]
    assert [a["data-topic"] for a in page.all("a", href="#map") if "data-topic" in a] == list(map(str, range(TOPICS)))


def test_near_points_have_similar_captions(page):
    groups = {name: group for name, group in groups_of(page).items() if name}
    places = np.concatenate([places_of(group) for group in groups.values()])
    word = np.concatenate([[group["data-word"]] * len(places_of(group)) for group in groups.values()])
    away = np.linalg.norm(places[:, None] - places, axis=2)
    np.fill_diagonal(away, np.inf)
    assert (word[away.argmin(axis=1)] == word).mean() > 0.8  # by chance: 0.22
    assert away.min() > 0  # also of pairs with one caption


def test_a_hostile_caption_on_the_map_is_text(page):
    lines = groups_of(page)["5"]["data-captions"].split("\n")
    assert len(lines) == 2 * PER_DOMAIN and all('<script>alert("caption")</script>' in line for line in lines)
    assert len(page.all("script")) == 1 and not page.all("img", src="https://example.org/x.png")


def test_the_table_has_the_entries_of_topics_without_a_card(corpus, tmp_path):
    page = inspect(corpus, tmp_path / "page.html", "--topics", "2")
    assert [a["id"] for a in page.all("article", **{"class": "topic"})] == ["topic-0", "topic-1"]
    assert [a["id"] for a in page.all("tr") if "id" in a] == [f"topic-{i}" for i in range(2, TOPICS)]


def test_a_map_of_many_pairs_is_a_random_choice_that_the_seed_decides(corpus):
    hierarchy = Hierarchy.open(corpus / "hierarchy")
    store = hierarchy.open_store()
    first, same, other = (map_rows(View(hierarchy, store, None, seed), 60) for seed in (3, 3, 4))
    assert (first["problem"], first["shown"], first["of"]) == ("", 60, 252)
    topics_of = {}  # caption -> its topics; two topics have the same captions
    for pair, fate in enumerate(hierarchy.fates):
        topic = hierarchy.topic[np.searchsorted(hierarchy.pair, pair)] if fate == KEPT else -1
        topics_of.setdefault(store.captions[pair][:119], set()).add(-1 if fate == NOISE else topic)
    for group, again in zip(first["groups"], same["groups"], strict=True):
        number, captions, places, middle = group
        assert number == again[0] and captions == again[1] and (places == again[2]).all()
        assert len(captions.split("\n")) == len(places) and (middle == np.median(places, axis=0)).all()
        assert all(number in topics_of[caption[:119]] for caption in captions.split("\n"))
    drawn = [sorted(" ".join(group[1] for group in one["groups"]).split()) for one in (first, other)]
    assert sum(len(group[2]) for group in other["groups"]) == 60 and drawn[0] != drawn[1]


def test_few_captions_have_no_map_but_the_images_of_a_labelled_collection_have(corpus, tmp_path):
    hierarchy = Hierarchy.open(corpus / "hierarchy")
    store = hierarchy.open_store()
    store.sentence_features = store.sentence_features[np.arange(len(store)) % 2]
    problem = map_rows(View(hierarchy, store, None, 1), 60)["problem"]
    assert problem == f"expected at least {LEAST_POINTS} pairs with different captions, found 2"
    hierarchy.manifest["labelled"] = True
    assert map_rows(View(hierarchy, store, None, 1), 60)["shown"] == 60
    hierarchy.manifest["labelled"] = False
    hierarchy_page.write_hierarchy_page(tmp_path / "page.html", hierarchy, store)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert f"There is no map: {problem}." in page.text and not page.all("svg")


def test_images_have_texts_and_sizes(page):
    for image in page.all("img"):
        assert image["alt"] and 0 < int(image["width"]) <= 96 and 0 < int(image["height"]) <= 96
    charts = page.all("div", **{"class": "chart"})
    assert len(charts) == 2 and all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert page.all("html", lang="en") and page.all("main") and page.all("h1")
    identities = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identities) == len(set(identities))


def test_the_seed_decides(corpus, tmp_path):
    texts = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        inspect(corpus, tmp_path / name, "--seed", seed)
        texts.append((tmp_path / name).read_text(encoding="utf-8"))
    assert texts[0] == texts[1] != texts[2]


def test_images_that_are_gone_are_placeholders_and_counted(corpus, tmp_path, capsys):
    (tmp_path / "moved" / "images").mkdir(parents=True)
    for image in (corpus / "images").glob("0_*.png"):  # one topic came along
        shutil.copy(image, tmp_path / "moved" / "images")
    page = inspect(corpus, tmp_path / "page.html", "--image-root", tmp_path / "moved", "--topics", "2")
    gone = page.all("span", **{"class": "gone"})
    assert page.all("img") and len(gone) >= 16 and all("missing file" in a["aria-label"] for a in gone)
    asked = len(gone) + len(page.all("img"))
    assert f"{len(gone)} of the {asked} images of this page could not be read (missing file: {len(gone)})" in page.text
    assert f"{asked} images, {len(gone)} of which could not be read" in capsys.readouterr().out


def test_it_stays_below_its_size(corpus, tmp_path):
    hierarchy = Hierarchy.open(corpus / "hierarchy")
    for limit in (900_000, 400_000, 330_000):
        summary = hierarchy_page.write_hierarchy_page(
            tmp_path / "page.html", hierarchy, hierarchy.open_store(), 0, 20, limit=limit
        )
        assert summary.size == (tmp_path / "page.html").stat().st_size < limit
    assert summary.images_per_domain < 8


def test_thumbnails_have_a_bound():
    noise = np.random.default_rng(0).integers(0, 256, (600, 400, 3), dtype=np.uint8)
    width, height, data = hierarchy_page.thumbnail(Image.fromarray(noise))
    assert len(data) < hierarchy_page.IMAGE_BYTES - 600 and max(width, height) <= 96
    assert height == pytest.approx(1.5 * width, abs=1)
    assert hierarchy_page.thumbnail(Image.new("RGB", (3, 2)))[:2] == (3, 2)


def test_a_task_that_cannot_be_drawn_is_a_sentence(corpus, tmp_path):
    hierarchy = Hierarchy.open(corpus / "hierarchy")
    hierarchy.manifest["config"]["TASKS"]["WAYS"] = 30
    hierarchy_page.write_hierarchy_page(tmp_path / "page.html", hierarchy, hierarchy.open_store())
    assert "No task can be drawn" in Page((tmp_path / "page.html").read_text(encoding="utf-8")).text


def test_a_failure_leaves_the_older_page(corpus, tmp_path):
    (tmp_path / "page.html").write_text("older")
    hierarchy = Hierarchy.open(corpus / "hierarchy")
    del hierarchy.manifest["pairs"]
    with pytest.raises(UndefinedError, match="pairs"):
        hierarchy_page.write_hierarchy_page(tmp_path / "page.html", hierarchy, hierarchy.open_store())
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "older"


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--images", "0"], "--images: expected"), (["--topics", "-1"], "found -1"), (["--json"], "found both")],
)
def test_bad_options_are_one_sentence(corpus, tmp_path, capsys, words, says):
    assert main(["inspect", str(corpus / "hierarchy"), "--html", str(tmp_path / "page.html"), *words]) == 2
    printed = capsys.readouterr().err
    assert says in printed and printed.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_browser_shows_it(corpus, tmp_path):
    """Its script runs, under its own policy; that of a caption does not."""
    inspect(corpus, tmp_path / "page.html", "--topics", "6")
    argv = [CHROMIUM, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,900", "--timeout=20000"]
    url = (tmp_path / "page.html").as_uri()
    done = subprocess.run([*argv, "--dump-dom", url], capture_output=True, text=True, timeout=120)
    if not done.stdout.strip():
        pytest.skip(f"chromium does not start here: {done.stderr.strip()[-200:]}")
    shown = Page(done.stdout)
    assert "hidden" not in shown.all("form")[0]  # the script has uncovered it
    assert len(shown.all("script")) == 1
    subprocess.run([*argv, f"--screenshot={tmp_path / 'page.png'}", url], capture_output=True, timeout=120, check=True)
    with Image.open(tmp_path / "page.png") as picture:
        colours = len(picture.convert("RGB").getcolors(picture.width * picture.height))
    assert colours > 50  # charts and pictures, not a blank sheet


POINT = """(() => {
  const box = document.querySelector(".map svg").getBoundingClientRect();
  const place = document.querySelector('path[data-topic="5"]').getAttribute("d").match(/M([\\d.]+) ([\\d.]+)/);
  return [box.x + place[1] * box.width / 1000, box.y + place[2] * box.height / 700];
})()"""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_the_map_in_a_browser(corpus, tmp_path, width, dark):
    """Hover, click, search, zoom and keys; topic 5's word and captions are hostile."""
    inspect(corpus, tmp_path / "page.html", "--topics", "6")

    async def actions(tab):
        assert not await tab.js("document.documentElement.scrollWidth > innerWidth")  # nothing is wider than the window
        await tab.js("document.querySelector('#map').scrollIntoView()")
        place = await tab.js(POINT)
        await tab.mouse("mouseMoved", place)
        await tab.until("!document.querySelector('.tip').hidden")
        tip = await tab.js("document.querySelector('.tip').textContent")
        assert '<script>alert("caption")</script>' in tip and not await tab.js(
            "document.querySelectorAll('.tip img').length"
        )
        await tab.click(place)
        await tab.until("location.hash === '#topic-5' && document.querySelector('path.on').dataset.topic === '5'")
        await tab.until("Math.abs(document.querySelector('#topic-5').getBoundingClientRect().top) < innerHeight")
        await tab.js("document.querySelector('#topic-2 a.place').click()")
        await tab.until("document.querySelector('path.on').dataset.topic === '2' && location.hash === '#map'")
        wide = "document.querySelector('.map svg').viewBox.baseVal.width"
        await tab.until(f"{wide} < 400")  # near the topic
        await tab.js("document.querySelector('.map svg').focus()")
        await tab.key("Escape")
        await tab.until("!document.querySelector('path.on')")
        await tab.key("0")
        await tab.until(f"{wide} === 1000")
        await tab.key("+")
        await tab.until(f"{wide} < 700")
        search = "document.querySelectorAll('input[type=search]')"
        await tab.js(
            f"{search}[0].value = 'lamp 13 0'; {search}[0].dispatchEvent(new Event('input', {{bubbles: true}}))"
        )
        points = "Array.from(document.querySelectorAll('path[data-captions]'), it => it.getAttribute('d')).join('')"
        await tab.until(f"{points}.split('h0').length === 2")  # the point of "a lamp number 13 0" alone
        assert await tab.js(f"{search}[1].value") == "lamp 13 0"
        assert await tab.js("document.querySelector('#map output').textContent") == "1 of 252 points"

    browse((tmp_path / "page.html").as_uri(), actions, tmp_path / "profile", width=width, dark=dark)
