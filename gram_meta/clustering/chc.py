"""Cross-modal hierarchical clustering, Sec. 3.2: what `gram cluster` does.

filter -> Sentence-BERT features -> UMAP -> HDBSCAN -> topics, a word for each (Eq. 3) -> k-means on CLIP
image features inside each topic -> visual domains.

A labelled collection (`CHC.LABELLED`, Table 6, row 4) has its topics already: classes, and their names as words.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from yacs.config import CfgNode

from gram_meta.clustering.hierarchy import (
    FATE_NAMES,
    FEW_DOMAINS,
    FEW_IMAGES,
    FILTERED,
    KEPT,
    NO_WORD,
    NOISE,
    Hierarchy,
    Topic,
)
from gram_meta.clustering.words import topic_words
from gram_meta.config import as_dict
from gram_meta.corpus.classes import class_of, same_names
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError

log = logging.getLogger(__name__)

Words = list[list[tuple[str, float]]]  # of each topic, the best ones with their scores, best first


def cluster_pairs(store: PairStore, config: CfgNode) -> Hierarchy:
    """Organise the pairs of a store into topics and visual domains.

    Args:
        store: features of n pairs and m images.
        config: reads `CHC`, and of `TASKS` the numbers of shots, which say what a topic must be able to fill.

    Every domain of every topic in the result has at least `domain_minimum(config, U)` distinct images, so
    that each can be the support domain of a task and still leave its share of the query set.

    Raises:
        GramError: settings out of range; too few pairs; fewer than three topics; no topic that can fill a
            task.
    """
    chc = config.CHC
    _check(chc)
    fates = np.full(len(store), KEPT, np.uint8)
    if chc.LABELLED:
        kept, label, words = _given_topics(store)
    else:
        kept, label, words = _found_topics(store, chc, fates)
    found = len(words)

    dropped = {FATE_NAMES[fate]: 0 for fate in (NO_WORD, FEW_IMAGES, FEW_DOMAINS)}
    topics: list[Topic] = []
    members: list[tuple[np.ndarray, np.ndarray]] = []  # pairs of a topic, their domains
    for number in np.argsort(-np.bincount(label, minlength=found), kind="stable"):  # the largest first
        pairs = kept[label == number]
        fate, topic, domain = _topic(store, pairs, words[number], config)
        fates[pairs] = fate
        if topic is None:
            dropped[FATE_NAMES[fate]] += 1
        else:
            topics.append(topic)
            members.append((pairs, domain))
    _report_dropped(dropped, found, len(topics), store, chc.LABELLED)

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
        "labelled": chc.LABELLED,
        "reproducible": chc.SEED >= 0,
        "config": {"CHC": as_dict(chc), "TASKS": as_dict(config.TASKS)},
        "pairs": {"in": len(store), **counts},
        "topics_found": found,
        "topics_dropped": dropped,
    }
    image = np.asarray(store.image)[pair]
    rows = [column[order].astype(np.int64) for column in (pair, image, topic_of, domain_of)]
    return Hierarchy(rows[0], rows[1], rows[2], rows[3], topics, fates, manifest)


def _given_topics(store: PairStore) -> tuple[np.ndarray, np.ndarray, Words]:
    """All pairs, the class of each, and the one word of each class: its name, with score 1.

    In a store of class folders a class is a folder, so that two classes may bear one name (ImageNet has two cranes);
    in any other store it is a caption.
    """
    source = store.manifest["settings"]["source"]
    classes: Sequence[str]
    if source["kind"] == "classes":
        of_image = [class_of(location, source["class_depth"]) for location in store.locations]
        classes = [of_image[row] for row in np.asarray(store.image)]
    else:
        classes = list(store.captions)
    number: dict[str, int] = {}
    label = np.array([number.setdefault(name, len(number)) for name in classes])
    _, first = np.unique(label, return_index=True)
    words: Words = [[(name, 1.0)] for name in store.captions.take(first)]
    log.info("labelled collection: %d classes are the topics, no filter, nothing is noise", len(words))
    if same := same_names(dict(zip(number, (best[0][0] for best in words), strict=True))):
        log.warning("%s: no task holds two of one name", same)
    return np.arange(len(label)), label, words


def _found_topics(store: PairStore, chc: CfgNode, fates: np.ndarray) -> tuple[np.ndarray, np.ndarray, Words]:
    """Pairs that are neither filtered out nor noise (their fate is written into `fates`), the topic of each, and the
    words of each topic."""
    if store.manifest["settings"]["source"]["kind"] == "classes":
        log.info("%s: is a labelled collection; CHC.LABELLED True makes its classes the topics", store.path)
    fates[filtered(store.similarity, chc.FILTER.KEEP, chc.FILTER.THRESHOLD)] = FILTERED
    kept = np.flatnonzero(fates == KEPT)
    log.info("filter: %d of %d pairs dropped (lowest CLIP similarity)", len(store) - len(kept), len(store))

    label = topics_of(np.asarray(store.sentence_features[kept], np.float32), chc)  # (kept,), -1: noise
    fates[kept[label < 0]] = NOISE
    kept, label = kept[label >= 0], label[label >= 0]
    found = int(label.max(initial=-1)) + 1
    log.info("topics: %d found, %d pairs are noise and dropped", found, int((fates == NOISE).sum()))
    # Over all topics found, also those dropped below: they are the L of Eq. 3.
    return kept, label, topic_words(store.captions.take(kept), label, found)


def _topic(
    store: PairStore, pairs: np.ndarray, words: Sequence[tuple[str, float]], config: CfgNode
) -> tuple[int, Topic | None, np.ndarray]:
    """The fate of the pairs of one topic, and unless they are dropped the topic and each pair's domain."""
    nowhere = np.full(len(pairs), -1)
    if not words or words[0][1] <= 0:
        return NO_WORD, None, nowhere  # Eq. 3 gives no word of it a positive score: nothing sets it apart
    # An image with several captions in a topic counts once.
    images, of_pair = np.unique(store.image[pairs], return_inverse=True)
    if len(images) < config.TASKS.SUPPORT_SHOTS + config.TASKS.QUERY_SHOTS:
        return FEW_IMAGES, None, nowhere
    domain = domains_of(np.asarray(store.image_features[images], np.float32), config)
    if domain is None:
        return FEW_DOMAINS, None, nowhere
    word, score = words[0]
    sizes = np.bincount(domain).tolist()
    topic = Topic(word, score, [list(item) for item in words], len(pairs), len(images), sizes)
    return KEPT, topic, domain[of_pair]


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


def filtered(similarity: np.ndarray, keep: float, threshold: float) -> np.ndarray:
    """Rows of the pairs to drop, those with the lowest similarity: below `threshold` (when above -1), else a
    share of 1 - `keep`; among equals the later rows go first."""
    if threshold > -1:
        return np.flatnonzero(np.asarray(similarity) < threshold)
    order = np.argsort(-np.asarray(similarity, np.float64), kind="stable")  # best first
    return order[math.ceil(round(len(order) * keep, 6)) :]


def topics_of(features: np.ndarray, chc: CfgNode) -> np.ndarray:
    """Topic of each sentence: UMAP, then HDBSCAN.

    HDBSCAN is the package `hdbscan`: the authors' own, with wheels for Python 3.10 to 3.13; scikit-learn's
    version finds the same clusters but has neither the dual-tree minimum spanning tree, whose time grows
    nearly linearly with the number of pairs, nor a way to assign new points.

    Args:
        features: (n, S) float32, L2-normalised sentence features.
        chc: the node `CHC`.

    Returns:
        (n,) int64; -1 is noise.
    """
    n, settings = len(features), chc.TOPICS
    least = max(settings.MIN_CLUSTER_SIZE, settings.COMPONENTS + 3, 4)
    if n < least:
        raise GramError(f"clustering: expected at least {least} pairs after the filter, found {n}")
    reduced = reduce(features, chc)
    import hdbscan

    clusterer = hdbscan.HDBSCAN(
        min_cluster_size=settings.MIN_CLUSTER_SIZE,
        min_samples=settings.MIN_SAMPLES,
        cluster_selection_method=settings.SELECTION,
        core_dist_n_jobs=1 if chc.SEED >= 0 else -1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return clusterer.fit_predict(reduced.astype(np.float64)).astype(np.int64)


def reduce(features: np.ndarray, chc: CfgNode) -> np.ndarray:
    """Sentence features (n, S) in few dimensions (n, COMPONENTS), where distances tell again.

    UMAP gives the same result twice on one thread only: with `CHC.SEED >= 0` it runs on one, with -1 on all
    and differs from run to run.
    """
    settings = chc.TOPICS
    if settings.REDUCTION == "pca":
        from sklearn.decomposition import PCA

        return PCA(settings.COMPONENTS, svd_solver="full").fit_transform(features)
    log.info(
        "UMAP: %s", "reproducible, on one thread" if chc.SEED >= 0 else "on all threads, not reproducible"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numba's and UMAP's remarks on threads and spectral starts
        import umap

        return umap.UMAP(
            n_neighbors=min(settings.NEIGHBORS, len(features) - 1),
            n_components=settings.COMPONENTS,
            min_dist=0.0,  # points may lie close: HDBSCAN looks for dense places
            metric="cosine",
            random_state=chc.SEED if chc.SEED >= 0 else None,
            n_jobs=1 if chc.SEED >= 0 else -1,
        ).fit_transform(features)


def domain_minimum(config: CfgNode, domains: int) -> int:
    """Distinct images that each of `domains` domains needs: a support set and its share of a query set."""
    return config.TASKS.SUPPORT_SHOTS + math.ceil(config.TASKS.QUERY_SHOTS / domains)


def domains_of(features: np.ndarray, config: CfgNode) -> np.ndarray | None:
    """Visual domain of each image of a topic: k-means on L2-normalised CLIP features.

    With `CHC.DOMAINS.K` domains; where one of them would be too small to serve as support domain, with fewer,
    down to two.

    Args:
        features: (m, D) float32, one row per distinct image.

    Returns:
        (m,) int64, the largest domain is 0; None when not even two domains are large enough.
    """
    from sklearn.cluster import KMeans

    features = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    for k in range(config.CHC.DOMAINS.K, 1, -1):
        least = domain_minimum(config, k)
        if len(features) < k * least:
            continue
        seed = config.CHC.SEED if config.CHC.SEED >= 0 else None
        with warnings.catch_warnings():
            # k-means warns of fewer distinct points than clusters: seen below as a small cluster.
            warnings.simplefilter("ignore")
            label = KMeans(k, n_init=config.CHC.DOMAINS.STARTS, random_state=seed).fit_predict(features)
        sizes = np.bincount(label, minlength=k)
        if sizes.min() >= least:
            rank = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
            return rank[label].astype(np.int64)
    return None


def _check(chc: CfgNode) -> None:
    checks: list[tuple[str, Any, bool, str]] = [
        ("FILTER.KEEP", chc.FILTER.KEEP, 0 < chc.FILTER.KEEP <= 1, "a share above 0 and at most 1"),
        ("TOPICS.REDUCTION", chc.TOPICS.REDUCTION, chc.TOPICS.REDUCTION in ("umap", "pca"), "umap or pca"),
        ("TOPICS.SELECTION", chc.TOPICS.SELECTION, chc.TOPICS.SELECTION in ("eom", "leaf"), "eom or leaf"),
        ("TOPICS.NEIGHBORS", chc.TOPICS.NEIGHBORS, chc.TOPICS.NEIGHBORS >= 2, "at least 2"),
        ("TOPICS.COMPONENTS", chc.TOPICS.COMPONENTS, chc.TOPICS.COMPONENTS >= 2, "at least 2"),
        (
            "TOPICS.MIN_CLUSTER_SIZE",
            chc.TOPICS.MIN_CLUSTER_SIZE,
            chc.TOPICS.MIN_CLUSTER_SIZE >= 2,
            "at least 2",
        ),
        ("TOPICS.MIN_SAMPLES", chc.TOPICS.MIN_SAMPLES, chc.TOPICS.MIN_SAMPLES >= 1, "at least 1"),
        ("DOMAINS.K", chc.DOMAINS.K, chc.DOMAINS.K >= 2, "at least 2"),
        ("DOMAINS.STARTS", chc.DOMAINS.STARTS, chc.DOMAINS.STARTS >= 1, "at least 1"),
    ]
    for key, value, is_fine, expected in checks:
        if not is_fine:
            raise GramError(f"CHC.{key}: expected {expected}, found {value!r}")
