"""One image with its label, the base of datasets, and the datasets by name."""

import operator
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from yacs.config import CfgNode

from gram_meta.engine.builtin.utils import Registry, build, check_isfile

DATASET_REGISTRY = Registry("DATASET")


def build_dataset(cfg: CfgNode) -> Any:
    """Build the dataset that DATASET.NAME names."""
    return build(DATASET_REGISTRY, "Loading dataset", cfg.DATASET.NAME, cfg.VERBOSE, cfg)


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

    train_x, val, test = map(_attribute, ("_train_x", "_val", "_test"))
    lab2cname, classnames, num_classes = map(_attribute, ("_lab2cname", "_classnames", "_num_classes"))

    def __init__(
        self, *, train_x: list[Datum] | None = None, val: list[Datum] | None = None, test: list[Datum] | None = None
    ) -> None:
        self._train_x, self._val, self._test = train_x, val, test
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
        output = defaultdict(list)
        for item in data_source:
            output[item.label].append(item)
        return output
