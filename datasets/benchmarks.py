"""The benchmarks of CoOp but `imagenet`: those that a split file describes, and FGVCAircraft, which has lists.

Class names are those of the split files, which contain CoOp's renamings (EuroSAT's "Annual Crop Land", Caltech's
"face").
"""

from importlib import resources
from pathlib import Path

import yaml

from gram_meta.corpus.sources.classes import read_lines
from gram_meta.datasets.base import PARTS, Published, SplitDataset, check_splits, define
from gram_meta.datasets.few_shot import Entry, Splits
from gram_meta.engine import register_dataset
from gram_meta.errors import GramError

DRIVE = "https://drive.google.com/file/d/"
ARCHIVE = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"
EXPECTED = f"the file that comes with the images ({ARCHIVE})"


def _benchmark(name: str, facts: dict) -> type[SplitDataset]:
    """Register the dataset that an entry of benchmarks.yaml describes."""
    split_file, (folder, images) = f"split_zhou_{name}.json", facts["folders"]
    sources = {**facts["sources"], split_file: f"{DRIVE}{facts['split']}/view"}
    published = Published(tuple(facts["counts"]), sources, facts.get("note", ""))
    places = {"dataset_dir": folder, "image_dir": images, "split_file": split_file}
    return define(__name__, name, facts["about"], **places, published=published)


_FACTS = yaml.safe_load(resources.files("gram_meta.datasets").joinpath("benchmarks.yaml").read_text(encoding="utf-8"))
globals().update({name: _benchmark(name, facts) for name, facts in _FACTS.items()})


@register_dataset
class FGVCAircraft(SplitDataset):
    """Labels are the lines of variants.txt; images_variant_<part>.txt has lines "image variant"."""

    dataset_dir = "fgvc_aircraft"
    source = "images_variant_{train,val,test}.txt"
    published = Published(
        counts=(100, 3334, 3333, 3333),
        sources={"images, variants.txt and images_variant_*.txt": ARCHIVE},
        note="keep the archive's folder data/ alone and call it fgvc_aircraft",
    )

    @classmethod
    def read(cls, path: Path) -> Splits:
        variants = read_lines(path / "variants.txt", EXPECTED)
        labels = {name: label for label, (_, name) in enumerate(variants)}
        splits = {part: _entries(path / f"images_variant_{part}.txt", labels) for part in PARTS}
        check_splits(splits, path)
        return splits


def _entries(path: Path, labels: dict[str, int]) -> list[Entry]:
    entries = []
    for number, line in read_lines(path, EXPECTED):
        image, _, name = line.partition(" ")
        if name not in labels:
            raise GramError(f'{path}, line {number}: expected "image variant", found {line[:60]!r}')
        entries.append((f"{image}.jpg", labels[name], name))
    return entries
