"""Visual domains: k-means on the CLIP features of each topic's distinct images."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gram_meta.clustering import sample
from gram_meta.clustering.settings import ChcSettings
from gram_meta.corpus.store import PairStore
from gram_meta.progress import progress_bar

GATHER = 1 << 19  # images whose features are in memory at once: 512 MB at 512 dimensions


def images_by_topic(store: PairStore, pairs_of: dict[int, np.ndarray], progress: bool) -> Iterator[tuple[int, Images]]:
    """Yield the distinct images of each topic, in the order of `pairs_of`.

    The features of as many topics as fit into GATHER rows are read together, in ascending order, in one pass through
    the file; those of a larger topic are read on access.
    """
    with progress_bar(total=sum(map(len, pairs_of.values())), desc="domains", unit="pair", shown=progress) as shown:
        for numbers in _groups(pairs_of):
            # An image with several captions in a topic counts once.
            images = {number: np.unique(store.image[pairs_of[number]], return_inverse=True) for number in numbers}
            features, at = store.image_features, {number: rows for number, (rows, _) in images.items()}
            if len(numbers) > 1 or len(at[numbers[0]]) <= GATHER:
                wanted = np.unique(np.concatenate(list(at.values())))
                features = np.asarray(features[wanted])
                at = {number: np.searchsorted(wanted, rows) for number, rows in at.items()}
            for number in numbers:
                yield number, Images(features, at[number], images[number][1])
                shown.update(len(pairs_of[number]))


def _groups(pairs_of: dict[int, np.ndarray]) -> Iterator[list[int]]:
    """Yield consecutive topics that together have at most GATHER pairs; a larger topic is alone."""
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
class Images:
    """The distinct images of a topic: their rows `at` in `features`, and each pair's image (`of_pair`)."""

    features: np.ndarray
    at: np.ndarray
    of_pair: np.ndarray

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return features (rows, D) float32."""
        return np.asarray(self.features[self.at[rows]], np.float32)


def domain_minimum(settings: ChcSettings, domains: int) -> int:
    """Return how many distinct images each of `domains` domains needs: a support set and its share of a query set."""
    return settings.support_shots + math.ceil(settings.query_shots / domains)


def domains_of(features: np.ndarray | Images, settings: ChcSettings) -> np.ndarray | None:
    """Return the visual domain of each image of a topic: k-means on L2-normalised CLIP features.

    There are `CHC.DOMAINS.K` domains. If one would be too small to be a support domain, there are fewer, at least two.
    In a topic of more than `CHC.DOMAINS.SAMPLE` images, the centres are found on that many random ones, and every image
    is assigned to the nearest centre, batch by batch.

    Args:
        features: (m, D) float32, one row per distinct image.

    Returns:
        (m,) int64, the largest domain is 0; None if not even two domains are large enough.
    """
    size = settings.domain_sample
    few = not 0 < size < len(features)
    chosen = slice(None) if few else sample.draw(len(features), size, settings.seed)
    start = unit_rows(features[chosen])
    for k in range(settings.domains, 1, -1):
        least = domain_minimum(settings, k)
        if len(features) < k * least:
            continue
        with warnings.catch_warnings():
            # k-means warns of fewer distinct points than clusters; the check of sizes below handles them.
            warnings.simplefilter("ignore")
            from sklearn.cluster import KMeans

            means = KMeans(k, n_init=settings.starts, random_state=settings.random_state).fit(start)
        if few:
            label = means.labels_
        else:
            parts = [means.predict(unit_rows(features[part])) for part in sample.batches(len(features))]
            label = np.concatenate(parts)
        sizes = np.bincount(label, minlength=k)
        if sizes.min() >= least:
            rank = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
            return rank[label].astype(np.int64)
    return None


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Return the rows of `features`, (n, D), at length 1; a row of zeros stays zero."""
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
