"""gram inspect --html: what the page holds, that nothing on it is taken for markup, and that a browser shows it."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from helpers.html import Page
from jinja2 import UndefinedError
from PIL import Image

from gram_meta.cli import main
from gram_meta.clustering.hierarchy import FATE_NAMES, FILTERED, NOISE, Hierarchy, Topic
from gram_meta.corpus.store import PairStore
from gram_meta.report.html import hierarchy as hierarchy_page

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
    assert headings == [f"{key}-title" for key in ("pairs", "sizes", "topics", "task", "dropped", "settings")]
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


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_browser_shows_it(corpus, tmp_path):
    """Its script runs, under its own policy; that of a caption does not."""
    inspect(corpus, tmp_path / "page.html", "--topics", "6")
    argv = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1200,900",
        "--timeout=20000",
    ]
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
