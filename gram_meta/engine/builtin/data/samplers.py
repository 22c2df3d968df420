"""Orders in which a loader goes through its images."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from yacs.config import CfgNode

from gram_meta.errors import GramError

__all__ = ["RandomClassSampler", "RandomDomainSampler", "SeqDomainSampler", "build_sampler"]

NAMES = ("RandomSampler", "SequentialSampler", "RandomDomainSampler", "SeqDomainSampler", "RandomClassSampler")


class RandomDomainSampler(Sampler):
    """Draw batches of `n_domain` random domains with equally many images each, until a drawn domain runs short."""

    def __init__(self, data_source: Sequence[Any], batch_size: int, n_domain: int) -> None:
        self.domain_dict = defaultdict(list)
        for index, item in enumerate(data_source):
            self.domain_dict[item.domain].append(index)
        self.domains = list(self.domain_dict)
        self.n_domain = n_domain if n_domain and n_domain > 0 else len(self.domains)
        if batch_size % self.n_domain:
            raise GramError(f"a batch of {batch_size} cannot be shared equally by {self.n_domain} domains")
        self.n_img_per_domain = batch_size // self.n_domain
        self.length = len(list(iter(self)))

    def __iter__(self) -> Iterator[int]:
        left = {domain: list(indices) for domain, indices in self.domain_dict.items()}
        order: list[int] = []
        enough = True
        while enough:
            for domain in self.next_domains():
                drawn = random.sample(left[domain], self.n_img_per_domain)
                order.extend(drawn)
                left[domain] = [index for index in left[domain] if index not in drawn]
                enough = enough and len(left[domain]) >= self.n_img_per_domain
        return iter(order)

    def next_domains(self) -> list[Any]:
        """Return the domains of a batch."""
        return random.sample(self.domains, self.n_domain)

    def __len__(self) -> int:
        return self.length


class SeqDomainSampler(RandomDomainSampler):
    """Draw batches of all domains, in their order, with equally many images each."""

    def __init__(self, data_source: Sequence[Any], batch_size: int) -> None:
        super().__init__(data_source, batch_size, n_domain=0)

    def next_domains(self) -> list[Any]:
        return sorted(self.domains)


class RandomClassSampler(Sampler):
    """Draw batches of random classes with `n_ins` images each."""

    def __init__(self, data_source: Sequence[Any], batch_size: int, n_ins: int) -> None:
        if batch_size < n_ins:
            raise ValueError(f"batch_size={batch_size} must be no less than n_ins={n_ins}")
        self.n_ins = n_ins
        self.ncls_per_batch = batch_size // n_ins
        self.index_dic = defaultdict(list)
        for index, item in enumerate(data_source):
            self.index_dic[item.label].append(index)
        self.labels = list(self.index_dic)
        if len(self.labels) < self.ncls_per_batch:
            raise GramError(f"{len(self.labels)} classes cannot fill a batch of {self.ncls_per_batch} classes")
        self.length = len(list(iter(self)))

    def __iter__(self) -> Iterator[int]:
        groups = {label: self._groups(indices) for label, indices in self.index_dic.items()}
        available = list(self.labels)
        order: list[int] = []
        while len(available) >= self.ncls_per_batch:
            for label in random.sample(available, self.ncls_per_batch):
                order.extend(groups[label].pop(0))
                if not groups[label]:
                    available.remove(label)
        return iter(order)

    def _groups(self, indices: list[int]) -> list[list[int]]:
        """Return the images of a class in random groups of `n_ins`; a class with fewer repeats some of them."""
        indices = list(indices)
        if len(indices) < self.n_ins:
            indices = np.random.choice(indices, size=self.n_ins, replace=True).tolist()
        random.shuffle(indices)
        return [indices[i : i + self.n_ins] for i in range(0, len(indices) - self.n_ins + 1, self.n_ins)]

    def __len__(self) -> int:
        return self.length


def build_sampler(
    sampler_type: str,
    cfg: CfgNode | None = None,
    data_source: Any = None,
    batch_size: int = 32,
    n_domain: int = 0,
    n_ins: int = 16,
) -> Sampler:
    """Return the sampler of that name over `data_source`."""
    if sampler_type == "RandomSampler":
        return RandomSampler(data_source)
    if sampler_type == "SequentialSampler":
        return SequentialSampler(data_source)
    if sampler_type == "RandomDomainSampler":
        return RandomDomainSampler(data_source, batch_size, n_domain)
    if sampler_type == "SeqDomainSampler":
        return SeqDomainSampler(data_source, batch_size)
    if sampler_type == "RandomClassSampler":
        return RandomClassSampler(data_source, batch_size, n_ins)
    raise GramError(f"sampler {sampler_type!r} is not known; known: {', '.join(NAMES)}")
