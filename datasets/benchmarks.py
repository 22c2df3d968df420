"""The benchmarks of CoOp but `imagenet`: those that a split file describes, and FGVCAircraft, which has lists.

Class names are those of the split files, which contain CoOp's renamings (EuroSAT's "Annual Crop Land", Caltech's
"face"). Numbers of images are those of the published files.
"""

from pathlib import Path
from typing import Any

from gram_meta.corpus.sources.classes import read_lines
from gram_meta.datasets.base import PARTS, Published, SplitDataset, check_splits, define
from gram_meta.datasets.few_shot import Entry, Splits
from gram_meta.engine import register_dataset
from gram_meta.errors import GramError

DRIVE = "https://drive.google.com/file/d/"
ARCHIVE = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"
EXPECTED = f"the file that comes with the images ({ARCHIVE})"


def _benchmark(
    name: str,
    doc: str,
    folders: tuple[str, str],
    counts: tuple[int, int, int, int],
    split_id: str,
    sources: dict[str, str],
    note: str = "",
) -> Any:
    """Register a dataset.

    Args:
        folders: `dataset_dir` and `image_dir`. counts: of `Published`. split_id: of the split file on Google Drive.
    """
    split_file = f"split_zhou_{name}.json"
    published = Published(counts, {**sources, split_file: f"{DRIVE}{split_id}/view"}, note)
    places = {"dataset_dir": folders[0], "image_dir": folders[1], "split_file": split_file}
    return define(__name__, name, doc, **places, published=published)


Caltech101 = _benchmark(
    "Caltech101",
    "Objects; without the folders BACKGROUND_Google and Faces_easy.",
    ("caltech-101", "101_ObjectCategories"),
    (100, 4128, 1649, 2465),
    "1hyarUivQE36mY6jSomru6Fjd-JzwcCzN",
    {"101_ObjectCategories": "http://www.vision.caltech.edu/Image_Datasets/Caltech101/101_ObjectCategories.tar.gz"},
    note="the first link is CoOp's, of 2022; the authors' present page is https://data.caltech.edu/records/mzrjq-6wc02",
)
OxfordPets = _benchmark(
    "OxfordPets",
    "Breeds of cats and dogs.",
    ("oxford_pets", "images"),
    (37, 2944, 736, 3669),
    "1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs",
    {"images": "https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz"},
)
StanfordCars = _benchmark(
    "StanfordCars",
    "Makes, models and years of cars; paths start from the dataset's folder: cars_train/00001.jpg.",
    ("stanford_cars", ""),
    (196, 6509, 1635, 8041),
    "1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT",
    {
        "cars_train": "http://ai.stanford.edu/~jkrause/car196/cars_train.tgz",
        "cars_test": "http://ai.stanford.edu/~jkrause/car196/cars_test.tgz",
    },
    note="Stanford's links are dead (CoOp's issue 61, torchvision's issue 7545, whose thread names copies on Kaggle); "
    "a copy has to have the files cars_train/00001.jpg to 08144.jpg and cars_test/00001.jpg to 08041.jpg; one "
    "sorted into class folders does not fit the split file",
)
OxfordFlowers = _benchmark(
    "OxfordFlowers",
    "Flowers, 102 kinds.",
    ("oxford_flowers", "jpg"),
    (102, 4093, 1633, 2463),
    "1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT",
    {"jpg": "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz"},
)
Food101 = _benchmark(
    "Food101",
    "Dishes.",
    ("food-101", "images"),
    (101, 50500, 20200, 30300),
    "1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl",
    {"images": "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/"},
)
SUN397 = _benchmark(
    "SUN397",
    "Scenes.",
    ("sun397", "SUN397"),
    (397, 15880, 3970, 19850),
    "1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq",
    {"SUN397": "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz"},
    note="Princeton's link is dead (CoOp's issue 90); the copy named there, kaggle.com/datasets/lash45/sun397-50-50, "
    "has the folders train and test instead of SUN397/a/abbey/sun_*.jpg and does not fit the split file as it is",
)
DescribableTextures = _benchmark(
    "DescribableTextures",
    "Textures (DTD).",
    ("dtd", "images"),
    (47, 2820, 1128, 1692),
    "1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x",
    {"images": "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz"},
)
EuroSAT = _benchmark(
    "EuroSAT",
    "Land seen from a satellite.",
    ("eurosat", "2750"),
    (10, 13500, 5400, 8100),
    "1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o",
    {"2750": "http://madm.dfki.de/files/sentinel/EuroSAT.zip"},
)
UCF101 = _benchmark(
    "UCF101",
    "Actions; the middle frame of each video.",
    ("ucf101", "UCF-101-midframes"),
    (101, 7639, 1898, 3783),
    "1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y",
    {"UCF-101-midframes": "https://drive.google.com/file/d/10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O/view"},
)


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
