"""The topics of a corpus: classes of a labelled collection, or clusters of captions (filter, UMAP, HDBSCAN)."""

import hashlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from gram_meta.clustering import sample, words
from gram_meta.clustering.hierarchy import FILTERED, KEPT, NOISE
from gram_meta.clustering.sample import Steps
from gram_meta.clustering.settings import ChcSettings
from gram_meta.corpus.sources.classes import class_of, same_names
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError
from gram_meta.progress import progress_bar

log = logging.getLogger(__name__)

LEAST_SAMPLE = 100  # different captions; with fewer no sample is drawn, as pairs would have too few neighbours
Words = list[list[tuple[str, float]]]  # for each topic, the best words with their scores, best first


def given_topics(store: PairStore, fates: np.ndarray) -> tuple[np.ndarray, np.ndarray, Words]:
    """Return all pairs that are not excluded, the class of each, and the word of each class: its name, with score 1.

    In a store of class folders a class is a folder, so two classes may have the same name (ImageNet has two cranes); in
    any other store it is a caption.
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
    names = store.captions.take(kept[first])
    log.info("labelled collection: %d classes are the topics, no filter, nothing is noise", len(names))
    if same := same_names(dict(zip(number, names, strict=True))):
        log.warning("%s: no task holds two classes with one name", same)
    return kept, label, [[(name, 1.0)] for name in names]


def find_topics(
    store: PairStore, settings: ChcSettings, fates: np.ndarray, steps: Steps, progress: bool
) -> tuple[dict[str, Any], np.ndarray, np.ndarray, Words]:
    """Filter the pairs, cluster their captions, and find the words of each topic.

    Writes the fate of pairs that are filtered out or noise into `fates`.

    Returns:
        The manifest's record of a sample; the pairs in topics; the topic of each; the words of each topic.
    """
    if store.manifest["settings"]["source"]["kind"] == "classes":
        log.info("%s: is a labelled collection; CHC.LABELLED True makes its classes the topics", store.path)
    candidates = np.flatnonzero(fates == KEPT)
    dropped = filtered(store.similarity[candidates], settings.keep, settings.threshold)
    fates[candidates[dropped]] = FILTERED
    kept = np.flatnonzero(fates == KEPT)
    log.info("filter: %d of %d pairs dropped (lowest CLIP similarity)", len(dropped), len(candidates))

    # A caption is one point, however often it is repeated, so all of its pairs get the same topic.
    number = sample.captions_by_number(store.captions, fates == KEPT)
    first, caption, copies = np.unique(number, return_inverse=True, return_counts=True)
    if len(first) < len(kept):
        log.info("captions: %d different ones in %d pairs", len(first), len(kept))
    facts: dict[str, Any] = {}
    rows, size = kept[first], settings.min_cluster_size  # the first pair of each caption
    to_cluster = caption[copies[caption] < size]  # captions of pairs; the other captions are topics by themselves
    if 0 < settings.sample < len(to_cluster) and (copies < size).sum() > LEAST_SAMPLE:
        label, facts["sample"] = _sampled_topics(store, rows, to_cluster, settings, steps, progress)
        label = large_enough(label, copies, size)
        facts["sample"]["noise_of_all"] = float((label[caption] < 0).mean())
    else:
        label = topics_of(np.asarray(store.sentence_features[rows], np.float32), settings, copies)
    label = label[caption]  # (kept,), -1: noise
    fates[kept[label < 0]] = NOISE
    found = int(label.max(initial=-1)) + 1
    log.info("topics: %d found, %d pairs are noise and dropped", found, int((fates == NOISE).sum()))
    # The L of Eq. 3 counts all topics found, also those that are dropped later.
    of_caption = np.full(len(store), -1)
    of_caption[kept] = label
    share = words.unspaced_share(store.captions[:: len(store) // 1000 + 1])
    if share > 0.5 and settings.split is words.words:
        log.warning(
            "%s: %.0f %% of the letters are of scripts without spaces between words (Chinese, Japanese, Thai, ...), so "
            "topic words are whole phrases; expected CHC.WORDS.TOKENIZER characters, or a function such as jieba.lcut",
            store.path,
            100 * share,
        )
    best = words.topic_words(store.captions, of_caption.tolist(), found, split=settings.split)
    return facts, kept[label >= 0], label[label >= 0], best


def filtered(similarity: np.ndarray, keep: float, threshold: float) -> np.ndarray:
    """Return the rows of the pairs with the lowest similarity, which are dropped.

    These are the rows below `threshold` if that is above -1, else a share of 1 - `keep` (ties: the later rows).
    """
    if threshold > -1:
        return np.flatnonzero(np.asarray(similarity) < threshold)
    order = np.argsort(-np.asarray(similarity, np.float64), kind="stable")  # best first
    return order[math.ceil(round(len(order) * keep, 6)) :]


def topics_of(features: np.ndarray, settings: ChcSettings, copies: np.ndarray | None = None) -> np.ndarray:
    """Return the topic of each caption: UMAP, then HDBSCAN.

    A caption with MIN_CLUSTER_SIZE copies is a topic of its own: its copies are a cluster of infinite density.

    The package `hdbscan` is used because its dual-tree minimum spanning tree takes nearly linear time; scikit-learn's
    version finds the same clusters without it.

    Args:
        features: (n, S) float32, L2-normalised sentence features of different captions.
        copies: (n,) pairs that have each caption; None: one.

    Returns:
        (n,) int64; -1 is noise.
    """
    copies = np.ones(len(features), np.int64) if copies is None else copies
    size = settings.min_cluster_size
    rows = np.flatnonzero(copies < size)
    label = np.full(len(features), -1)
    least = max(size, settings.components + 3, 4)
    if copies[rows].sum() >= least and len(rows) > settings.components + 2:
        label[rows] = _clusters(features if len(rows) == len(features) else features[rows], settings, copies[rows])
    elif len(rows) == len(features):
        raise GramError(f"clustering: expected at least {least} pairs after the filter, found {copies.sum()}")
    return large_enough(label, copies, size)


def _clusters(features: np.ndarray, settings: ChcSettings, copies: np.ndarray) -> np.ndarray:
    """Reduce each caption once, and cluster it as many times as it has copies.

    The copies lie around their caption, as far as the nearest other one: at equal points density would be infinite.
    """
    if copies.max() > 1:
        fewer = max(min(settings.neighbors, 5), round(settings.neighbors / copies.mean()))
        settings = replace(settings, neighbors=fewer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numba and UMAP warn about threads and spectral initialisation
        points = reducer(settings, len(features)).fit_transform(features).astype(np.float64)
        first = np.cumsum(copies) - copies
        if copies.max() > 1:
            points = sample.spread(points, copies, settings.seed)
        import hdbscan

        clusterer = hdbscan.HDBSCAN(
            min_cluster_size=settings.min_cluster_size,
            min_samples=settings.min_samples,
            cluster_selection_method=settings.selection,
            core_dist_n_jobs=1 if settings.is_reproducible else -1,
        )
        return clusterer.fit_predict(points)[first]


def large_enough(label: np.ndarray, copies: np.ndarray, size: int) -> np.ndarray:
    """Make topics of fewer than `size` pairs noise, and each caption among the noise with `size` copies a topic."""
    pairs = np.bincount(label[label >= 0], copies[label >= 0])
    number = np.where(pairs >= size, np.cumsum(pairs >= size) - 1, -1)  # old topic -> new one
    label = np.append(number, -1)[label].astype(np.int64)
    own = np.flatnonzero((label < 0) & (copies >= size))
    label[own] = label.max(initial=-1) + 1 + np.arange(len(own))
    return label


def reducer(settings: ChcSettings, pairs: int) -> Any:
    """Return an estimator that reduces sentence features (n, S) to (n, components), where distances are meaningful.

    UMAP is reproducible on one thread only: with a seed >= 0 it uses one thread, with -1 all of them.
    """
    if settings.reduction == "pca":
        from sklearn.decomposition import PCA

        return PCA(settings.components, svd_solver="full")
    how = "reproducible, on one thread" if settings.is_reproducible else "on all threads, not reproducible"
    log.info("UMAP: %s", how)
    import umap

    return umap.UMAP(
        n_neighbors=min(settings.neighbors, pairs - 1),
        n_components=settings.components,
        min_dist=0.0,  # points may lie close: HDBSCAN looks for dense regions
        metric="cosine",
        random_state=settings.random_state,
        n_jobs=1 if settings.is_reproducible else -1,
    )


def _sampled_topics(
    store: PairStore, rows: np.ndarray, pairs: np.ndarray, settings: ChcSettings, steps: Steps, progress: bool
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the topics of many captions, -1 is noise, and what the manifest records about how they were found.

    `rows` (n,) are those of the captions in the store, `pairs` the caption of each pair, 0 ... n - 1.
    """
    size = settings.sample
    chosen, copies = np.unique(pairs[sample.draw(len(pairs), size, settings.seed)], return_counts=True)
    log.info("sample: topics are found on %d of %d pairs", size, len(pairs))
    read = [np.asarray(store.sentence_features[rows[chosen[p]]], np.float32) for p in sample.batches(len(chosen))]
    features = np.concatenate(read)
    del read
    key = _key(store, rows[pairs], settings)
    found = steps.once("sample", key, lambda: topics_of(features, settings, copies))
    noise = float(np.average(found < 0, weights=copies))
    log.info("sample: %d topics, %.1f %% noise", found.max(initial=-1) + 1, 100 * noise)

    ask = np.setdiff1d(pairs, chosen)
    log.info("sample: learning the rule, then %d captions are assigned", len(ask))
    rule = sample.Rule.learn(features, found, settings.seed)
    held_out = rule.held_out
    log.info(
        "rule: on %d held-out sample pairs it agrees with clustering on %.1f %%, precision %.1f %%, noise %.1f %% "
        "(clustering: %.1f %%)",
        held_out["pairs"],
        *(100 * held_out[name] for name in ("agreement", "precision", "noise", "noise_by_clustering")),
    )

    def assigned() -> np.ndarray:
        result = np.empty(len(ask), np.int64)
        with progress_bar(total=len(ask), desc="assigning", unit="pair", shown=progress) as shown:
            for part in sample.batches(len(ask)):
                features = np.asarray(store.sentence_features[rows[ask[part]]], np.float32)
                result[part] = rule.assign(features)
                shown.update(len(features))
        return result

    label = np.full(len(rows), -1)
    label[chosen] = found
    label[ask] = steps.once("assigned", key, assigned)
    facts = {
        "pairs": size,
        "of": len(pairs),
        "topics": int(found.max(initial=-1)) + 1,
        "noise": noise,
        "rule": {
            "neighbours": sample.NEIGHBOURS,
            "sharpness": sample.SHARPNESS,
            "thresholds": np.quantile(rule.threshold, (0, 0.25, 0.5, 0.75, 1)).tolist() if len(rule.threshold) else [],
        },
        "held_out": held_out,
        "assigned": {"captions": len(ask), "noise": float((label[ask] < 0).mean()) if len(ask) else 0.0},
    }
    return label, facts


def _key(store: PairStore, rows: np.ndarray, settings: ChcSettings) -> str:
    """Return a hash of everything that the topics of a sample depend on."""
    digest = hashlib.sha256(np.ascontiguousarray(rows).data)
    relevant = {"SEED": settings.seed, "TOPICS": settings.recorded["CHC"]["TOPICS"]}
    digest.update(json.dumps([store.fingerprint, relevant], sort_keys=True).encode())
    return digest.hexdigest()
