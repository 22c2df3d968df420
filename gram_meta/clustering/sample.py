"""Topics of many captions from the topics of a sample of them, in nearly linear time and bounded memory.

UMAP and HDBSCAN see a sample. For every other caption, those of the sample with the nearest sentence features vote for
a topic. A threshold that was learned from the sample decides whether the caption gets this topic or is noise.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gram_meta.files import PathLike, read_arrays, write_arrays

log = logging.getLogger(__name__)

NEIGHBOURS = 15  # sample pairs that vote for a pair's topic
SHARPNESS = 10.0  # a neighbour whose cosine is 0.1 below the nearest one's has 1/e of its weight
SHRINK = 30  # weight of the common threshold, in pairs, beside that of a topic's own members
SEARCH = 0.1  # pynndescent's epsilon: how far it searches beyond the best found so far
BATCH = 1 << 14  # pairs that are assigned at once
STEPS = ("sample", "assigned")  # what `Steps` keeps


def vote(label: np.ndarray, similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the topic that the neighbours of each pair elect, and its share of their votes.

    A neighbour with cosine s has the weight exp(SHARPNESS (s - s_1)), where s_1 is the cosine of the nearest one.
    Neighbours that are noise vote for no topic.

    Args:
        label: (n, k) topics of the neighbours, the nearest first; -1 is noise.
        similarity: (n, k) cosines.

    Returns:
        (n,) topics, -1 where all neighbours are noise, and (n,) shares in 0 ... 1.
    """
    weight = np.exp(SHARPNESS * (similarity - similarity[:, :1]))  # (n, k)
    weight /= weight.sum(1, keepdims=True)
    same = label[:, :, None] == label[:, None, :]  # (n, k, k)
    votes = np.einsum("nij,nj->ni", same, weight)
    votes[label < 0] = 0
    rows, best = np.arange(len(label)), votes.argmax(1)  # of topics with equal votes, that of the nearest neighbour
    share = votes[rows, best]
    return np.where(share > 0, label[rows, best], -1), share


def thresholds(topic: np.ndarray, share: np.ndarray, label: np.ndarray, topics: int) -> np.ndarray:
    """Learn, for each topic, the share of votes to require, from pairs whose label is known.

    With the common threshold, as many of these pairs are noise as by clustering. With a topic's own threshold, it has
    as many pairs as by clustering. The result is the mean of both, weighted by SHRINK and by the topic's number of
    members, so that chance has little influence on small topics.

    Args:
        topic, share: (n,) from `vote`, where no pair is its own neighbour.
        label: (n,) topics by clustering; -1 is noise.

    Returns:
        (topics,) in 0 ... 1.
    """
    common = float(np.quantile(share, (label < 0).mean())) if len(share) else 0.0
    members = np.bincount(label[label >= 0], minlength=topics)
    order = np.lexsort((-share, topic))  # by topic, the largest share first
    start = np.searchsorted(topic[order], np.arange(topics + 1))
    result = np.full(topics, common)
    for number in np.flatnonzero(members):
        chosen = share[order[start[number] : start[number + 1]]]
        if len(chosen):
            own = chosen[min(members[number], len(chosen)) - 1]
            result[number] = (members[number] * own + SHRINK * common) / (members[number] + SHRINK)
    return result


def verdict(topic: np.ndarray, share: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Return (n,) topics: the elected one if its share reaches the topic's threshold, else -1."""
    if not len(threshold):
        return np.full(len(topic), -1)
    return np.where((topic >= 0) & (share >= threshold[topic]), topic, -1)


@dataclass
class Rule:
    """The rule that assigns topics to pairs outside the sample."""

    index: Any  # pynndescent.NNDescent over the sample's sentence features
    label: np.ndarray  # (s,) topics of the sample's pairs; -1 is noise
    threshold: np.ndarray  # (topics,) share of votes that a pair needs
    # comparison of the rule with clustering on sample pairs that did not influence it (`against`)
    held_out: dict[str, Any]

    @classmethod
    def learn(cls, features: np.ndarray, label: np.ndarray, seed: int) -> Rule:
        """Learn the thresholds from a clustered sample.

        The sample has `features` (s, S) float32, L2-normalised, of different captions, and in `label` (s,) their topics
        or -1 for noise. `seed` is that of the approximate search, or -1.
        """
        topics = int(label.max(initial=-1)) + 1
        index = nearest_index(features, seed)
        rows, votes = np.arange(len(label)), []
        for part in batches(len(rows)):
            near, similarity = _others(index, features[part], rows[part])
            votes.append(vote(label[near], similarity))
        topic, share = map(np.concatenate, zip(*votes, strict=True))
        # Each half is judged by the thresholds of the other; the rule's own thresholds come from both.
        judged = np.empty_like(topic)
        half = np.random.default_rng(0).permutation(len(rows)) % 2 == 0
        for fit, rest in ((half, ~half), (~half, half)):
            threshold = thresholds(topic[fit], share[fit], label[fit], topics)
            judged[rest] = verdict(topic[rest], share[rest], threshold)
        return cls(index, label, thresholds(topic, share, label, topics), against(judged, label))

    def assign(self, features: np.ndarray) -> np.ndarray:
        """Return the topics (n,) of pairs with sentence features (n, S), float32; -1 is noise."""
        near, distance = self.index.query(features, k=NEIGHBOURS, epsilon=SEARCH)
        return verdict(*vote(self.label[near], 1 - distance), self.threshold)


def nearest_index(features: np.ndarray, seed: int) -> Any:
    """Return an approximate index of cosine neighbours over (s, S) features; s is at least NEIGHBOURS + 2."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numba warns about threads
        import pynndescent

        index = pynndescent.NNDescent(features, "cosine", n_neighbors=20, random_state=None if seed < 0 else seed)
        index.prepare()
    return index


def _others(index: Any, features: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the neighbours (n, k) of the index's own `rows`, without the row itself, and their cosines."""
    near, distance = index.query(features, k=NEIGHBOURS + 1, epsilon=SEARCH)
    itself = near == rows[:, None]
    itself[~itself.any(1), -1] = True  # the approximate search missed it: drop the farthest
    shape = (len(rows), NEIGHBOURS)
    return near[~itself].reshape(shape), 1 - distance[~itself].reshape(shape)


def against(judged: np.ndarray, known: np.ndarray) -> dict[str, Any]:
    """Compare labels with known ones.

    Returns:
        The share of noise in both, and of equal labels; `precision`: the share of right labels among pairs with a
        topic; `noise_precision`: the share of noise among pairs labelled as noise.
    """
    topic, noise = judged >= 0, judged < 0
    return {
        "pairs": len(judged),
        "noise": float(noise.mean()),
        "noise_by_clustering": float((known < 0).mean()),
        "agreement": float((judged == known).mean()),
        "precision": float((judged == known)[topic].mean()) if topic.any() else 0.0,
        "noise_precision": float((known < 0)[noise].mean()) if noise.any() else 0.0,
    }


def captions_by_number(captions: Iterable[str], wanted: np.ndarray) -> np.ndarray:
    """Return a number (int64) for each row marked in `wanted` (bool, for each caption): equal for equal captions.

    It is the number of the first wanted row with this caption, counted among the wanted rows. Captions are compared by
    a 64-bit hash: among 3 million, two different ones share it with a probability of 2e-7.
    """
    digests = (
        int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little")
        for caption, is_wanted in zip(captions, wanted, strict=True)
        if is_wanted
    )
    digest = np.fromiter(digests, np.uint64, int(wanted.sum()))
    _, first, number = np.unique(digest, return_index=True, return_inverse=True)
    return first[number]


def spread(points: np.ndarray, copies: np.ndarray, seed: int) -> np.ndarray:
    """Return each point, followed by its copies at random places not farther away than the nearest other point.

    `points` are (n, C); `copies` (n,) says how often each is returned.
    """
    from sklearn.neighbors import NearestNeighbors

    radius = NearestNeighbors(n_neighbors=2).fit(points).kneighbors(points)[0][:, 1]
    random = np.random.default_rng([seed, 6] if seed >= 0 else None)
    which, width = np.repeat(np.arange(len(points)), copies), points.shape[1]
    away = random.standard_normal((len(which), width))
    away *= (radius[which] * random.uniform(size=len(which)) ** (1 / width) / np.linalg.norm(away, axis=1))[:, None]
    away[np.cumsum(copies) - copies] = 0
    return points[which] + away


def draw(pairs: int, size: int, seed: int) -> np.ndarray:
    """Return `size` random ones of `pairs` rows, ascending."""
    random = np.random.default_rng([seed, 5] if seed >= 0 else None)
    return np.sort(random.permutation(pairs)[:size])


def batches(rows: int, size: int = BATCH) -> Iterator[slice]:
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


class Steps:
    """Results of a long clustering, kept in hidden files of a folder so that an interrupted run can continue.

    Each is an array with a key: a hash of what it was computed from. Without a folder, no array is kept.
    """

    def __init__(self, folder: PathLike | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def once(self, name: str, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the array that an earlier run with this key kept under `name`; else keep the result of `make`."""
        if self.folder is None:
            return make()
        kept = read_arrays(self.path(name))
        if str(kept.get("key")) == key:
            log.info("%s: found by an earlier run that was interrupted", name)
            return kept["value"]
        value = make()
        write_arrays(self.path(name), {"key": np.array(key), "value": value})
        return value

    def path(self, name: str) -> Path:
        assert self.folder is not None and name in STEPS
        return self.folder / f".{name}.npz"

    def forget(self) -> None:
        """Remove the files."""
        if self.folder is not None:
            for name in STEPS:
                self.path(name).unlink(missing_ok=True)
