"""Loaders of a dataset's splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from torch.utils.data import Dataset as TorchDataset
from yacs.config import CfgNode

from gram_meta.engine import builtin
from gram_meta.engine.builtin.datasets import build_dataset
from gram_meta.engine.builtin.transforms import build_transform
from gram_meta.engine.builtin.utils import read_image
from gram_meta.errors import GramError
from gram_meta.images import coop_decoding

SAMPLERS: dict[str, Any] = {"RandomSampler": RandomSampler, "SequentialSampler": SequentialSampler}


def build_data_loader(
    cfg: CfgNode,
    sampler_type: str = "SequentialSampler",
    data_source: Sequence[Any] | None = None,
    batch_size: int = 64,
    *,
    tfm: Callable | None = None,
    is_train: bool = True,
    dataset_wrapper: type | None = None,
) -> DataLoader:
    """Return a loader over a list of `Datum`. A training loader drops the last short batch if there is a full one."""
    if not data_source:
        raise GramError(f"{cfg.DATASET.NAME}: a {'training' if is_train else 'test'} split has no images")
    if sampler_type not in SAMPLERS:
        key = "DATALOADER.TRAIN_X.SAMPLER" if is_train else "DATALOADER.TEST.SAMPLER"
        raise builtin.not_built_in(key, sampler_type, SAMPLERS)
    wrapper = DatasetWrapper if dataset_wrapper is None else dataset_wrapper
    return DataLoader(
        wrapper(cfg, data_source, transform=tfm, is_train=is_train),
        batch_size=batch_size,
        sampler=SAMPLERS[sampler_type](data_source),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        drop_last=is_train and len(data_source) >= batch_size,
        pin_memory=torch.cuda.is_available() and cfg.USE_CUDA,
    )


class DataManager:
    """Builds the dataset, its transforms and its loaders: train_loader_x, val_loader (or None), test_loader."""

    def __init__(
        self,
        cfg: CfgNode,
        custom_tfm_train: Callable | None = None,
        custom_tfm_test: Callable | None = None,
        dataset_wrapper: type | None = None,
    ) -> None:
        dataset, loaders = build_dataset(cfg), cfg.DATALOADER
        if custom_tfm_train is None:
            custom_tfm_train = build_transform(cfg, is_train=True)
        else:
            print("* Using custom transform for training")
        if custom_tfm_test is None:
            custom_tfm_test = build_transform(cfg, is_train=False)
        else:
            print("* Using custom transform for testing")

        def loader(source: Sequence[Any], node: CfgNode, tfm: Any, is_train: bool) -> DataLoader:
            options: dict[str, Any] = {"tfm": tfm, "is_train": is_train, "dataset_wrapper": dataset_wrapper}
            return build_data_loader(cfg, node.SAMPLER, source, node.BATCH_SIZE, **options)

        self.train_loader_x = loader(dataset.train_x, loaders.TRAIN_X, custom_tfm_train, True)
        self.val_loader = loader(dataset.val, loaders.TEST, custom_tfm_test, False) if dataset.val else None
        self.test_loader = loader(dataset.test, loaders.TEST, custom_tfm_test, False)
        self.dataset = dataset
        self.num_classes, self.lab2cname = dataset.num_classes, dataset.lab2cname
        if cfg.VERBOSE:
            self.show_dataset_summary(cfg)

    def show_dataset_summary(self, cfg: CfgNode) -> None:
        """Print a table of the dataset's parts and their sizes."""
        rows = [("Dataset", cfg.DATASET.NAME), ("# classes", f"{self.num_classes:,}")]
        for name in ("train_x", "val", "test"):
            if items := getattr(self.dataset, name):
                rows.append((f"# {name}", f"{len(items):,}"))
        print(tabulate(rows, disable_numparse=True))


class DatasetWrapper(TorchDataset):
    """A list of `Datum` as a torch dataset of {"img", "label", "domain", "impath", "index"}.

    Several transforms in a list give "img", "img2", ...
    """

    def __init__(self, cfg: CfgNode, data_source: Sequence[Any], transform: Any = None, is_train: bool = False) -> None:
        self.cfg, self.data_source, self.transform, self.is_train = cfg, data_source, transform, is_train

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __reduce__(self) -> Any:
        # A spawned worker unpickles `Datum` by its name in `dassl`, which has to be there first.
        return _restore_wrapper, (type(self),), self.__dict__

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        item = self.data_source[idx]
        output = {"label": item.label, "domain": item.domain, "impath": item.impath, "index": idx}
        with coop_decoding(self.cfg.DATALOADER.get("COOP_DECODING", False)):
            image = read_image(item.impath)
        transforms = self.transform if isinstance(self.transform, list | tuple) else [self.transform]
        for i, transform in enumerate(transforms):
            output[f"img{i + 1}" if i else "img"] = image if transform is None else transform(image)
        return output


def _restore_wrapper(cls: Any) -> Any:
    builtin.answer_as_dassl()
    return cls.__new__(cls)
