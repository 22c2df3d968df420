"""Meta-training tasks drawn from a hierarchy (Sec. 3.3, "Automatic Meta-Training Task Generation").

A K-way task takes K topics with different words. Its support set comes from one visual domain per topic, its query set
from all of them, so that adapting to the support set and scoring on the query set simulates a domain shift.

The paper takes the topics at random. `TASKS.TOPICS` can make tasks harder by the structure of the topics' image
features: topics that are near each other, or more often topics whose images differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gram_meta.clustering.domains import unit_rows
from gram_meta.clustering.hierarchy import Hierarchy
from gram_meta.errors import GramError

NEAR = 2  # `TASKS.TOPICS near`: a task takes its topics from so many times as many


@dataclass(frozen=True)
class TaskConfig:
    """The size of a task."""

    ways: int = 5  # K, topics in a task
    support_shots: int = 4  # S, images per topic
    query_shots: int = 12  # Q, images per topic
    domain_shift: bool = True  # False draws the support set from all domains too (Table 6, row 1)
    choice: str = "random"  # of topics: random, near, varied

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TaskConfig:
        """Read the TASKS node; `config` may also be plain nested dicts."""
        tasks = config["TASKS"]
        return cls(tasks["WAYS"], tasks["SUPPORT_SHOTS"], tasks["QUERY_SHOTS"], tasks["DOMAIN_SHIFT"], tasks["TOPICS"])


@dataclass(frozen=True)
class Task:
    """One K-way classification task; class k is the topic `topics[k]` with the label text `words[k]`."""

    topics: np.ndarray  # (K,) topic numbers
    words: tuple[str, ...]  # K different label texts
    support: np.ndarray  # (K, S) image rows of the store; row k lies in one domain of topic k
    query: np.ndarray  # (K, Q) image rows over all domains of topic k; no image occurs twice in a task


class TaskSampler:
    """Draws tasks. Task i of a seed is always the same, whatever was drawn before.

    Args:
        hierarchy: topics and domains of a corpus.
        config: the size of a task.
        seed: of all draws.
        topics: the topics to draw from; None is all of them.
        without_images: image rows never to draw (those of held-out topics).
        features: (m, D) unit image features of the store's images; None if `config.choice` is random.

    Raises:
        GramError: fewer than `config.ways` topics with different words can fill a support and a query set.
    """

    def __init__(
        self,
        hierarchy: Hierarchy,
        config: TaskConfig,
        seed: int,
        topics: Iterable[int] | None = None,
        without_images: np.ndarray | None = None,
        features: np.ndarray | None = None,
    ) -> None:
        self.config, self.seed = config, seed
        self.words = [topic.word for topic in hierarchy.topics]
        wanted = range(len(hierarchy.topics)) if topics is None else topics
        images = images_by_domain(hierarchy, without_images)
        self.domains = {topic: images[topic] for topic in wanted if self._fills(images[topic])}
        if self.different < config.ways:
            held = f"{config.support_shots} support and {config.query_shots} query images in two or more domains"
            what = f"at least {config.ways} topics with different words that hold {held}"
            raise GramError(f"TASKS.WAYS: expected {what}, found {self.different}")
        self.order = _order(config, list(self.domains), images, features)

    @property
    def different(self) -> int:
        """Number of different words among the topics that can fill a task."""
        return len({self.words[topic].lower() for topic in self.domains})

    def draw(self, number: int) -> Task:
        """Return task `number`."""
        random = np.random.default_rng([self.seed, number])
        taken = np.empty(0, dtype=np.int64)  # images that are in the task already
        words: list[str] = []
        chosen: list[tuple[int, np.ndarray, np.ndarray]] = []
        for topic in self.order(random):
            if self.words[topic].lower() in (word.lower() for word in words):
                continue  # no classifier can distinguish two classes with one name
            sets = self._draw_sets(topic, taken, random)
            if sets is None:
                continue  # its images are in this task already, under other topics
            taken = np.concatenate([taken, *sets])
            words.append(self.words[topic])
            chosen.append((int(topic), *sets))
            if len(chosen) == self.config.ways:
                topics, support, query = zip(*chosen, strict=True)
                return Task(np.array(topics), tuple(words), np.stack(support), np.stack(query))
        found = f"found {len(chosen)}; lower TASKS.WAYS, TASKS.SUPPORT_SHOTS or TASKS.QUERY_SHOTS"
        raise GramError(f"TASKS: expected {self.config.ways} topics without common images, {found}")

    def draw_batch(self, first: int, count: int) -> list[Task]:
        """Return tasks `first` to `first + count - 1`."""
        return [self.draw(number) for number in range(first, first + count)]

    def _draw_sets(
        self, topic: int, taken: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return support (S,) and query (Q,) images of a topic without those taken, or None if too few are left."""
        free = [images[~np.isin(images, taken)] for images in self.domains[topic]]
        if not self._fills(free):
            return None
        free = [random.permutation(images) for images in free]
        if self.config.domain_shift:
            able = [u for u, images in enumerate(free) if len(images) > self.config.support_shots]
            u = random.choice(able)
            support, free[u] = free[u][: self.config.support_shots], free[u][self.config.support_shots :]
        else:
            support = _spread(free, self.config.support_shots, random)
            free = [np.setdiff1d(images, support, assume_unique=True) for images in free]
            free = [random.permutation(images) for images in free]
        return support, _spread(free, self.config.query_shots, random)

    def _fills(self, domains: Sequence[np.ndarray]) -> bool:
        """Return whether there are two domains, enough images, and a domain with more than fill the support set."""
        sizes = [len(images) for images in domains if len(images)]
        enough = sum(sizes) >= self.config.support_shots + self.config.query_shots
        return len(sizes) >= 2 and len(sizes) == len(domains) and max(sizes) > self.config.support_shots and enough


Order = Callable[[np.random.Generator], Iterable[int]]


def _order(
    config: TaskConfig, topics: list[int], images: Sequence[Sequence[np.ndarray]], features: np.ndarray | None
) -> Order:
    """Return what draws the order in which a task takes its topics (`TASKS.TOPICS`)."""
    if config.choice == "random":
        return lambda random: random.permutation(topics)
    if features is None:
        raise ValueError(f"TASKS.TOPICS {config.choice}: expected image features, found None")
    means = np.stack([features[np.concatenate(images[topic])].astype(np.float64).mean(axis=0) for topic in topics])
    return near(np.array(topics), means, NEAR * config.ways) if config.choice == "near" else varied(topics, means)


def near(topics: np.ndarray, means: np.ndarray, count: int) -> Order:
    """Return an order that starts with the `count` topics nearest to a random one, in random order.

    Args:
        topics: (L,) topic numbers.
        means: (L, D) means of their images' unit features; nearness is the cosine.
        count: how many topics are near; the others follow by nearness, should those not fill a task.
    """
    centres = unit_rows(means)

    def order(random: np.random.Generator) -> Iterable[int]:
        by_nearness = topics[np.argsort(-centres @ random.choice(centres), kind="stable")]
        return [*random.permutation(by_nearness[:count]), *by_nearness[count:]]

    return order


def varied(topics: Sequence[int], means: np.ndarray) -> Order:
    """Return a random order in which topics whose images differ tend to come first.

    A topic's weight is its rank, 1 to L, by the variance of its images' unit features, 1 - |mean|^2; `means` is (L, D).
    """
    ranks = 1.0 + np.argsort(np.argsort(1 - np.square(means).sum(axis=1)))
    return lambda random: random.choice(topics, len(topics), replace=False, p=ranks / ranks.sum())


class StepTasks:
    """The tasks `own`, of 0 to `batch` - 1, of each step after step `first` up to step `last`, drawn on access."""

    def __init__(self, sampler: TaskSampler, batch: int, first: int, last: int, own: range) -> None:
        self.sampler, self.batch, self.first, self.last, self.own = sampler, batch, first, last, own

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> list[Task]:
        return self.sampler.draw_batch((self.first + index) * self.batch + self.own.start, len(self.own))


def what_tasks_allow(hierarchy: Hierarchy, config: TaskConfig) -> str:
    """Return a sentence: how many topics can fill a task, the most ways that meta-training allows, and what to do."""
    sampler = TaskSampler(hierarchy, replace(config, ways=0, choice="random"), seed=0)
    words = sampler.different
    images = f"{config.support_shots} support and {config.query_shots} query images"
    found = f"tasks: {len(sampler.domains)} of {len(sampler.words)} topics, with {words} different words, hold {images}"
    if words // 2 >= config.ways:
        return f"{found}; meta-training can take TASKS.WAYS up to {words // 2}, and has {config.ways}"
    return (
        f"{found}, which allows TASKS.WAYS {words // 2} and not {config.ways}: half of the words may be held out. "
        "Lower TASKS.WAYS or the shots, or make more topics (a smaller CHC.TOPICS.MIN_CLUSTER_SIZE, SELECTION leaf)"
    )


def split_topics(hierarchy: Hierarchy, share: float, ways: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the topics for meta-training, and those held out for choosing the checkpoint.

    Topics with the same word stay together, so that a held-out class name is new. At least `ways` words are held out.
    Raises `GramError` for too few words.
    """
    words = sorted({topic.word.lower() for topic in hierarchy.topics})
    count = max(ways, round(share * len(words)))
    if len(words) - count < ways:
        what = f"at least {2 * ways} topics with different words for {ways}-way tasks on both sides"
        raise GramError(f"TASKS.HELD_OUT: expected {what}, found {len(words)}")
    held_words = set(np.random.default_rng(seed).permutation(words)[:count].tolist())
    held = [number for number, topic in enumerate(hierarchy.topics) if topic.word.lower() in held_words]
    return sorted(set(range(len(hierarchy.topics))) - set(held)), held


def images_of(hierarchy: Hierarchy, topics: Iterable[int]) -> np.ndarray:
    """Return the image rows of these topics, each once."""
    return np.unique(hierarchy.image[np.isin(hierarchy.topic, list(topics))])


def images_by_domain(hierarchy: Hierarchy, without: np.ndarray | None) -> list[list[np.ndarray]]:
    """Return the distinct image rows of each domain of each topic; an image has one domain in a topic."""
    keys = np.stack([hierarchy.topic, hierarchy.image], axis=1)
    _, first = np.unique(keys, axis=0, return_index=True)
    rows = np.stack([hierarchy.topic, hierarchy.domain, hierarchy.image], axis=1)[first]  # (n, 3), by topic
    if without is not None and len(without):
        rows = rows[~np.isin(rows[:, 2], without)]
    images: list[list[np.ndarray]] = []
    for number, topic in enumerate(hierarchy.topics):
        start, stop = np.searchsorted(rows[:, 0], [number, number + 1])
        of_topic = rows[start:stop]
        images.append([of_topic[of_topic[:, 1] == u, 2] for u in range(len(topic.domains))])
    return images


def _spread(domains: Sequence[np.ndarray], count: int, random: np.random.Generator) -> np.ndarray:
    """Take `count` images, as evenly over the domains as their sizes allow; which domain gives more is drawn."""
    order = random.permutation(len(domains))
    taken = [0] * len(domains)
    while sum(taken) < count:
        for u in order:
            if taken[u] < len(domains[u]) and sum(taken) < count:
                taken[u] += 1
    return np.concatenate([images[:n] for images, n in zip(domains, taken, strict=True)])
