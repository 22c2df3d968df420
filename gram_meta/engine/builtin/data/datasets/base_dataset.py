"""One image with its label, and the base of datasets."""

from __future__ import annotations

import operator
import os
import random
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from gram_meta.engine.builtin.utils import check_isfile, mkdir_if_missing

__all__ = ["DatasetBase", "Datum"]


def _attribute(name: str) -> Any:
    """Return a read-only property of the attribute `name`."""
    return property(operator.attrgetter(name))


class Datum:
    """One image: its path, its label (from 0), the number of its domain and the name of its class."""

    impath, label, domain, classname = map(_attribute, ("_impath", "_label", "_domain", "_classname"))

    def __init__(self, impath: str = "", label: int = 0, domain: int = 0, classname: str = "") -> None:
        assert isinstance(impath, str), f"impath must be a string, got {type(impath).__name__}"
        assert check_isfile(impath), f'no image at "{impath}"'
        self._impath, self._label, self._domain, self._classname = impath, label, domain, classname

    def __repr__(self) -> str:
        return f"Datum({self._impath!r}, label={self._label}, classname={self._classname!r})"


Datum.__module__ = "dassl.data.datasets.base_dataset"  # few-shot pickles of CoOp name the class like this


class DatasetBase:
    """Training, validation and test images as lists of `Datum`; classes are those of `train_x`."""

    dataset_dir = ""  # folder of the dataset under DATASET.ROOT
    domains: Sequence[str] = []  # names of all domains, where there are any

    train_x, train_u, val, test = map(_attribute, ("_train_x", "_train_u", "_val", "_test"))
    lab2cname, classnames, num_classes = map(_attribute, ("_lab2cname", "_classnames", "_num_classes"))

    def __init__(
        self,
        train_x: list[Datum] | None = None,
        train_u: list[Datum] | None = None,
        val: list[Datum] | None = None,
        test: list[Datum] | None = None,
    ) -> None:
        self._train_x = train_x  # labelled
        self._train_u = train_u  # unlabelled (optional)
        self._val = val
        self._test = test
        self._num_classes = self.get_num_classes(train_x or [])
        self._lab2cname, self._classnames = self.get_lab2cname(train_x or [])

    @staticmethod
    def get_num_classes(data_source: Sequence[Datum]) -> int:
        """Return the highest label + 1."""
        return max(item.label for item in data_source) + 1

    @staticmethod
    def get_lab2cname(data_source: Sequence[Datum]) -> tuple[dict[int, str], list[str]]:
        """Return the class names by label, and in the order of their labels."""
        mapping = {item.label: item.classname for item in data_source}
        return mapping, [mapping[label] for label in sorted(mapping)]

    def check_input_domains(self, source_domains: Sequence[str], target_domains: Sequence[str]) -> None:
        assert len(source_domains) > 0, "source_domains (list) is empty"
        assert len(target_domains) > 0, "target_domains (list) is empty"
        self.is_input_domain_valid(source_domains)
        self.is_input_domain_valid(target_domains)

    def is_input_domain_valid(self, input_domains: Sequence[str]) -> None:
        for domain in input_domains:
            if domain not in self.domains:
                raise ValueError(f"Input domain must belong to {list(self.domains)}, but got [{domain}]")

    def download_data(self, url: str, dst: str, from_gdrive: bool = True) -> None:
        """Fetch an archive from Google Drive (needs `gdown`) and unpack it beside `dst`."""
        if not from_gdrive:
            raise NotImplementedError("download_data fetches from Google Drive only")
        import gdown

        folder = os.path.dirname(dst)
        mkdir_if_missing(folder)
        gdown.download(url, dst, quiet=False)
        print("Extracting file ...")
        if dst.endswith(".zip"):
            with zipfile.ZipFile(dst) as archive:
                archive.extractall(folder)
        elif dst.endswith((".tar", ".tar.gz")):
            with tarfile.open(dst) as archive:
                archive.extractall(folder, filter="data")
        else:
            raise NotImplementedError(f"{dst}: expected .zip, .tar or .tar.gz")
        print(f"File extracted to {folder}")

    def generate_fewshot_dataset(
        self, *data_sources: list[Datum], num_shots: int = -1, repeat: bool = False
    ) -> list[Datum] | list[list[Datum]] | tuple[list[Datum], ...]:
        """Draw `num_shots` images of each class with `random.sample`, for each source; one source gives one list.

        A class with fewer images gives all of them (with `repeat`, draws with replacement). Below 1 shot, all images
        are returned.
        """
        if num_shots < 1:
            return data_sources[0] if len(data_sources) == 1 else data_sources
        print(f"Creating a {num_shots}-shot dataset")
        output = []
        for source in data_sources:
            drawn: list[Datum] = []
            for items in self.split_dataset_by_label(source).values():
                if len(items) >= num_shots:
                    drawn.extend(random.sample(items, num_shots))
                else:
                    drawn.extend(random.choices(items, k=num_shots) if repeat else items)
            output.append(drawn)
        return output[0] if len(output) == 1 else output

    def split_dataset_by_label(self, data_source: Sequence[Datum]) -> dict[int, list[Datum]]:
        """Return the images of each label, labels in the order of their first image."""
        return _grouped(data_source, "label")

    def split_dataset_by_domain(self, data_source: Sequence[Datum]) -> dict[int, list[Datum]]:
        """Return the images of each domain, domains in the order of their first image."""
        return _grouped(data_source, "domain")


def _grouped(items: Sequence[Datum], key: str) -> dict[int, list[Datum]]:
    output = defaultdict(list)
    for item in items:
        output[getattr(item, key)].append(item)
    return output
