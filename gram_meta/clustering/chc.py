"""Cross-modal hierarchical clustering, Sec. 3.2: what `gram cluster` does.

filter -> Sentence-BERT features -> UMAP -> HDBSCAN -> topics, a word for each (Eq. 3) -> k-means on CLIP
image features inside each topic -> visual domains.

Of more than `CHC.TOPICS.SAMPLE` pairs, UMAP and HDBSCAN see a sample, and the others are assigned (`sample`). Features
are read from their files in ascending order, as many rows at once as a constant says, so memory does not grow with them.

A labelled collection (`CHC.LABELLED`, Table 6, row 4) has its topics already: classes, and their names as words.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from yacs.config import CfgNode

from gram_meta.clustering import sample
from gram_meta.clustering.hierarchy import (
    EXCLUDED,
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
from gram_meta.clustering.steps import Steps
from gram_meta.clustering.words import topic_words
from gram_meta.config import as_dict
from gram_meta.corpus.sources.classes import class_of, same_names
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError
from gram_meta.files import PathLike

log = logging.getLogger(__name__)

Words = list[list[tuple[str, float]]]  # of each topic, the best ones with their scores, best first


LEAST_SAMPLE = 100  # pairs: fewer have no neighbours to ask
GATHER = 1 << 19  # images whose features are in memory at once: 512 MB at 512 dimensions


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
        config: reads `CHC`, and of `TASKS` the numbers of shots, which say what a topic must be able to fill.
        excluded: rows of images to leave out; their pairs have a fate of their own.
        scratch: a folder that keeps what a run over a sample has found so far, in hidden files: an interrupted run
            with the same settings goes on there. `Steps(scratch).forget()` removes them.
        progress: show a bar for what takes long.

    Every domain of every topic in the result has at least `domain_minimum(config, U)` distinct images, so
    that each can be the support domain of a task and still leave its share of the query set.

    Raises:
        GramError: settings out of range; too few pairs; fewer than three topics; no topic that can fill a
            task.
    """
    chc = config.CHC
    _check(chc)
    fates = np.full(len(store), KEPT, np.uint8)
    if excluded is not None:
        fates[np.isin(store.image, excluded)] = EXCLUDED
        log.info("excluded: %d pairs of %d images", int((fates == EXCLUDED).sum()), len(np.unique(excluded)))
    facts: dict[str, Any] = {}
    if chc.LABELLED:
        kept, label, words = _given_topics(store, fates)
    else:
        facts, kept, label, words = _found_topics(store, chc, fates, Steps(scratch), progress)
    found = len(words)

    # The pairs of topic l, ascending: kept[order[start[l] : start[l + 1]]].
    order = np.argsort(label, kind="stable")
    start = np.searchsorted(label[order], np.arange(found + 1))
    dropped = {FATE_NAMES[fate]: 0 for fate in (NO_WORD, FEW_IMAGES, FEW_DOMAINS)}
    topics: list[Topic] = []
    members: list[tuple[np.ndarray, np.ndarray]] = []  # pairs of a topic, their domains
    largest_first = np.argsort(-np.diff(start), kind="stable")
    pairs_of = {number: kept[order[start[number] : start[number + 1]]] for number in largest_first.tolist()}
    for number, pictures in _pictures(store, pairs_of, progress):
        pairs = pairs_of[number]
        fate, topic, domain = _topic(pictures, pairs, words[number], config)
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
        **facts,
    }
    image = np.asarray(store.image)[pair]
    rows = [column[order].astype(np.int64) for column in (pair, image, topic_of, domain_of)]
    return Hierarchy(rows[0], rows[1], rows[2], rows[3], topics, fates, manifest)


def _given_topics(store: PairStore, fates: np.ndarray) -> tuple[np.ndarray, np.ndarray, Words]:
    """All pairs that are not excluded, the class of each, and the one word of each class: its name, with score 1.

    In a store of class folders a class is a folder, so that two classes may bear one name (ImageNet has two cranes);
    in any other store it is a caption.
    """
    source = store.manifest["settings"]["source"]
    kept = np.flatnonzero(fates == KEPT)
    if source["kind"] == "classes":
        of_image = [sys.intern(class_of(location, source["class_depth"])) for location in store.locations]
        classes: Iterable[str] = (of_image[row] for row in np.asarray(store.image)[kept])
    else:
        classes = (caption for caption, fate in zip(store.captions, fates, strict=True) if fate == KEPT)
    number: dict[str, int] = {}
    label = np.fromiter((number.setdefault(name, len(number)) for name in classes), np.int64, len(kept))
    _, first = np.unique(label, return_index=True)
    words: Words = [[(name, 1.0)] for name in store.captions.take(kept[first])]
    log.info("labelled collection: %d classes are the topics, no filter, nothing is noise", len(words))
    if same := same_names(dict(zip(number, (best[0][0] for best in words), strict=True))):
        log.warning("%s: no task holds two of one name", same)
    return kept, label, words


def _found_topics(
    store: PairStore, chc: CfgNode, fates: np.ndarray, steps: Steps, progress: bool
) -> tuple[dict[str, Any], np.ndarray, np.ndarray, Words]:
    """What the manifest says of a sample; pairs that are neither filtered out nor noise (their fate is written into
    `fates`), the topic of each, and the words of each topic."""
    if store.manifest["settings"]["source"]["kind"] == "classes":
        log.info("%s: is a labelled collection; CHC.LABELLED True makes its classes the topics", store.path)
    candidates = np.flatnonzero(fates == KEPT)
    dropped = filtered(store.similarity[candidates], chc.FILTER.KEEP, chc.FILTER.THRESHOLD)
    fates[candidates[dropped]] = FILTERED
    kept = np.flatnonzero(fates == KEPT)
    log.info("filter: %d of %d pairs dropped (lowest CLIP similarity)", len(dropped), len(candidates))

    facts: dict[str, Any] = {}
    if 0 < chc.TOPICS.SAMPLE < len(kept):
        label, facts["sample"] = _sampled_topics(store, kept, chc, steps, progress)
    else:
        label = topics_of(np.asarray(store.sentence_features[kept], np.float32), chc)  # (kept,), -1: noise
    fates[kept[label < 0]] = NOISE
    found = int(label.max(initial=-1)) + 1
    log.info("topics: %d found, %d pairs are noise and dropped", found, int((fates == NOISE).sum()))
    # Over all topics found, also those dropped later: they are the L of Eq. 3.
    of_caption = np.full(len(store), -1)
    of_caption[kept] = label
    words = topic_words(store.captions, of_caption.tolist(), found)
    return facts, kept[label >= 0], label[label >= 0], words


def _sampled_topics(
    store: PairStore, kept: np.ndarray, chc: CfgNode, steps: Steps, progress: bool
) -> tuple[np.ndarray, dict[str, Any]]:
    """Topics (kept,) of many pairs, -1 is noise, and what the manifest says of how they came about.

    Captions that are the same word for word get the same topic: one that occurs in the sample the most frequent
    topic that clustering gives its copies there, any other one the topic that its first copy is assigned.
    """
    size = chc.TOPICS.SAMPLE
    chosen = sample.draw(len(kept), size, chc.SEED)
    log.info("sample: topics are found on %d of %d pairs", size, len(kept))
    read = [np.asarray(store.sentence_features[kept[chosen[part]]], np.float32) for part in sample.batches(size)]
    features = np.concatenate(read)
    del read
    key = _key(store, kept, chc)
    found = steps.once("sample", key, lambda: topics_of(features, chc))
    log.info("sample: %d topics, %.1f %% noise", found.max(initial=-1) + 1, 100 * (found < 0).mean())

    in_order = np.zeros(len(store), bool)
    in_order[kept] = True
    number = sample.captions_by_number(store.captions, in_order)
    label = np.full(len(kept), -1)
    label[chosen] = sample.same_for_copies(number[chosen], found)

    stands = sample.representatives(number, chosen)
    ask = np.setdiff1d(np.flatnonzero(stands == np.arange(len(kept))), chosen)
    alone = np.bincount(number[chosen], minlength=len(kept))[number[chosen]] == 1
    log.info("sample: learning the rule, then %d different captions are assigned", len(ask))
    rule = sample.Rule.learn(features, found, alone, chc.SEED)
    held_out = rule.held_out
    log.info(
        "rule: on %d held-out sample pairs it agrees with clustering on %.1f %%, precision %.1f %%, noise %.1f %% "
        "(clustering: %.1f %%)",
        held_out["pairs"],
        *(100 * held_out[name] for name in ("agreement", "precision", "noise", "noise_by_clustering")),
    )

    def assigned() -> np.ndarray:
        result = np.empty(len(ask), np.int64)
        with _bar(len(ask), "assigning", "pair", progress) as bar:
            for part in sample.batches(len(ask)):
                rows = np.asarray(store.sentence_features[kept[ask[part]]], np.float32)
                result[part] = rule.assign(rows)
                bar.update(len(rows))
        return result

    label[ask] = steps.once("assigned", key, assigned)
    label = label[stands]
    facts = {
        "pairs": size,
        "of": len(kept),
        "topics": int(found.max(initial=-1)) + 1,
        "noise": float((found < 0).mean()),
        "rule": {
            "neighbours": sample.NEIGHBOURS,
            "sharpness": sample.SHARPNESS,
            "thresholds": np.quantile(rule.threshold, (0, 0.25, 0.5, 0.75, 1)).tolist() if len(rule.threshold) else [],
        },
        "held_out": held_out,
        "assigned": {"captions": len(ask), "noise": float((label[ask] < 0).mean()) if len(ask) else 0.0},
        "noise_of_all": float((label < 0).mean()),
    }
    return label, facts


def _key(store: PairStore, kept: np.ndarray, chc: CfgNode) -> str:
    """What the topics of a sample depend on."""
    digest = hashlib.sha256(np.ascontiguousarray(kept).data)
    settings = {"SEED": chc.SEED, "TOPICS": as_dict(chc.TOPICS)}
    digest.update(json.dumps([store.fingerprint, settings], sort_keys=True).encode())
    return digest.hexdigest()


def _pictures(store: PairStore, pairs_of: dict[int, np.ndarray], progress: bool) -> Iterator[tuple[int, Pictures]]:
    """The distinct images of each topic, in the order of `pairs_of`.

    Features of as many topics as fit into GATHER rows are read together, in ascending order, once through the file;
    a larger topic's are read when they are asked for.
    """
    with _bar(sum(map(len, pairs_of.values())), "domains", "pair", progress) as bar:
        for numbers in _groups(pairs_of):
            # An image with several captions in a topic counts once.
            images = {number: np.unique(store.image[pairs_of[number]], return_inverse=True) for number in numbers}
            features, at = store.image_features, {number: rows for number, (rows, _) in images.items()}
            if len(numbers) > 1 or len(at[numbers[0]]) <= GATHER:
                wanted = np.unique(np.concatenate(list(at.values())))
                features = np.asarray(features[wanted])
                at = {number: np.searchsorted(wanted, rows) for number, rows in at.items()}
            for number in numbers:
                yield number, Pictures(features, at[number], images[number][1])
                bar.update(len(pairs_of[number]))


def _groups(pairs_of: dict[int, np.ndarray]) -> Iterator[list[int]]:
    """Consecutive topics, together of GATHER pairs at most; a larger one stands alone."""
    group: list[int] = []
    total = 0
    for number, pairs in pairs_of.items():
        if group and total + len(pairs) > GATHER:
            yield group
            group, total = [], 0
        group.append(number)
        total += len(pairs)
    if group:
        yield group


@dataclass
class Pictures:
    """The distinct images of a topic: their rows `at` of `features`, and which of them each pair has (`of_pair`)."""

    features: np.ndarray
    at: np.ndarray
    of_pair: np.ndarray

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """(rows, D) float32."""
        return np.asarray(self.features[self.at[rows]], np.float32)


@contextmanager
def _bar(total: int, name: str, unit: str, progress: bool) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, desc=name, unit=unit, disable=not progress, smoothing=0.05) as bar:
        yield bar


def _topic(
    pictures: Pictures, pairs: np.ndarray, words: Sequence[tuple[str, float]], config: CfgNode
) -> tuple[int, Topic | None, np.ndarray]:
    """The fate of the pairs of one topic, and unless they are dropped the topic and each pair's domain."""
    nowhere = np.full(len(pairs), -1)
    if not words or words[0][1] <= 0:
        return NO_WORD, None, nowhere  # Eq. 3 gives no word of it a positive score: nothing sets it apart
    if len(pictures) < config.TASKS.SUPPORT_SHOTS + config.TASKS.QUERY_SHOTS:
        return FEW_IMAGES, None, nowhere
    domain = domains_of(pictures, config)
    if domain is None:
        return FEW_DOMAINS, None, nowhere
    word, score = words[0]
    sizes = np.bincount(domain).tolist()
    topic = Topic(word, score, [list(item) for item in words], len(pairs), len(pictures), sizes)
    return KEPT, topic, domain[pictures.of_pair]


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
    log.info("UMAP: %s", "reproducible, on one thread" if chc.SEED >= 0 else "on all threads, not reproducible")
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


def domains_of(features: np.ndarray | Pictures, config: CfgNode) -> np.ndarray | None:
    """Visual domain of each image of a topic: k-means on L2-normalised CLIP features.

    With `CHC.DOMAINS.K` domains; where one of them would be too small to serve as support domain, with fewer,
    down to two. The centres of a topic of more than `CHC.DOMAINS.SAMPLE` images are found on that many of them, at
    random, and all are given to the nearest centre, batch by batch.

    Args:
        features: (m, D) float32, one row per distinct image.

    Returns:
        (m,) int64, the largest domain is 0; None when not even two domains are large enough.
    """
    size = config.CHC.DOMAINS.SAMPLE
    few = not 0 < size < len(features)
    chosen = slice(None) if few else sample.draw(len(features), size, config.CHC.SEED)
    start = _unit(features[chosen])
    for k in range(config.CHC.DOMAINS.K, 1, -1):
        least = domain_minimum(config, k)
        if len(features) < k * least:
            continue
        seed = config.CHC.SEED if config.CHC.SEED >= 0 else None
        with warnings.catch_warnings():
            # k-means warns of fewer distinct points than clusters: seen below as a small cluster.
            warnings.simplefilter("ignore")
            from sklearn.cluster import KMeans

            means = KMeans(k, n_init=config.CHC.DOMAINS.STARTS, random_state=seed).fit(start)
        if few:
            label = means.labels_
        else:
            parts = [means.predict(_unit(features[part])) for part in sample.batches(len(features))]
            label = np.concatenate(parts)
        sizes = np.bincount(label, minlength=k)
        if sizes.min() >= least:
            rank = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
            return rank[label].astype(np.int64)
    return None


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)


def _check(chc: CfgNode) -> None:
    checks: list[tuple[str, Any, bool, str]] = [
        ("FILTER.KEEP", chc.FILTER.KEEP, 0 < chc.FILTER.KEEP <= 1, "a share above 0 and at most 1"),
        ("TOPICS.REDUCTION", chc.TOPICS.REDUCTION, chc.TOPICS.REDUCTION in ("umap", "pca"), "umap or pca"),
        ("TOPICS.SELECTION", chc.TOPICS.SELECTION, chc.TOPICS.SELECTION in ("eom", "leaf"), "eom or leaf"),
        ("TOPICS.NEIGHBORS", chc.TOPICS.NEIGHBORS, chc.TOPICS.NEIGHBORS >= 2, "at least 2"),
        ("TOPICS.COMPONENTS", chc.TOPICS.COMPONENTS, chc.TOPICS.COMPONENTS >= 2, "at least 2"),
        ("TOPICS.MIN_CLUSTER_SIZE", chc.TOPICS.MIN_CLUSTER_SIZE, chc.TOPICS.MIN_CLUSTER_SIZE >= 2, "at least 2"),
        ("TOPICS.MIN_SAMPLES", chc.TOPICS.MIN_SAMPLES, chc.TOPICS.MIN_SAMPLES >= 1, "at least 1"),
        (
            "TOPICS.SAMPLE",
            chc.TOPICS.SAMPLE,
            chc.TOPICS.SAMPLE == 0 or chc.TOPICS.SAMPLE >= LEAST_SAMPLE,
            f"0 (all pairs) or at least {LEAST_SAMPLE}",
        ),
        (
            "DOMAINS.SAMPLE",
            chc.DOMAINS.SAMPLE,
            chc.DOMAINS.SAMPLE == 0 or chc.DOMAINS.SAMPLE >= 100,
            "0 (all images) or at least 100",
        ),
        ("DOMAINS.K", chc.DOMAINS.K, chc.DOMAINS.K >= 2, "at least 2"),
        ("DOMAINS.STARTS", chc.DOMAINS.STARTS, chc.DOMAINS.STARTS >= 1, "at least 1"),
    ]
    for key, value, is_fine, expected in checks:
        if not is_fine:
            raise GramError(f"CHC.{key}: expected {expected}, found {value!r}")
