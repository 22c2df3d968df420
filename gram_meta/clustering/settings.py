"""The settings of cross-modal hierarchical clustering."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from yacs.config import CfgNode

from gram_meta.clustering.words import Tokenizer, tokenizer
from gram_meta.config import as_dict
from gram_meta.errors import GramError

LEAST_SAMPLE = 100  # pairs: a smaller sample has too few neighbours
_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "FILTER.KEEP": (lambda share: 0 < share <= 1, "a share above 0 and at most 1"),
    "TOPICS.REDUCTION": (lambda name: name in ("umap", "pca"), "umap or pca"),
    "TOPICS.SELECTION": (lambda name: name in ("eom", "leaf"), "eom or leaf"),
    "TOPICS.NEIGHBORS": (lambda number: number >= 2, "at least 2"),
    "TOPICS.COMPONENTS": (lambda number: number >= 2, "at least 2"),
    "TOPICS.MIN_CLUSTER_SIZE": (lambda number: number >= 2, "at least 2"),
    "TOPICS.MIN_SAMPLES": (lambda number: number >= 1, "at least 1"),
    "TOPICS.SAMPLE": (lambda n: n == 0 or n >= LEAST_SAMPLE, f"0 (all pairs) or at least {LEAST_SAMPLE}"),
    "DOMAINS.SAMPLE": (lambda n: n == 0 or n >= 100, "0 (all images) or at least 100"),
    "DOMAINS.K": (lambda number: number >= 2, "at least 2"),
    "DOMAINS.STARTS": (lambda number: number >= 1, "at least 1"),
}


@dataclass(frozen=True)
class ChcSettings:
    """The node `CHC`, and of `TASKS` the numbers of shots, which a topic must be able to fill.

    Attributes:
        reduction, neighbors, components: of UMAP, or PCA. min_cluster_size, min_samples, selection: of HDBSCAN.
        sample: pairs that topics are found on; 0: all. split: cuts captions into words. domains, starts: clusters and runs of k-means in each topic.
        domain_sample: images of a topic that k-means sees; 0: all.
        recorded: the nodes `CHC` and `TASKS` as the manifest of a hierarchy records them.
    """

    labelled: bool
    seed: int
    keep: float
    threshold: float
    reduction: str
    neighbors: int
    components: int
    min_cluster_size: int
    min_samples: int
    selection: str
    sample: int
    split: Tokenizer
    domains: int
    starts: int
    domain_sample: int
    support_shots: int
    query_shots: int
    recorded: dict[str, Any]

    @classmethod
    def from_config(cls, config: CfgNode) -> ChcSettings:
        """Read the settings from the configuration.

        Raises:
            GramError: a value out of range.
        """
        chc, topics, domains = config.CHC, config.CHC.TOPICS, config.CHC.DOMAINS
        _check(chc)
        return cls(
            labelled=chc.LABELLED,
            seed=chc.SEED,
            keep=chc.FILTER.KEEP,
            threshold=chc.FILTER.THRESHOLD,
            reduction=topics.REDUCTION,
            neighbors=topics.NEIGHBORS,
            components=topics.COMPONENTS,
            min_cluster_size=topics.MIN_CLUSTER_SIZE,
            min_samples=topics.MIN_SAMPLES,
            selection=topics.SELECTION,
            sample=topics.SAMPLE,
            split=tokenizer(chc.WORDS.TOKENIZER),
            domains=domains.K,
            starts=domains.STARTS,
            domain_sample=domains.SAMPLE,
            support_shots=config.TASKS.SUPPORT_SHOTS,
            query_shots=config.TASKS.QUERY_SHOTS,
            recorded={"CHC": as_dict(chc), "TASKS": as_dict(config.TASKS)},
        )

    @property
    def is_reproducible(self) -> bool:
        """Whether two runs give the same result: all randomness is seeded, on one thread."""
        return self.seed >= 0

    @property
    def random_state(self) -> int | None:
        """The seed as scikit-learn and UMAP take it."""
        return self.seed if self.is_reproducible else None


def _check(chc: CfgNode) -> None:
    for key, (is_fine, expected) in _LIMITS.items():
        section, name = key.split(".")
        if not is_fine(value := chc[section][name]):
            raise GramError(f"CHC.{key}: expected {expected}, found {value!r}")
