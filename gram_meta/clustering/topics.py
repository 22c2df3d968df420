"""The topics of a corpus: classes of a labelled collection, or clusters of captions (filter, UMAP, HDBSCAN)."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np

from gram_meta.clustering import sample, words
from gram_meta.clustering.hierarchy import FILTERED, KEPT, NOISE
from gram_meta.clustering.settings import ChcSettings, bar
from gram_meta.clustering.steps import Steps
from gram_meta.corpus.sources.classes import class_of, same_names
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError

log = logging.getLogger(__name__)

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
        log.warning("%s: no task holds two of one name", same)
    return kept, label, [[(name, 1.0)] for name in names]


def find_topics(
    store: PairStore, settings: ChcSettings, fates: np.ndarray, steps: Steps, progress: bool
) -> tuple[dict[str, Any], np.ndarray, np.ndarray, Words]:
    """Filter the pairs, cluster their captions, and find the words of each topic.

    Writes the fate of pairs that are filtered out or noise into `fates`.

    Returns:
        What the manifest records about a sample; the other pairs; the topic of each; the words of each topic.
    """
    if store.manifest["settings"]["source"]["kind"] == "classes":
        log.info("%s: is a labelled collection; CHC.LABELLED True makes its classes the topics", store.path)
    candidates = np.flatnonzero(fates == KEPT)
    dropped = filtered(store.similarity[candidates], settings.keep, settings.threshold)
    fates[candidates[dropped]] = FILTERED
    kept = np.flatnonzero(fates == KEPT)
    log.info("filter: %d of %d pairs dropped (lowest CLIP similarity)", len(dropped), len(candidates))

    facts: dict[str, Any] = {}
    if 0 < settings.sample < len(kept):
        label, facts["sample"] = _sampled_topics(store, kept, settings, steps, progress)
    else:
        label = topics_of(np.asarray(store.sentence_features[kept], np.float32), settings)  # (kept,), -1: noise
    fates[kept[label < 0]] = NOISE
    found = int(label.max(initial=-1)) + 1
    log.info("topics: %d found, %d pairs are noise and dropped", found, int((fates == NOISE).sum()))
    # The L of Eq. 3 counts all topics found, also those that are dropped later.
    of_caption = np.full(len(store), -1)
    of_caption[kept] = label
    if (
        settings.split is words.words
        and (share := words.unspaced_share(store.captions[:: len(store) // 1000 + 1])) > 0.5
    ):
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

    These are the rows below `threshold` if that is above -1, else a share of 1 - `keep`; of equals the later rows.
    """
    if threshold > -1:
        return np.flatnonzero(np.asarray(similarity) < threshold)
    order = np.argsort(-np.asarray(similarity, np.float64), kind="stable")  # best first
    return order[math.ceil(round(len(order) * keep, 6)) :]


def topics_of(features: np.ndarray, settings: ChcSettings) -> np.ndarray:
    """Return the topic of each sentence: UMAP, then HDBSCAN.

    The package `hdbscan` is used because its dual-tree minimum spanning tree takes nearly linear time; scikit-learn's
    version finds the same clusters without it.

    Args:
        features: (n, S) float32, L2-normalised sentence features.

    Returns:
        (n,) int64; -1 is noise.
    """
    n = len(features)
    least = max(settings.min_cluster_size, settings.components + 3, 4)
    if n < least:
        raise GramError(f"clustering: expected at least {least} pairs after the filter, found {n}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numba and UMAP warn about threads and spectral initialisation
        reduced = reducer(settings, n).fit_transform(features)
    import hdbscan

    clusterer = hdbscan.HDBSCAN(
        min_cluster_size=settings.min_cluster_size,
        min_samples=settings.min_samples,
        cluster_selection_method=settings.selection,
        core_dist_n_jobs=1 if settings.is_reproducible else -1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return clusterer.fit_predict(reduced.astype(np.float64)).astype(np.int64)


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
    store: PairStore, kept: np.ndarray, settings: ChcSettings, steps: Steps, progress: bool
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the topics (kept,) of many pairs, -1 is noise, and what the manifest records about how they were found.

    Identical captions get the same topic: if the caption is in the sample, the most frequent topic of its copies there,
    else the topic that the rule assigns to its first copy.
    """
    size = settings.sample
    chosen = sample.draw(len(kept), size, settings.seed)
    log.info("sample: topics are found on %d of %d pairs", size, len(kept))
    read = [np.asarray(store.sentence_features[kept[chosen[part]]], np.float32) for part in sample.batches(size)]
    features = np.concatenate(read)
    del read
    key = _key(store, kept, settings)
    found = steps.once("sample", key, lambda: topics_of(features, settings))
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
    rule = sample.Rule.learn(features, found, alone, settings.seed)
    held_out = rule.held_out
    log.info(
        "rule: on %d held-out sample pairs it agrees with clustering on %.1f %%, precision %.1f %%, noise %.1f %% "
        "(clustering: %.1f %%)",
        held_out["pairs"],
        *(100 * held_out[name] for name in ("agreement", "precision", "noise", "noise_by_clustering")),
    )

    def assigned() -> np.ndarray:
        result = np.empty(len(ask), np.int64)
        with bar(len(ask), "assigning", progress) as shown:
            for part in sample.batches(len(ask)):
                rows = np.asarray(store.sentence_features[kept[ask[part]]], np.float32)
                result[part] = rule.assign(rows)
                shown.update(len(rows))
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


def _key(store: PairStore, kept: np.ndarray, settings: ChcSettings) -> str:
    """Return a hash of everything that the topics of a sample depend on."""
    digest = hashlib.sha256(np.ascontiguousarray(kept).data)
    relevant = {"SEED": settings.seed, "TOPICS": settings.recorded["CHC"]["TOPICS"]}
    digest.update(json.dumps([store.fingerprint, relevant], sort_keys=True).encode())
    return digest.hexdigest()
