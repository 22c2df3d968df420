"""Loaders of a dataset's splits."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, default_collate, get_worker_info
from torch.utils.data import Dataset as TorchDataset
from yacs.config import CfgNode

from gram_meta.engine import builtin
from gram_meta.engine.builtin.datasets import build_dataset
from gram_meta.engine.builtin.transforms import (
    CropOnDevice,
    Normalise,
    build_transform,
    crops_on_gpu,
    split_crops,
    split_transform,
)
from gram_meta.engine.builtin.utils import read_image
from gram_meta.errors import GramError
from gram_meta.images import coop_decoding
from gram_meta.processes import worker_count

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
    """Return a loader over a list of `Datum`. A training loader drops the last short batch if there is a full one.

    Where a GPU crops (INPUT.CROP_ON), processes read test images ahead and leave the crops to this one. Training images
    are read by this process alone: crops are random, and kept images stay on the GPU.
    """
    if not data_source:
        raise GramError(f"{cfg.DATASET.NAME}: a {'training' if is_train else 'test'} split has no images")
    if sampler_type not in SAMPLERS:
        key = "DATALOADER.TRAIN_X.SAMPLER" if is_train else "DATALOADER.TEST.SAMPLER"
        raise builtin.not_built_in(key, sampler_type, SAMPLERS)
    wrapper = DatasetWrapper if dataset_wrapper is None else dataset_wrapper
    dataset = wrapper(cfg, data_source, transform=tfm, is_train=is_train)
    crops = crops_on_gpu(cfg)  # in this process, as others would need a context of CUDA each
    split = split_crops(tfm) if crops and not is_train and isinstance(dataset, DatasetWrapper) else None
    workers = worker_count(cfg.DATALOADER.NUM_WORKERS) if split or not crops else 0
    on_gpu = torch.cuda.is_available() and cfg.USE_CUDA
    stay = is_train and workers > 0 and isinstance(dataset, DatasetWrapper)
    if stay:
        dataset.seed = torch.zeros((), dtype=torch.int64).share_memory_()
    loader = Loader(
        dataset,
        batch_size=batch_size,
        sampler=SAMPLERS[sampler_type](data_source),
        num_workers=workers,
        drop_last=is_train and len(data_source) >= batch_size,
        pin_memory=on_gpu and (workers > 0 or not crops),
        persistent_workers=stay,
        collate_fn=_uneven if split and workers else None,
    )
    loader.reads_ahead = on_gpu and not workers and not is_train
    if split and workers:
        loader.to_bytes, loader.crop = split
    elif on_gpu and not crops:
        loader.normalise_on(torch.device("cuda"))
    return loader


class Loader(DataLoader):
    """A loader whose processes may stay over epochs; each epoch has the random numbers that new processes would have.

    `reads_ahead`: in a thread; not for training, which needs random numbers in their order. After `normalise_on`,
    the processes send images as bytes, a quarter of the memory, and the device normalises them. With `crop`, they send
    the bytes of whole images, which the device crops too.
    """

    dataset: Any  # `seed` is set before each epoch
    reads_ahead = False
    is_whole = True  # the last iteration came to its end
    to_bytes: Any = None
    normalise: Normalise | None = None
    crop: CropOnDevice | None = None

    def __iter__(self) -> Any:
        if not self.is_whole:
            self.end_workers()  # they may still be reading
        if self._iterator is not None:
            self.dataset.seed.random_(generator=self.generator)  # as torch draws a seed for new processes
        elif self.persistent_workers:
            self.dataset.seed.zero_()  # torch seeds the new processes
        self.dataset.to_bytes = self.to_bytes if self.num_workers else None  # in the processes alone, which now begin
        batches: Iterator[Any] = super().__iter__()
        self.dataset.to_bytes = None
        if self.reads_ahead:
            batches = _in_a_thread(batches)
        elif self.persistent_workers:
            batches = self._to_the_end(batches)
        if self.crop is not None:
            return map(self._cropped, batches)
        return batches if self.normalise is None else map(self._normalised, batches)

    def normalise_on(self, device: torch.device) -> None:
        """Normalise the images on a device, if the transform ends in that; the numbers are the same."""
        if split := split_transform(self.dataset.transform, device):
            self.to_bytes, self.normalise = split

    def _normalised(self, batch: dict[str, Any]) -> dict[str, Any]:
        assert self.normalise is not None
        images = batch["img"].to(self.normalise.white.device, non_blocking=True)
        return {**batch, "img": self.normalise(images) if images.dtype == torch.uint8 else images}

    def _cropped(self, batch: dict[str, Any]) -> dict[str, Any]:
        assert self.crop is not None
        return {**batch, "img": self.crop(batch["img"])}

    def _to_the_end(self, batches: Iterator[Any]) -> Iterator[Any]:
        self.is_whole = False
        yield from batches
        self.is_whole = True

    def end_workers(self) -> None:
        """End the processes that have stayed."""
        self._iterator, self.is_whole = None, True


def _uneven(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Join items to a batch whose images stay a list, as their sizes differ."""
    rest = [{key: value for key, value in item.items() if key != "img"} for item in items]
    return {**default_collate(rest), "img": [item["img"] for item in items]}


def _in_a_thread(items: Iterator[Any]) -> Iterator[Any]:
    """Yield the items, two of them computed ahead."""
    with ThreadPoolExecutor(1) as pool:
        coming = deque(pool.submit(next, items, None) for _ in range(2))
        while (item := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, items, None))
            yield item


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

    to_bytes: Any = None  # instead of `transform`, in processes of a `Loader` that normalises
    seed: Any = 0  # of an epoch; `Loader` sets it for processes that have stayed
    seeded = 0  # the last one that this process has followed

    def __init__(self, cfg: CfgNode, data_source: Sequence[Any], transform: Any = None, is_train: bool = False) -> None:
        self.cfg, self.data_source, self.transform, self.is_train = cfg, data_source, transform, is_train

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __reduce__(self) -> Any:
        # A spawned worker unpickles `Datum` by its name in `dassl`, which has to be there first.
        return _restore_wrapper, (type(self),), self.__dict__

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return a batch; in a process that has stayed, seed anew first if a new epoch has begun."""
        worker, seed = get_worker_info(), int(self.seed)
        if worker is not None and seed != self.seeded:
            self.seeded = seed
            random.seed(seed + worker.id)
            torch.manual_seed(seed + worker.id)
            np.random.seed((seed + worker.id) % 2**32)
        return [self[index] for index in indices]

    def __getitem__(self, idx: int) -> dict[str, Any]:
        item = self.data_source[idx]
        output = {"label": item.label, "domain": item.domain, "impath": item.impath, "index": idx}
        with coop_decoding(self.cfg.DATALOADER.get("COOP_DECODING", False)):
            image = read_image(item.impath)
        whole = self.to_bytes or self.transform
        transforms = whole if isinstance(whole, list | tuple) else [whole]
        for i, transform in enumerate(transforms):
            output[f"img{i + 1}" if i else "img"] = image if transform is None else transform(image)
        return output


def _restore_wrapper(cls: Any) -> Any:
    builtin.answer_as_dassl()
    return cls.__new__(cls)
