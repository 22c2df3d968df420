"""The settings of cross-modal hierarchical clustering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from yacs.config import CfgNode

from gram_meta.clustering.words import Tokenizer, tokenizer
from gram_meta.config import as_dict


@dataclass(frozen=True)
class ChcSettings:
    """The node `CHC`, and of `TASKS` the numbers of shots, which a topic must be able to fill.

    Attributes:
        reduction, neighbors, components: of UMAP, or PCA. min_cluster_size, min_samples, selection: of HDBSCAN.
        sample: pairs that topics are found on; 0: all. split: cuts captions into words.
        domains, starts: clusters and runs of k-means in each topic.
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
        """Read the settings from the configuration."""
        chc, domains = config.CHC, config.CHC.DOMAINS
        named_alike = {key.lower(): value for node in (chc.FILTER, chc.TOPICS) for key, value in node.items()}
        return cls(
            **named_alike,
            labelled=chc.LABELLED,
            seed=chc.SEED,
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
