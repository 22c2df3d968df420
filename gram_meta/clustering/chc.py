"""Cross-modal hierarchical clustering, Sec. 3.2: what `gram cluster` does.

filter -> Sentence-BERT features -> UMAP -> HDBSCAN -> topics, a word for each (Eq. 3) -> k-means on CLIP
image features inside each topic -> visual domains.

Of more than `CHC.TOPICS.SAMPLE` pairs, UMAP and HDBSCAN see a sample, and the others are assigned (`sample`). Features
are read from their files in ascending order and in blocks of bounded size, so memory does not grow with the corpus.

A labelled collection (`CHC.LABELLED`, Table 6, row 4) has its topics already: its classes, whose names are the words.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from yacs.config import CfgNode

from gram_meta.clustering.domains import Images, domains_of, images_by_topic
from gram_meta.clustering.hierarchy import (
    EXCLUDED,
    FATE_NAMES,
    FEW_DOMAINS,
    FEW_IMAGES,
    KEPT,
    NO_WORD,
    Hierarchy,
    Topic,
)
from gram_meta.clustering.sample import Steps
from gram_meta.clustering.settings import ChcSettings
from gram_meta.clustering.topics import find_topics, given_topics
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError
from gram_meta.files import PathLike

log = logging.getLogger(__name__)


def cluster_pairs(
    store: PairStore,
    config: CfgNode,
    *,
    excluded: np.ndarray | None = None,
    scratch: PathLike | None = None,
    progress: bool = False,
) -> Hierarchy:
    """Organise the pairs of a store into topics and visual domains.

    Args:
        store: features of n pairs and m images.
        config: the settings that `ChcSettings` reads.
        excluded: rows of images to leave out; their pairs have the fate "excluded".
        scratch: a folder in which a run over a sample keeps intermediate results, in hidden files: an interrupted run
            with the same settings continues from them. `Steps(scratch).forget()` removes them.
        progress: show a bar for the long steps.

    Every domain of every topic in the result has at least `domain_minimum(settings, U)` distinct images, so that each
    can be the support domain of a task and still provide its share of the query set.

    Raises:
        GramError: settings out of range; too few pairs; fewer than three topics; no topic that can fill a task.
    """
    settings = ChcSettings.from_config(config)
    fates = np.full(len(store), KEPT, np.uint8)
    if excluded is not None:
        fates[np.isin(store.image, excluded)] = EXCLUDED
        log.info("excluded: %d pairs of %d images", int((fates == EXCLUDED).sum()), len(np.unique(excluded)))
    facts: dict[str, Any] = {}
    if settings.labelled:
        kept, label, words = given_topics(store, fates)
    else:
        facts, kept, label, words = find_topics(store, settings, fates, Steps(scratch), progress)
    found = len(words)

    # The pairs of topic l, ascending: kept[order[start[l] : start[l + 1]]].
    order = np.argsort(label, kind="stable")
    start = np.searchsorted(label[order], np.arange(found + 1))
    dropped = {FATE_NAMES[fate]: 0 for fate in (NO_WORD, FEW_IMAGES, FEW_DOMAINS)}
    topics: list[Topic] = []
    members: list[tuple[np.ndarray, np.ndarray]] = []  # pairs of a topic, their domains
    largest_first = np.argsort(-np.diff(start), kind="stable")
    pairs_of = {number: kept[order[start[number] : start[number + 1]]] for number in largest_first.tolist()}
    for number, images in images_by_topic(store, pairs_of, progress):
        pairs = pairs_of[number]
        fate, topic, domain = _topic(images, pairs, words[number], settings)
        fates[pairs] = fate
        if topic is None:
            dropped[FATE_NAMES[fate]] += 1
        else:
            topics.append(topic)
            members.append((pairs, domain))
    _report_dropped(dropped, found, len(topics), store, settings.labelled)

    pair = np.concatenate([pairs for pairs, _ in members])
    topic_of = np.repeat(np.arange(len(topics)), [len(pairs) for pairs, _ in members])
    domain_of = np.concatenate([domain for _, domain in members])
    order = np.argsort(pair, kind="stable")
    counts = {name: int((fates == fate).sum()) for fate, name in enumerate(FATE_NAMES)}
    log.info("kept: %d topics with %d pairs", len(topics), counts["kept"])
    manifest = {
        "store": str(store.path.resolve()),
        "fingerprints": {
            "store": store.fingerprint,
            "clip": store.clip_fingerprint,
            "sentence_model": store.sentence_fingerprint,
        },
        "labelled": settings.labelled,
        "reproducible": settings.is_reproducible,
        "config": settings.recorded,
        "pairs": {"in": len(store), **counts},
        "topics_found": found,
        "topics_dropped": dropped,
        **facts,
    }
    image = np.asarray(store.image)[pair]
    rows = [column[order].astype(np.int64) for column in (pair, image, topic_of, domain_of)]
    return Hierarchy(rows[0], rows[1], rows[2], rows[3], topics, fates, manifest)


def _topic(
    images: Images, pairs: np.ndarray, words: Sequence[tuple[str, float]], settings: ChcSettings
) -> tuple[int, Topic | None, np.ndarray]:
    """Return the fate of a topic's pairs and, unless they are dropped, the topic and the domain of each pair."""
    nowhere = np.full(len(pairs), -1)
    if not words or words[0][1] <= 0:
        return NO_WORD, None, nowhere  # no word of it has a positive score by Eq. 3
    if len(images) < settings.support_shots + settings.query_shots:
        return FEW_IMAGES, None, nowhere
    domain = domains_of(images, settings)
    if domain is None:
        return FEW_DOMAINS, None, nowhere
    word, score = words[0]
    sizes = np.bincount(domain).tolist()
    topic = Topic(word, score, list(words), len(pairs), len(images), sizes)
    return KEPT, topic, domain[images.of_pair]


def _report_dropped(dropped: dict[str, int], found: int, kept: int, store: PairStore, labelled: bool) -> None:
    for reason, count in dropped.items():
        if count:
            log.info("dropped: %d of %d topics (%s)", count, found, reason)
    if not kept:
        why = ", ".join(f"{reason}: {count}" for reason, count in dropped.items() if count)
        change = "are captions names of classes?" if labelled else "raise CHC.TOPICS.MIN_CLUSTER_SIZE"
        raise GramError(
            f"{store.path}: expected topics that can fill support and query sets, found none of {found} "
            f"({why}); give more pairs, {change}, or lower TASKS.SUPPORT_SHOTS and TASKS.QUERY_SHOTS"
        )
