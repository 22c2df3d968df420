"""A hierarchy as one HTML page: topics with their words, images of every visual domain, a task, and what was dropped.

The page is a single file that loads nothing from outside (its content security policy forbids it), works without its
script, and stays below a size in bytes: every thumbnail has a bound, so the number of images decides.
"""

import io
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image, features

from gram_meta.clustering.hierarchy import EXCLUDED, FATE_NAMES, FILTERED, KEPT, Hierarchy
from gram_meta.clustering.sample import spread
from gram_meta.config import as_dict, get_meta_config
from gram_meta.corpus.places import Places
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError
from gram_meta.files import PathLike, atomic_write
from gram_meta.images import BadImage
from gram_meta.method.tasks import Task, TaskConfig, TaskSampler
from gram_meta.report.html.base import data_uri, render

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
LEAST_POINTS, POINTS = 20, 4_000  # different captions that a map needs; most pairs on it: from 4,096 UMAP is slower
MAP_SIZE, MAP_MARGIN = np.array([1000, 700]), 15  # map.html and hierarchy.js name the size too


@dataclass(frozen=True)
class Summary:
    """Size of a page in bytes, numbers of topics and images on it, and the reasons of unreadable images."""

    size: int
    topics: int
    images_per_domain: int
    images: int
    unreadable: Counter[str]

    def __str__(self) -> str:
        topics = f"{self.topics} topics with up to {self.images_per_domain} images per domain"
        text = f"{self.size / 1e6:.1f} MB, {topics}, {self.images} images"
        if not self.unreadable:
            return text
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.unreadable.most_common())
        return f"{text}, {self.unreadable.total()} of which could not be read ({reasons})"


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
    """Write the page, atomically. Images that cannot be read become placeholders, and are counted.

    Args:
        hierarchy, store: what to show; they belong together.
        topics: how many of the largest topics have images; 0: all. The others are in the table of all topics.
        images: of each visual domain. Fewer images, and fewer topics, are shown if the page would exceed `limit`.
        image_root: the folder that holds the images now; None: where `gram embed` read them.
        seed: of the random choice of images, captions, task, dropped pairs and points of the map, and of its UMAP.
        agreement: text of the comparison with a truth, if there is one.
        limit: largest size in bytes.
    """
    if topics < 0 or images < 1:
        raise GramError(f"--topics and --images: expected at least 0 and 1, found {topics} and {images}")
    view = View(hierarchy, store, store.places(image_root), seed)
    task, dropped = task_rows(view), _dropped(view)
    drawn = render("map.html", map=map_rows(view, min(POINTS, limit // 2_000)), view=view)
    shown, images = _fitting(view, topics or len(hierarchy.topics), images, limit - len(drawn.encode()))
    text = render(
        "hierarchy.html",
        title=f"{hierarchy.path.name if hierarchy.path else 'hierarchy'}: topics and visual domains",
        style="hierarchy.css",
        script="hierarchy.js",
        colours={name: f"fate-{number}" for number, name in enumerate(FATE_NAMES)},
        percent=_percent,
        agreement=agreement,
        images=images,
        view=view,
        topics=[topic_rows(view, number, images) for number in range(shown)],
        most_listed=LISTED,
        task=task,
        dropped=dropped,
        map=Markup(drawn),
        sizes=_sizes(hierarchy),
        similarity=_similarity(hierarchy, store),
    )
    with atomic_write(path, "w") as file:
        file.write(text)
    return Summary(len(text.encode()), shown, images, view.asked, view.unreadable)


def _fitting(view: "View", topics: int, images: int, left: int) -> tuple[int, int]:
    """Return as many topics and images per domain, of those asked for, as fit in the bytes that are left."""
    topics = min(topics, len(view.hierarchy.topics))
    left -= view.asked * IMAGE_BYTES + 300 * min(len(view.hierarchy.topics), LISTED) + 60_000
    while topics > 1 or images > 1:
        wanted = sum(min(size, images) for topic in view.hierarchy.topics[:topics] for size in topic.domains)
        if wanted * IMAGE_BYTES + topics * TOPIC_BYTES <= left:
            break
        if images > 4 or (images > 1 and topics <= 50):
            images -= 1
        else:
            topics = max(1, topics * 9 // 10)
    return topics, images


# -------------------------------------------------------------------------------------- Images, and the rows of a topic


@dataclass
class View:
    """A hierarchy with its store, ready to draw from; counts the images that were asked for and those unreadable."""

    hierarchy: Hierarchy
    store: PairStore
    places: Places
    seed: int
    asked: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        topic = self.hierarchy.topic
        self.order = np.argsort(topic, kind="stable")  # rows of the hierarchy, by topic
        self.ends = np.searchsorted(topic[self.order], np.arange(len(self.hierarchy.topics) + 1))
        self.same_word: dict[str, list[int]] = defaultdict(list)
        for number, one in enumerate(self.hierarchy.topics):
            self.same_word[one.word.lower()].append(number)

    def random(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([abs(self.seed), *what])

    def rows(self, topic: int) -> np.ndarray:
        """Return the hierarchy's rows of a topic."""
        return self.order[self.ends[topic] : self.ends[topic + 1]]

    def images(self, rows: Iterable[int], pairs: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Return thumbnails of the store's images at `rows`, with the captions of `pairs` as their texts."""
        captions = self.store.captions.take(pairs)
        return [self._image(int(row), caption) for row, caption in zip(rows, captions, strict=True)]

    def _image(self, row: int, caption: str) -> dict[str, Any]:
        self.asked += 1
        shown: dict[str, Any] = {"caption": _short(caption, 160), "src": ""}
        try:
            image = self.places.image(row)
        except (BadImage, GramError, OSError) as error:
            reason = str(error) if isinstance(error, BadImage) else "its shard is gone or has changed"
            self.unreadable[reason] += 1
            return shown | {"reason": reason, "location": self.places.locations[row]}
        return shown | dict(zip(("width", "height", "src"), thumbnail(image), strict=True))


def thumbnail(image: Image.Image) -> tuple[int, int, str]:
    """Return width, height and data URI of a small copy, whose file has at most `THUMBNAIL_BYTES`."""
    kind = "webp" if features.check("webp") else "jpeg"
    side = THUMBNAIL
    while True:
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in (75, 60, 45, 30, 15):
            file = io.BytesIO()
            small.save(file, kind, quality=quality)
            if file.tell() <= THUMBNAIL_BYTES:
                return small.width, small.height, data_uri(file.getvalue(), kind)
        side = side * 2 // 3


# --------------------------------------------------------------------------------------------------------------- Charts


def _sizes(hierarchy: Hierarchy) -> dict[str, Any] | None:
    """Return the chart of topics by size, and its text; None if there is no topic."""
    sizes = np.array([topic.size for topic in hierarchy.topics])
    if not len(sizes):
        return None
    largest = int(np.sort(sizes)[::-1][:10].sum())
    edges = np.unique(np.geomspace(sizes.min(), sizes.max() + 1, 15).astype(int))
    if len(edges) < 2:
        edges = np.array([sizes.min(), sizes.max() + 1])
    labels = [f"{a:,}" if b - a == 1 else f"{a:,} to {b - 1:,}" for a, b in pairwise(edges)]
    return {
        "chart": _chart(labels, [f"{edge:,}" for edge in edges[:-1]], {"topics": np.histogram(sizes, edges)[0]}),
        "text": f"Largest {sizes.max():,} pairs, median {int(np.median(sizes)):,}, smallest {sizes.min():,}. "
        f"The ten largest hold {_percent(largest, int(sizes.sum()))} of the pairs in topics.",
    }


def _similarity(hierarchy: Hierarchy, store: PairStore) -> dict[str, Any]:
    """Return the chart of pairs by the similarity of image and caption."""
    similarity, fates = np.asarray(store.similarity), hierarchy.fates
    low, high = np.quantile(similarity, [0.001, 0.999])
    edges = np.linspace(low, max(high, low + 1e-3), 25)
    inside = similarity.clip(edges[0], edges[-1])
    kept, filtered = fates == KEPT, fates == FILTERED
    groups = {"kept": kept, "filtered": filtered, "dropped later": ~(kept | filtered)}
    series = {name: np.histogram(inside[mask], edges)[0] for name, mask in groups.items()}
    return _chart([f"{a:.3f} to {b:.3f}" for a, b in pairwise(edges)], [f"{edge:.2f}" for edge in edges[:-1]], series)


def _chart(labels: Sequence[str], ticks: Sequence[str], series: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return stacked bars, whose parts have a colour, a height in percent of the largest bar, and a text.

    `labels` name what each bar counts; about eight of the `ticks` below are shown; `series` starts at the bottom.
    """
    most = max(int(np.sum(list(series.values()), axis=0).max()), 1)
    every = -(-len(ticks) // 8)
    bars = []
    for i, label in enumerate(labels):
        parts = [
            (css, f"{100 * counts[i] / most:.1f}", f"{label}: {counts[i]:,} {name}")
            for css, (name, counts) in enumerate(series.items())
            if counts[i]
        ]
        bars.append({"tick": "" if i % every else ticks[i], "parts": parts})
    return {"bars": bars, "most": most, "key": [name for name, counts in series.items() if counts.any()]}


# ------------------------------------------------------------------------------------------------------------------ Map


def map_rows(view: View, most: int) -> dict[str, Any]:
    """Return the points of the map by topic, or in `problem` the reason why there is none.

    A point is a pair that passed the filter, of more than `most` a random choice. Its place is a UMAP of its caption's
    sentence feature; in a labelled collection, whose captions are class names, of its image's CLIP feature. A group has
    a topic's number (-1: none), its points' captions in lines, their places (n, 2) inside `MAP_SIZE`, and the middle.
    """
    hierarchy, store, seed = view.hierarchy, view.store, abs(view.seed)
    clustered = np.flatnonzero(~np.isin(hierarchy.fates, (FILTERED, EXCLUDED)))
    pairs = np.sort(view.random(2).permutation(clustered)[:most])
    labelled = hierarchy.manifest.get("labelled")
    features = store.image_features[store.image[pairs]] if labelled else store.sentence_features[pairs]
    different, which, copies = np.unique(features, axis=0, return_inverse=True, return_counts=True)
    if len(different) < LEAST_POINTS:
        return {"problem": f"expected at least {LEAST_POINTS} pairs with different captions, found {len(different)}"}
    import umap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numba and UMAP warn about threads and spectral initialisation
        reducer = umap.UMAP(metric="cosine", n_epochs=200, random_state=seed, n_jobs=1)  # reproducible on one thread
        reduced = reducer.fit_transform(different.astype(np.float32)).astype(np.float64)
    # Pairs of one caption lie around one place, else a single point would hide them.
    places = spread(reduced, copies, seed)[np.argsort(np.argsort(which.ravel(), kind="stable"))]
    places = MAP_MARGIN + (places - places.min(axis=0)) / np.ptp(places, axis=0) * (MAP_SIZE - 2 * MAP_MARGIN)
    captions = np.array([_short(" ".join(caption.split()), 120) for caption in store.captions.take(pairs)], object)
    topic = np.full(len(store), -1)
    topic[hierarchy.pair] = hierarchy.topic
    rows = [(int(number), topic[pairs] == number) for number in np.unique(topic[pairs])]
    groups = [(n, "\n".join(captions[mask]), places[mask], np.median(places[mask], axis=0)) for n, mask in rows]
    return {"problem": "", "shown": len(pairs), "of": len(clustered), "groups": groups}


# --------------------------------------------------------------------------------------------------------------- Topics


def topic_rows(view: View, number: int, images: int) -> dict[str, Any]:
    topic, rows, random = view.hierarchy.topics[number], view.rows(number), view.random(0, number)
    drawn = view.hierarchy.pair[random.permutation(rows)[:CAPTIONS]]
    captions = view.store.captions.take(drawn)
    word = re.compile(rf"((?<![^\W\d_]){re.escape(topic.word)}(?![^\W\d_]))", re.IGNORECASE)  # in a caption
    return {
        "topic": topic,
        "others": [it for it in view.same_word[topic.word.lower()] if it != number],
        "find": _short(" ".join([*dict(topic.words), *captions]).lower(), 900),
        "domains": [
            (size, _domain(view, rows[view.hierarchy.domain[rows] == u], images, random))
            for u, size in enumerate(topic.domains)
        ],
        "captions": [
            (word.split(_short(caption)), f"{view.store.similarity[pair]:.2f}")
            for pair, caption in zip(drawn, captions, strict=True)
        ],
    }


def _domain(view: View, rows: np.ndarray, images: int, random: np.random.Generator) -> list[dict[str, Any]]:
    """Return thumbnails of so many images of one domain, whose rows of the hierarchy are `rows`."""
    found, first = np.unique(view.hierarchy.image[rows], return_index=True)
    chosen = random.permutation(len(found))[:images]
    return view.images(found[chosen], view.hierarchy.pair[rows[first[chosen]]])


# -------------------------------------------------------------------------------------------- A task, and dropped pairs


def task_rows(view: View) -> dict[str, Any]:
    """Return a task drawn with the hierarchy's own settings, or the reason why none can be drawn."""
    settings = as_dict(get_meta_config().TASKS) | view.hierarchy.manifest.get("config", {}).get("TASKS", {})
    try:
        config, features = TaskConfig.from_config({"TASKS": settings}), view.store.image_features
        task = TaskSampler(view.hierarchy, config, abs(view.seed), features=features).draw(0)
    except GramError as error:
        return {"problem": str(error)}
    ways, support = task.support.shape
    return {
        "problem": "",
        "ways": ways,
        "support": support,
        "query": task.query.shape[1],
        "shift": settings["DOMAIN_SHIFT"],
        "classes": [_task_class(view, task, k) for k in range(min(ways, TASK_CLASSES))],
    }


def _task_class(view: View, task: Task, k: int) -> dict[str, Any]:
    topic = int(task.topics[k])
    rows = view.rows(topic)
    row_of = {int(image): row for image, row in zip(view.hierarchy.image[rows], rows, strict=True)}

    def side(images: Sequence[int]) -> list[tuple[int, dict[str, Any]]]:
        """Return (domain, thumbnail) of each image."""
        of_side = [row_of[int(image)] for image in images]
        thumbnails = view.images(images, view.hierarchy.pair[of_side])
        return list(zip(map(int, view.hierarchy.domain[of_side]), thumbnails, strict=True))

    sides = [("support", side(task.support[k])), ("query", side(task.query[k]))]
    return {"word": task.words[k], "topic": topic, "sides": sides}


def _dropped(view: View) -> list[tuple[str, list[tuple[dict[str, Any], str, str]]]]:
    """Return some pairs of each fate but "kept": thumbnail, caption and similarity."""
    shown = []
    for fate, name in enumerate(FATE_NAMES):
        pairs = np.flatnonzero(view.hierarchy.fates == fate)
        if fate != KEPT and len(pairs):
            pairs = view.random(1, fate).choice(pairs, min(DROPPED, len(pairs)), replace=False)
            captions = [_short(caption, 140) for caption in view.store.captions.take(pairs)]
            similarity = [f"{view.store.similarity[pair]:.2f}" for pair in pairs]
            images = view.images(view.store.image[pairs], pairs)
            shown.append((name, list(zip(images, captions, similarity, strict=True))))
    return shown


# ---------------------------------------------------------------------------------------------------------------- Words


def _percent(count: int, total: int) -> str:
    return f"{100 * count / max(total, 1):.1f} %"


def _short(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
