"""A hierarchy as one HTML page: topics with their words, images of every visual domain, a task, and what was dropped.

A single file that asks for nothing from outside (and tells the browser so), works without its script, and stays below a
size: every thumbnail has a bound in bytes, so the number of images decides.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import yaml
from PIL import Image, features

from gram_meta import __version__
from gram_meta.clustering.hierarchy import FATE_NAMES, FILTERED, KEPT, Hierarchy, Topic
from gram_meta.config import as_dict, get_meta_config
from gram_meta.corpus.images import BadImage
from gram_meta.corpus.places import Places
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError
from gram_meta.files import PathLike, atomic_write
from gram_meta.method.tasks import Task, TaskSampler

THUMBNAIL = 96  # pixels, the longer side
THUMBNAIL_BYTES = 4_500  # of the file; on the page a third more, for base64
IMAGE_BYTES = THUMBNAIL_BYTES * 4 // 3 + 700  # with its tag and texts
TOPIC_BYTES = 6_000  # a topic's words and captions
PAGE_BYTES = 10_000_000
CAPTIONS = 4  # shown of each topic
DROPPED = 8  # pairs shown of each way to be dropped
LISTED = 2_000  # topics in the table of all
LONGEST = 300  # characters of a caption, as shown
TASK_CLASSES = 16  # of the task, as shown
UNSUITED = (
    (
        "gram-small",
        "gram-small, which was trained on emoji drawings and has never seen a photograph. The emoji world is what it knows; on photographs its "
        "image-text similarity says nothing about a caption, so a filter by it drops pairs at random, and its visual "
        "domains follow colour and layout, not what is seen.",
    ),
    ("random-", "a CLIP with random weights: its similarities say nothing, and its domains are accidents of colour."),
)
WHY = {
    "filtered": "image and caption are among the least similar by CLIP",
    "noise": "its caption is in no dense region of sentences, so in no topic",
    "excluded": "named by the file of --exclude, such as one that gram check-overlap wrote",
    "topic without a word": "no word tells its topic from the others (Eq. 3)",
    "topic with too few images": "its topic cannot fill a support and a query set",
    "topic without two domains": "its topic's images are all of one visual domain",
}


@dataclass(frozen=True)
class Summary:
    """What a page came out as: its size, topics with images on it, images per domain, images shown, and not readable."""

    size: int
    topics: int
    images_per_domain: int
    images: int
    unreadable: Counter[str]

    def __str__(self) -> str:
        gone = sum(self.unreadable.values())
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.unreadable.most_common())
        return (
            f"{self.size / 1e6:.1f} MB, {self.topics} topics with up to {self.images_per_domain} images per domain, "
            f"{self.images} images" + (f", {gone} of which could not be read ({reasons})" if gone else "")
        )


def write_hierarchy_page(
    path: PathLike,
    hierarchy: Hierarchy,
    store: PairStore,
    topics: int = 50,
    images: int = 8,
    image_root: PathLike | None = None,
    seed: int = 1,
    agreement: str = "",
    limit: int = PAGE_BYTES,
) -> Summary:
    """Write the page, atomically.

    Args:
        hierarchy, store: what to show; they belong together.
        topics: the N largest with images; 0: all. The rest stand in the table of all topics.
        images: of each visual domain. Fewer are shown, and fewer topics, where the page would outgrow `limit`.
        image_root: the folder the images are in now; None: as they were embedded.
        seed: of which images, captions, task and dropped pairs are drawn.
        agreement: text of the comparison with a truth, if there was one.
        limit: bytes.

    Images that cannot be read are placeholders, and counted.

    Raises:
        GramError: `topics` below 0 or `images` below 1.
    """
    if topics < 0 or images < 1:
        raise GramError(f"--topics and --images: expected at least 0 and 1, found {topics} and {images}")
    page = _Page(hierarchy, store, store.places(image_root), seed)
    shown, images = page.fitting(topics or len(hierarchy.topics), images, limit)
    text = page.text(shown, images, agreement)
    with atomic_write(path, "w") as file:
        file.write(text)
    thumbnails = page.thumbnails
    return Summary(len(text.encode()), shown, images, thumbnails.asked, thumbnails.unreadable)


def _(value: Any) -> str:
    """Text that the page cannot mistake for markup, without what HTML cannot hold."""
    text = str(value).encode("utf-8", "replace").decode()
    return escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text), quote=True)


_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")


def _short(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


class _Thumbnails:
    """Rows of a store as `<img>`, or as a placeholder where an image cannot be read."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.asked = 0
        self.unreadable: Counter[str] = Counter()

    def __call__(self, row: int, caption: str) -> str:
        self.asked += 1
        caption = _short(caption, 160)
        try:
            image, _digest = self.places.image(row)
        except (BadImage, GramError, OSError) as error:
            reason = str(error) if isinstance(error, BadImage) else "its shard is gone or has changed"
            self.unreadable[reason] += 1
            return (
                f'<span class="gone" role="img" aria-label="{_(caption)} ({_(reason)})" title="{_(self.places.locations[row])}">'
                f"{_(reason)}</span>"
            )
        width, height, data = thumbnail(image)
        return (
            f'<img src="{data}" width="{width}" height="{height}" alt="{_(caption)}" title="{_(caption)}" '
            'loading="lazy" decoding="async">'
        )


def thumbnail(image: Image.Image) -> tuple[int, int, str]:
    """Width, height and data URI of a small copy, its file at most `THUMBNAIL_BYTES` long."""
    kind = "webp" if features.check("webp") else "jpeg"
    side = THUMBNAIL
    while True:
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in (75, 60, 45, 30, 15):
            file = io.BytesIO()
            small.save(file, kind, quality=quality)
            if file.tell() <= THUMBNAIL_BYTES:
                data = base64.b64encode(file.getvalue()).decode("ascii")
                return small.width, small.height, f"data:image/{kind};base64,{data}"
        side = side * 2 // 3


class _Page:
    """Everything the page says, section by section."""

    def __init__(self, hierarchy: Hierarchy, store: PairStore, places: Places, seed: int) -> None:
        self.hierarchy, self.store, self.seed = hierarchy, store, seed
        self.thumbnails = _Thumbnails(places)
        self.order = np.argsort(hierarchy.topic, kind="stable")  # rows of the hierarchy, by topic
        self.ends = np.searchsorted(hierarchy.topic[self.order], np.arange(len(hierarchy.topics) + 1))
        self.same_word: dict[str, list[int]] = defaultdict(list)
        for number, topic in enumerate(hierarchy.topics):
            self.same_word[topic.word.lower()].append(number)
        self.task = self._draw()
        self.dropped = self._dropped_pairs()

    def random(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([abs(self.seed), *what])

    def rows(self, topic: int) -> np.ndarray:
        """Rows of the hierarchy in a topic."""
        return self.order[self.ends[topic] : self.ends[topic + 1]]

    # --- size ---------------------------------------------------------------------------------------------------------

    def fitting(self, topics: int, images: int, limit: int) -> tuple[int, int]:
        """Topics and images per domain, no more than asked for, whose page is below `limit` at every thumbnail's bound."""
        topics = min(topics, len(self.hierarchy.topics))
        fixed = sum(len(pairs) for _fate, pairs in self.dropped)
        if isinstance(self.task, Task):
            fixed += (self.task.support.shape[1] + self.task.query.shape[1]) * min(len(self.task.words), TASK_CLASSES)
        room = limit - fixed * IMAGE_BYTES - 300 * min(len(self.hierarchy.topics), LISTED) - 60_000
        while topics > 1 or images > 1:
            sizes = [size for topic in self.hierarchy.topics[:topics] for size in topic.domains]
            wanted = sum(min(size, images) for size in sizes)
            if wanted * IMAGE_BYTES + topics * TOPIC_BYTES <= room:
                break
            if images > 4 or (images > 1 and topics <= 50):
                images -= 1
            else:
                topics = max(1, topics * 9 // 10)
        return topics, images

    # --- the whole ----------------------------------------------------------------------------------------------------

    def text(self, topics: int, images: int, agreement: str) -> str:
        name = self.hierarchy.path.name if self.hierarchy.path else "hierarchy"
        sections = [
            ("pairs", "What became of the pairs", self._pairs()),
            ("sizes", "Sizes", self._sizes()),
            ("topics", "Topics", self._topics(topics, images)),
            ("task", "A task", self._task()),
            ("dropped", "Dropped pairs", self._dropped()),
            ("settings", "Settings", self._settings()),
        ]
        if agreement:
            sections.insert(2, ("agreement", "Agreement with what is known", f"<pre>{_(agreement)}</pre>"))
        body = "".join(
            f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{_(title)}</h2>\n{content}\n</section>\n'
            for key, title, content in sections
        )
        contents = "".join(f'<li><a href="#{key}">{_(title)}</a></li>' for key, title, _content in sections)
        return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{_SCRIPT_HASH}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="gram-meta {_(__version__)}">
<title>{_(name)}: topics and visual domains</title>
<style>
{STYLE}
</style>
</head>
<body>
<header>
<h1>{_(name)}: topics and visual domains</h1>
{self._facts()}
{self._remarks(topics, images)}
</header>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<main>
{body}</main>
<footer><p>Made by <code>gram inspect --html</code> of gram-meta {_(__version__)}. Images, captions, the task and the
dropped pairs are drawn at random with seed {_(self.seed)}. Numbers of topics and domains are those of hierarchy.parquet.</p></footer>
<script>{SCRIPT}</script>
</body>
</html>
"""

    def _facts(self) -> str:
        hierarchy, counts = self.hierarchy, self.store.manifest["counts"]
        tiles = [
            (f"{counts['pairs']:,}", "pairs"),
            (f"{counts['images']:,}", "images"),
            (f"{len(hierarchy.topics):,}", "topics"),
            (f"{len(self.same_word):,}", "different words"),
            (f"{sum(len(topic.domains) for topic in hierarchy.topics):,}", "visual domains"),
            (f"{_percent(len(hierarchy.pair), counts['pairs'])}", "of pairs in topics"),
        ]
        return (
            '<dl class="tiles">'
            + "".join(f"<div><dt>{_(label)}</dt><dd>{_(number)}</dd></div>" for number, label in tiles)
            + "</dl>"
        )

    def _remarks(self, topics: int, images: int) -> str:
        """What a reader has to know first. Written last: by then it is known which images could not be read."""
        clip = str(self.store.manifest["settings"]["clip"]["name"])
        lines = [f"Filter and visual domains come from {text}" for start, text in UNSUITED if clip.startswith(start)]
        if gone := sum(self.thumbnails.unreadable.values()):
            reasons = ", ".join(f"{reason}: {n}" for reason, n in self.thumbnails.unreadable.most_common())
            lines.append(
                f"{gone} of the {self.thumbnails.asked} images of this page could not be read ({reasons}). If they have "
                f"moved, --image-root says where to; they were looked for in {self.thumbnails.places.reader.root}."
            )
        if self.hierarchy.manifest.get("labelled"):
            lines.append(
                "A labelled collection: topics are its classes, their words the classes' names, without a score."
            )
        return "".join(f'<p class="remark">{_(line)}</p>' for line in lines)

    # --- counts -------------------------------------------------------------------------------------------------------

    def _pairs(self) -> str:
        pairs = dict(self.hierarchy.manifest["pairs"])
        total = pairs.pop("in")
        there = [(name, count) for name, count in pairs.items() if count]
        bar = "".join(
            f'<span class="{_fate_class(name)}" style="flex:{count}" title="{_(name)}: {count:,}"></span>'
            for name, count in there
        )
        rows = "".join(
            f'<tr><th scope="row"><i class="key {_fate_class(name)}"></i> {_(name)}</th><td>{count:,}</td>'
            f'<td>{_percent(count, total)}</td><td class="words">{_(WHY.get(name, ""))}</td></tr>'
            for name, count in there
        )
        table = _table(("what became of pairs", "pairs", "share", "why"), rows, words=(0, 3))
        skipped = self.store.manifest.get("skipped", {})
        read = self.store.manifest["counts"]["rows"]
        rows = "".join(
            f'<tr><th scope="row">{_(reason)}</th><td>{count:,}</td><td>{_percent(count, read)}</td></tr>'
            for reason, count in sorted(skipped.items(), key=lambda it: -it[1])
        )
        before = (
            "<h3>Skipped by gram embed</h3>" + _table(("reason", f"of {read:,} rows", "share"), rows, words=(0,))
            if skipped
            else f"<p>None of the {read:,} rows of the source was skipped by <code>gram embed</code>.</p>"
        )
        return f'<div class="bar" aria-hidden="true">{bar}</div>{table}{before}'

    def _sizes(self) -> str:
        sizes = np.array([topic.size for topic in self.hierarchy.topics])
        drawings = []
        if len(sizes):
            said = (
                f"Largest {sizes.max():,} pairs, median {int(np.median(sizes)):,}, smallest {sizes.min():,}. "
                f"The ten largest hold {_percent(int(np.sort(sizes)[::-1][:10].sum()), int(sizes.sum()))} of the pairs in topics."
            )
            edges = np.unique(np.geomspace(sizes.min(), sizes.max() + 1, 15).astype(int))
            if len(edges) < 2:
                edges = np.array([sizes.min(), sizes.max() + 1])
            counts = np.histogram(sizes, edges)[0]
            labels = [
                f"{a:,}" if b - a == 1 else f"{a:,} to {b - 1:,}" for a, b in zip(edges[:-1], edges[1:], strict=True)
            ]
            ticks = [f"{edge:,}" for edge in edges[:-1]]
            drawings.append(
                f"<figure>{_bars('Topics by size', ticks, labels, [('topics', 'fate-0', counts)], 'pairs in the topic', 'topics')}"
                f"<figcaption>Topics by their number of pairs. {_(said)}</figcaption></figure>"
            )
        drawings.append(self._similarity())
        return f'<div class="figures">{"".join(drawings)}</div>'

    def _similarity(self) -> str:
        similarity, fates = np.asarray(self.store.similarity), self.hierarchy.fates
        low, high = np.quantile(similarity, [0.001, 0.999])
        edges = np.linspace(low, max(high, low + 1e-3), 25)
        inside = similarity.clip(edges[0], edges[-1])
        groups = [
            ("kept", "fate-0", fates == KEPT),
            ("filtered", "fate-1", fates == FILTERED),
            ("dropped later", "fate-2", (fates != KEPT) & (fates != FILTERED)),
        ]
        series = [(name, css, np.histogram(inside[mask], edges)[0]) for name, css, mask in groups if mask.any()]
        labels = [f"{a:.3f} to {b:.3f}" for a, b in zip(edges[:-1], edges[1:], strict=True)]
        ticks = [f"{edge:.2f}" if i % 4 == 0 else "" for i, edge in enumerate(edges[:-1])]
        key = ", ".join(f'<i class="key {css}"></i> {_(name)}' for name, css, _counts in series)
        chart = _bars(
            "Pairs by image-text similarity", ticks, labels, series, "cosine of image and caption by CLIP", "pairs"
        )
        return (
            f"<figure>{chart}<figcaption>Pairs by CLIP's similarity of image and caption: {key}.</figcaption></figure>"
        )

    # --- topics -------------------------------------------------------------------------------------------------------

    def _topics(self, shown: int, images: int) -> str:
        topics = self.hierarchy.topics
        repeated = sum(len(numbers) for numbers in self.same_word.values() if len(numbers) > 1)
        cards = "".join(self._topic(number, topics[number], images) for number in range(shown))
        intro = (
            f"<p>The {shown:,} largest of {len(topics):,} topics"
            if shown < len(topics)
            else f"<p>All {len(topics):,} topics"
        )
        intro += f", up to {images} images of each visual domain, drawn at random."
        if repeated:
            intro += (
                f' {repeated:,} topics share their word with another <span class="badge">word of several</span>; '
                "a task never draws two of one word."
            )
        return (
            f"{intro}</p>"
            '<form class="find" hidden><label>Find a topic <input type="search" placeholder="word, next word or caption" '
            'autocomplete="off"></label> <label><input type="checkbox"> words of several topics only</label> '
            '<output aria-live="polite"></output></form>'
            f'<div class="topics">{cards}</div>{self._all_topics()}'
        )

    def _topic(self, number: int, topic: Topic, images: int) -> str:
        rows = self.rows(number)
        random = self.random(0, number)
        drawn = self.hierarchy.pair[random.permutation(rows)[:CAPTIONS]]
        captions = self.store.captions.take(drawn)
        said = "".join(
            f'<li><bdi dir="auto">{_marked(caption, topic.word)}</bdi> <small>{self.store.similarity[pair]:.2f}</small></li>'
            for pair, caption in zip(drawn, captions, strict=True)
        )
        domains = "".join(self._domain(rows, u, size, images, random) for u, size in enumerate(topic.domains))
        words = [word for word, _score in topic.words]
        find = " ".join([*words, *captions]).lower()
        score = (
            ""
            if self.hierarchy.manifest.get("labelled")
            else f' <small title="score by Eq. 3">{topic.score:.3f}</small>'
        )
        return (
            f'<article class="topic" id="topic-{number}" data-find="{_(_short(find, 900))}"{self._is_repeated(topic)}>'
            f'<h3><span class="number">{number}</span> <bdi>{_(topic.word)}</bdi>{score} {self._badge(number, topic)}</h3>'
            f'<p class="counts">{topic.size:,} pairs, {topic.images:,} images, {len(topic.domains)} domains</p>'
            f'{self._next_words(topic)}{domains}<ul class="captions" aria-label="Captions">{said}</ul></article>\n'
        )

    def _domain(self, rows: np.ndarray, u: int, size: int, images: int, random: np.random.Generator) -> str:
        of_domain = rows[self.hierarchy.domain[rows] == u]
        found, first = np.unique(self.hierarchy.image[of_domain], return_index=True)
        chosen = random.permutation(len(found))[:images]
        captions = self.store.captions.take(self.hierarchy.pair[of_domain[first[chosen]]])
        strip = "".join(self.thumbnails(int(found[i]), caption) for i, caption in zip(chosen, captions, strict=True))
        return (
            f'<div class="domain"><h4>domain {u} <small>{size:,} images</small></h4>'
            f'<div class="strip" role="group" tabindex="0" aria-label="Images of domain {u}">{strip}</div></div>'
        )

    def _next_words(self, topic: Topic) -> str:
        words = "".join(f'<li title="{score:.3f}"><bdi>{_(word)}</bdi></li>' for word, score in topic.words[1:9])
        return f'<ul class="next" aria-label="Next words">{words}</ul>' if words else ""

    def _is_repeated(self, topic: Topic) -> str:
        return ' data-repeated=""' if len(self.same_word[topic.word.lower()]) > 1 else ""

    def _badge(self, number: int, topic: Topic) -> str:
        others = [other for other in self.same_word[topic.word.lower()] if other != number]
        if not others:
            return ""
        title = "also the word of topics " + ", ".join(map(str, others[:20])) + ("..." if len(others) > 20 else "")
        return f'<span class="badge" title="{_(title)}">word of {len(others) + 1} topics</span>'

    def _all_topics(self) -> str:
        topics = self.hierarchy.topics[:LISTED]
        rows = "".join(
            f'<tr{self._is_repeated(topic)} data-find="{_(" ".join(word for word, _s in topic.words).lower())}"><td>{number}</td>'
            f'<th scope="row"><bdi>{_(topic.word)}</bdi></th><td>{topic.score:.3f}</td><td>{topic.size:,}</td>'
            f"<td>{topic.images:,}</td><td>{_(' '.join(map(str, topic.domains)))}</td>"
            f'<td class="words">{_(" ".join(word for word, _s in topic.words[1:6]))}</td></tr>'
            for number, topic in enumerate(topics)
        )
        headers = ("topic", "word", "score", "pairs", "images", "images per domain", "next words")
        table = _table(headers, rows, words=(1, 6), tall=True)
        rest = len(self.hierarchy.topics) - len(topics)
        more = f"<p>{rest:,} smaller ones are left out.</p>" if rest else ""
        return f"<details><summary>All topics in a table ({len(topics):,})</summary>{table}{more}</details>"

    # --- a task -------------------------------------------------------------------------------------------------------

    def _draw(self) -> Task | str:
        """A task with the hierarchy's own settings, or why there is none."""
        c = self._task_settings()
        try:
            sampler = TaskSampler(
                self.hierarchy,
                c["WAYS"],
                c["SUPPORT_SHOTS"],
                c["QUERY_SHOTS"],
                abs(self.seed),
                domain_shift=c["DOMAIN_SHIFT"],
            )
            return sampler.draw(0)
        except GramError as error:
            return str(error)

    def _task_settings(self) -> dict[str, Any]:
        return {**as_dict(get_meta_config().TASKS), **self.hierarchy.manifest.get("config", {}).get("TASKS", {})}

    def _task(self) -> str:
        if isinstance(self.task, str):
            return f'<p class="remark">No task can be drawn with this hierarchy&#x27;s settings: {_(self.task)}</p>'
        task, c = self.task, self._task_settings()
        ways, support = task.support.shape
        whence = (
            "all in one visual domain of its topic"
            if c["DOMAIN_SHIFT"]
            else "from all visual domains of its topic (TASKS.DOMAIN_SHIFT False)"
        )
        rest = f" The first {TASK_CLASSES} classes are drawn here." if ways > TASK_CLASSES else ""
        intro = (
            f"<p>A {ways}-way task as meta-training draws it: a class has {support} support images, {whence}, and "
            f"{task.query.shape[1]} query images from all of them: adapting to the first and scoring on the second is a "
            f"domain shift.{rest}</p>"
        )
        rows = "".join(self._task_class(task, k) for k in range(min(ways, TASK_CLASSES)))
        return f'{intro}<div class="task">{rows}</div>'

    def _task_class(self, task: Task, k: int) -> str:
        topic = int(task.topics[k])
        rows = self.rows(topic)
        images = self.hierarchy.image[rows]
        domain = {int(i): int(u) for i, u in zip(images, self.hierarchy.domain[rows], strict=True)}
        pair = {int(i): int(p) for i, p in zip(images, self.hierarchy.pair[rows], strict=True)}
        sides = []
        for side, of_side in (("support", task.support[k]), ("query", task.query[k])):
            captions = self.store.captions.take([pair[int(image)] for image in of_side])
            figures = "".join(
                f'<figure class="domain-{domain[int(image)] % 6}">{self.thumbnails(int(image), caption)}'
                f"<figcaption>domain {domain[int(image)]}</figcaption></figure>"
                for image, caption in zip(of_side, captions, strict=True)
            )
            sides.append(
                f'<div class="side {side}"><h4>{side}</h4><div class="strip" role="group" tabindex="0" '
                f'aria-label="{side} images of class {k}">{figures}</div></div>'
            )
        return (
            f'<article><h3><span class="number">class {k}</span> <bdi>{_(task.words[k])}</bdi> '
            f"<small>topic {topic}</small></h3>{''.join(sides)}</article>\n"
        )

    # --- dropped pairs ------------------------------------------------------------------------------------------------

    def _dropped_pairs(self) -> list[tuple[str, np.ndarray]]:
        """(fate, rows of the store) of some pairs of each fate but "kept"."""
        found = []
        for fate, name in enumerate(FATE_NAMES):
            if fate == KEPT:
                continue
            pairs = np.flatnonzero(self.hierarchy.fates == fate)
            if len(pairs):
                found.append((name, self.random(1, fate).choice(pairs, min(DROPPED, len(pairs)), replace=False)))
        return found

    def _dropped(self) -> str:
        parts = []
        for name, pairs in self.dropped:
            captions = self.store.captions.take(pairs)
            figures = "".join(
                f'<figure>{self.thumbnails(int(self.store.image[pair]), caption)}<figcaption><bdi dir="auto">'
                f"{_(_short(caption, 140))}</bdi> <small>{self.store.similarity[pair]:.2f}</small></figcaption></figure>"
                for pair, caption in zip(pairs, captions, strict=True)
            )
            parts.append(
                f'<h3>{_(name)}</h3><p class="counts">{_(WHY.get(name, ""))}</p><div class="pairs">{figures}</div>'
            )
        if not parts:
            return "<p>None: every pair is in a topic.</p>"
        return "<p>Drawn at random; the number is CLIP&#x27;s similarity of image and caption.</p>" + "".join(parts)

    # --- settings -----------------------------------------------------------------------------------------------------

    def _settings(self) -> str:
        manifest, settings = self.hierarchy.manifest, self.store.manifest["settings"]
        prints = manifest.get("fingerprints", {})
        clip, sentences = settings["clip"], settings["sentence_model"]
        facts = [
            ("source", settings["source"].get("path", "")),
            ("store", manifest.get("store", "")),
            ("hierarchy", self.hierarchy.path or ""),
            ("CLIP", f"{clip['name']}, {clip.get('precision', '')}, {clip['fingerprint']}"),
            ("Sentence-BERT", f"{sentences['name']}, {sentences['fingerprint']}"),
            ("store's fingerprint", prints.get("store", "")),
            ("hierarchy's fingerprint", self.hierarchy.fingerprint),
            ("topics found", f"{manifest['topics_found']:,}, of which {len(self.hierarchy.topics):,} kept"),
            ("reproducible", "yes" if manifest.get("reproducible") else "no (CHC.SEED is -1)"),
        ]
        rows = "".join(f"<dt>{_(label)}</dt><dd>{_(value)}</dd>" for label, value in facts)
        tree = yaml.safe_dump(manifest.get("config", {}), sort_keys=False, allow_unicode=True)
        return f'<dl class="facts">{rows}</dl><details><summary>Settings of gram cluster</summary><pre>{_(tree)}</pre></details>'


# ----------------------------------------------------------------------------------------------------------------------


def _fate_class(name: str) -> str:
    """The colour of what became of pairs, the same in every drawing."""
    return f"fate-{FATE_NAMES.index(name) % 7 if name in FATE_NAMES else 6}"


def _percent(count: int, total: int) -> str:
    return f"{100 * count / max(total, 1):.1f} %"


def _marked(caption: str, word: str) -> str:
    """A caption with its topic's word marked; both are only text."""
    caption = _short(caption)
    parts = re.split(rf"((?<![^\W\d_]){re.escape(word)}(?![^\W\d_]))", caption, flags=re.IGNORECASE)
    return "".join(f"<mark>{_(part)}</mark>" if i % 2 else _(part) for i, part in enumerate(parts))


def _table(headers: Sequence[str], rows: str, words: Iterable[int] = (), tall: bool = False) -> str:
    head = "".join(
        f'<th scope="col"{" class=words" if i in tuple(words) else ""}>{_(name)}</th>' for i, name in enumerate(headers)
    )
    return (
        f'<div class="scroll{" tall" if tall else ""}" tabindex="0" role="group" aria-label="Table"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _bars(
    title: str,
    ticks: Sequence[str],
    labels: Sequence[str],
    series: Sequence[tuple[str, str, np.ndarray]],
    across: str,
    up: str,
) -> str:
    """Stacked bars as SVG; `labels` say in words what a bar counts, `ticks` stand below it."""
    width, height, left, foot, top = 560, 230, 52, 40, 12
    total = np.sum([counts for _name, _css, counts in series], axis=0)
    most = max(int(total.max(initial=1)), 1)
    step = (width - left - 6) / max(len(total), 1)
    scale = (height - foot - top) / most
    parts = []
    for share in (0, 0.5, 1):
        y = height - foot - share * most * scale
        value = f"{share * most:,.0f}"
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 4}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value}</text>')
    below = np.zeros(len(total))
    for name, css, counts in series:
        for i, count in enumerate(counts):
            if count:
                y, tall = height - foot - (below[i] + count) * scale, count * scale
                parts.append(
                    f'<rect class="{css}" x="{left + i * step + 1:.1f}" y="{y:.1f}" width="{max(step - 2, 1):.1f}" '
                    f'height="{max(tall, 0.8):.1f}"><title>{_(labels[i])}: {count:,} {_(name)}</title></rect>'
                )
        below += counts
    every = max(1, -(-len([t for t in ticks if t]) // 8))
    for i, tick in enumerate(ticks):
        if tick and (every == 1 or i % every == 0):
            parts.append(f'<text x="{left + i * step + 1:.1f}" y="{height - foot + 15}">{_(tick)}</text>')
    parts.append(f'<text x="{(left + width) / 2:.0f}" y="{height - 6}" text-anchor="middle">{_(across)}</text>')
    parts.append(f'<text x="{left - 44}" y="-2">{_(up)}</text>')
    return f'<svg viewBox="0 -12 {width} {height + 12}" role="img" aria-label="{_(title)}">{"".join(parts)}</svg>'


STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1b1b; --faint: #5a5f66; --line: #d9dce1; --band: #f4f5f7;
  --accent: #0b5cad; --gone: #a02c00; --mark: #fff1b8; --mark-ink: #1b1b1b; --badge: #6b4a00; --badge-ground: #fbeccb;
  --f0: #2f78c4; --f1: #c98500; --f2: #8a94a3; --f3: #a9507e; --f4: #3c8f6a; --f5: #7a5cc0; --f6: #b4543a; }
@media (prefers-color-scheme: dark) { :root { --ground: #15171b; --ink: #e6e7e9; --faint: #a3a9b2; --line: #363b43;
  --band: #1e2228; --accent: #7fb8f0; --gone: #ff9c73; --mark: #5d4d12; --mark-ink: #fff4cf; --badge: #f4d48b;
  --badge-ground: #3c321a; --f0: #5c9fe0; --f1: #e0a93c; --f2: #7b8694; --f3: #d07ba6; --f4: #5cb88f; --f5: #a08be0;
  --f6: #e08a70; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body { margin: 0 auto; padding: 1.5rem clamp(.9rem, 3vw, 3rem) 4rem; max-width: 74rem; background: var(--ground);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .8rem; padding-top: .7rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
h4 { font-size: .85rem; margin: 0; font-weight: 600; }
small { color: var(--faint); font-weight: 400; font-size: .8em; font-variant-numeric: tabular-nums; }
p { max-width: 75ch; margin: .5rem 0; }
a { color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin: 0 0 1rem; }
.tiles div { display: flex; flex-direction: column-reverse; background: var(--band); border-radius: 8px; padding: .6rem .8rem; }
.tiles dt { color: var(--faint); font-size: .85rem; } .tiles dd { margin: 0; font-size: 1.4rem; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.remark { max-width: none; border-left: 4px solid var(--f1); background: var(--band); padding: .6rem .9rem; border-radius: 0 8px 8px 0; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; list-style: none; padding: 0; margin: 1rem 0 0; }
.bar { display: flex; height: 1.6rem; border-radius: 6px; overflow: hidden; margin: 0 0 .8rem; gap: 2px; }
.bar span { min-width: 2px; }
.key { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .2em; }
.fate-0 { background: var(--f0); fill: var(--f0); } .fate-1 { background: var(--f1); fill: var(--f1); }
.fate-2 { background: var(--f2); fill: var(--f2); } .fate-3 { background: var(--f3); fill: var(--f3); }
.fate-4 { background: var(--f4); fill: var(--f4); } .fate-5 { background: var(--f5); fill: var(--f5); }
.fate-6 { background: var(--f6); fill: var(--f6); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; margin: .6rem 0; }
.tall { max-height: 32rem; overflow-y: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { background: var(--band); position: sticky; top: 0; font-weight: 600; }
tbody th { font-weight: 400; text-align: left; } .words { text-align: left; } td.words { color: var(--faint); white-space: normal;
  min-width: 16rem; }
tbody tr:last-child > * { border-bottom: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem 2rem; }
.figures figure { margin: 0; } svg { display: block; width: 100%; height: auto; }
svg text { font-size: 12px; fill: var(--faint); } svg .grid { stroke: var(--line); }
figcaption { font-size: .85rem; color: var(--faint); }
.find { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; padding: .6rem 0;
  background: var(--ground); border-bottom: 1px solid var(--line); font-size: .9rem; }
.find[hidden] { display: none; }
input[type=search] { font: inherit; padding: .3rem .6rem; width: min(20rem, 60vw); color: inherit; background: var(--band);
  border: 1px solid var(--line); border-radius: 6px; }
output { color: var(--faint); }
.topic, .task article { border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; margin: 1rem 0; }
.topic h3, .task h3 { margin: 0; font-size: 1.15rem; }
.number { color: var(--faint); font-weight: 400; font-size: .8em; font-variant-numeric: tabular-nums; margin-right: .2em; }
.badge { font-size: .75rem; font-weight: 400; padding: .05rem .5rem; border-radius: 99px; color: var(--badge);
  background: var(--badge-ground); white-space: nowrap; }
.counts { color: var(--faint); font-size: .875rem; margin: .1rem 0 .4rem; }
.next { display: flex; flex-wrap: wrap; gap: .2rem .4rem; list-style: none; padding: 0; margin: 0 0 .6rem; font-size: .8rem; }
.next li { background: var(--band); border-radius: 99px; padding: 0 .6rem; }
.domain, .side { display: grid; grid-template-columns: 7rem minmax(0, 1fr); gap: .2rem .8rem; align-items: center; margin: .45rem 0; }
.domain small { display: block; }
.strip { display: flex; gap: 4px; overflow-x: auto; padding: 2px; scrollbar-width: thin; }
.strip img, .strip .gone { flex: none; }
img { display: block; border-radius: 4px; background: #fff; object-fit: contain; width: 96px; height: 96px; }
.gone { display: flex; align-items: center; justify-content: center; text-align: center; width: 96px; height: 96px; font-size: .7rem;
  line-height: 1.2; color: var(--gone); border: 1px dashed var(--gone); border-radius: 4px; padding: .3rem; }
.captions { margin: .5rem 0 0; padding-left: 1.1rem; font-size: .875rem; overflow-wrap: anywhere; }
mark { background: var(--mark); color: var(--mark-ink); border-radius: 2px; }
.task { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
.task article { margin: 0; } .task .side { grid-template-columns: minmax(0, 1fr); }
.side .strip { flex-wrap: wrap; overflow: visible; } .side figure { margin: 0; border: 2px solid; border-radius: 6px; padding: 2px; }
.side figcaption { text-align: center; font-size: .7rem; line-height: 1.3; }
.support { background: var(--band); border-radius: 8px; padding: .4rem .4rem .4rem .6rem; }
.query { padding: .4rem .4rem .4rem .6rem; }
.domain-0 { border-color: var(--f0) !important; } .domain-1 { border-color: var(--f1) !important; }
.domain-2 { border-color: var(--f4) !important; } .domain-3 { border-color: var(--f3) !important; }
.domain-4 { border-color: var(--f5) !important; } .domain-5 { border-color: var(--f6) !important; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: .7rem 1rem; }
.pairs figure { margin: 0; display: flex; gap: .6rem; } .pairs figure > * { flex: none; } .pairs figcaption { flex: 1; color: inherit;
  overflow-wrap: anywhere; min-width: 0; }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem 1rem; margin: 0; font-size: .9rem; }
.facts dt { color: var(--faint); } .facts dd { margin: 0; overflow-wrap: anywhere; }
details { margin: 1rem 0; } summary { cursor: pointer; }
pre { overflow: auto; background: var(--band); padding: .8rem; border-radius: 6px; font-size: .8rem; line-height: 1.4; }
footer { margin-top: 3rem; color: var(--faint); font-size: .85rem; }
@media (max-width: 40rem) { .domain, .side { grid-template-columns: minmax(0, 1fr); } .domain small { display: inline; }
  .topic, .task article { padding: .7rem .7rem; } .strip img, .strip .gone { width: 80px; height: 80px; }
  .facts { grid-template-columns: minmax(0, 1fr); } .facts dd { margin-bottom: .5rem; } .tiles dd { font-size: 1.2rem; }
  .tiles { grid-template-columns: repeat(3, 1fr); } .tiles div { padding: .5rem .6rem; } .tiles dt { font-size: .75rem; line-height: 1.2; } }
@media print { .find { display: none; } .topic, .task article { break-inside: avoid; } }
""".strip()

SCRIPT = """
(function () {
  var form = document.querySelector("form.find");
  if (!form) return;
  form.hidden = false;
  var search = form.querySelector("input[type=search]"), repeated = form.querySelector("input[type=checkbox]");
  var said = form.querySelector("output"), items = document.querySelectorAll("[data-find]");
  function show() {
    var words = search.value.toLowerCase().split(/\\s+/).filter(Boolean), all = 0, shown = 0;
    items.forEach(function (item) {
      var text = item.getAttribute("data-find");
      var fits = words.every(function (word) { return text.indexOf(word) >= 0; })
        && (!repeated.checked || item.hasAttribute("data-repeated"));
      item.hidden = !fits;
      if (item.classList.contains("topic")) { all += 1; shown += fits ? 1 : 0; }
    });
    said.textContent = shown < all ? shown + " of " + all + " topics" : "";
  }
  form.addEventListener("input", show);
  form.addEventListener("submit", function (event) { event.preventDefault(); });
  show();
})();
""".strip()

_SCRIPT_HASH = "sha256-" + base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode("ascii")
