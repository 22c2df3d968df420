"""Loaders of a dataset's splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision.transforms as T
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from yacs.config import CfgNode

from gram_meta.engine import builtin
from gram_meta.engine.builtin.data.datasets import build_dataset
from gram_meta.engine.builtin.data.samplers import build_sampler
from gram_meta.engine.builtin.data.transforms import INTERPOLATION_MODES, build_transform
from gram_meta.engine.builtin.utils import read_image
from gram_meta.errors import GramError
from gram_meta.images import coop_decoding

__all__ = ["DataManager", "DatasetWrapper", "build_data_loader"]


def build_data_loader(
    cfg: CfgNode,
    sampler_type: str = "SequentialSampler",
    data_source: Sequence[Any] | None = None,
    batch_size: int = 64,
    n_domain: int = 0,
    n_ins: int = 2,
    tfm: Callable | None = None,
    is_train: bool = True,
    dataset_wrapper: type | None = None,
) -> DataLoader:
    """Return a loader over a list of `Datum`. A training loader drops the last short batch if there is a full one."""
    if not data_source:
        raise GramError(f"{cfg.DATASET.NAME}: a {'training' if is_train else 'test'} split has no images")
    sampler = build_sampler(
        sampler_type, cfg=cfg, data_source=data_source, batch_size=batch_size, n_domain=n_domain, n_ins=n_ins
    )
    wrapper = DatasetWrapper if dataset_wrapper is None else dataset_wrapper
    loader = DataLoader(
        wrapper(cfg, data_source, transform=tfm, is_train=is_train),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        drop_last=is_train and len(data_source) >= batch_size,
        pin_memory=torch.cuda.is_available() and cfg.USE_CUDA,
    )
    assert len(loader) > 0
    return loader


class DataManager:
    """Builds the dataset, its transforms and its loaders: train_loader_x, train_loader_u, val_loader, test_loader."""

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

        def train_loader(source: Sequence[Any], node: CfgNode) -> DataLoader:
            draws = node.SAMPLER, source, node.BATCH_SIZE, node.N_DOMAIN, node.N_INS
            return build_data_loader(cfg, *draws, custom_tfm_train, True, dataset_wrapper)

        def test_loader(source: Sequence[Any]) -> DataLoader:
            draws = loaders.TEST.SAMPLER, source, loaders.TEST.BATCH_SIZE
            options: dict[str, Any] = {"tfm": custom_tfm_test, "is_train": False, "dataset_wrapper": dataset_wrapper}
            return build_data_loader(cfg, *draws, **options)

        self.train_loader_x = train_loader(dataset.train_x, loaders.TRAIN_X)
        self.train_loader_u = None
        if dataset.train_u:
            node = loaders.TRAIN_X if loaders.TRAIN_U.SAME_AS_X else loaders.TRAIN_U
            self.train_loader_u = train_loader(dataset.train_u, node)
        self.val_loader = test_loader(dataset.val) if dataset.val else None
        self.test_loader = test_loader(dataset.test)

        self.dataset = dataset
        self.num_classes, self.lab2cname = dataset.num_classes, dataset.lab2cname
        self.num_source_domains = len(cfg.DATASET.SOURCE_DOMAINS)
        if cfg.VERBOSE:
            self.show_dataset_summary(cfg)

    def show_dataset_summary(self, cfg: CfgNode) -> None:
        """Print a table of the dataset's parts and their sizes."""
        rows = [("Dataset", cfg.DATASET.NAME)]
        if cfg.DATASET.SOURCE_DOMAINS:
            rows.append(("Source", str(cfg.DATASET.SOURCE_DOMAINS)))
        if cfg.DATASET.TARGET_DOMAINS:
            rows.append(("Target", str(cfg.DATASET.TARGET_DOMAINS)))
        rows.append(("# classes", f"{self.num_classes:,}"))
        for name in ("train_x", "train_u", "val", "test"):
            if items := getattr(self.dataset, name):
                rows.append((f"# {name}", f"{len(items):,}"))
        left, right = (max(len(row[i]) for row in rows) for i in (0, 1))
        rule = f"{'-' * left}  {'-' * right}"
        print("\n".join([rule, *(f"{name:<{left}}  {value}" for name, value in rows), rule]))


class DatasetWrapper(TorchDataset):
    """A list of `Datum` as a torch dataset of {"img", "label", "domain", "impath", "index"}.

    Several transforms in a list give "img", "img2", ...; K_TRANSFORMS > 1 (training) gives a list of K images;
    RETURN_IMG0 adds "img0", the image without augmentation.
    """

    def __init__(self, cfg: CfgNode, data_source: Sequence[Any], transform: Any = None, is_train: bool = False) -> None:
        self.cfg, self.data_source, self.transform, self.is_train = cfg, data_source, transform, is_train
        self.k_tfm = cfg.DATALOADER.K_TRANSFORMS if is_train else 1
        self.return_img0 = cfg.DATALOADER.RETURN_IMG0
        if self.k_tfm > 1 and transform is None:
            raise ValueError(f"Cannot augment the image {self.k_tfm} times because transform is None")
        steps = [T.Resize(cfg.INPUT.SIZE, interpolation=INTERPOLATION_MODES[cfg.INPUT.INTERPOLATION]), T.ToTensor()]
        if "normalize" in cfg.INPUT.TRANSFORMS:
            steps.append(T.Normalize(mean=cfg.INPUT.PIXEL_MEAN, std=cfg.INPUT.PIXEL_STD))
        self.to_tensor = T.Compose(steps)

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
        if self.transform is None:
            output["img"] = image
        elif isinstance(self.transform, list | tuple):
            for i, transform in enumerate(self.transform):
                output[f"img{i + 1}" if i else "img"] = self._transform_image(transform, image)
        else:
            output["img"] = self._transform_image(self.transform, image)
        if self.return_img0:
            output["img0"] = self.to_tensor(image)
        return output

    def _transform_image(self, tfm: Callable, img0: Any) -> Any:
        images = [tfm(img0) for _ in range(self.k_tfm)]
        return images[0] if len(images) == 1 else images


def _restore_wrapper(cls: Any) -> Any:
    builtin.answer_as_dassl()
    return cls.__new__(cls)
