"""From a dataset's name to batches."""

from gram_meta.engine.builtin.data.data_manager import DataManager, DatasetWrapper, build_data_loader

__all__ = ["DataManager", "DatasetWrapper", "build_data_loader"]
