"""Datasets: their registry and their base."""

from gram_meta.engine.builtin.data.datasets.base_dataset import DatasetBase, Datum
from gram_meta.engine.builtin.data.datasets.build import DATASET_REGISTRY, build_dataset

__all__ = ["DATASET_REGISTRY", "DatasetBase", "Datum", "build_dataset"]
