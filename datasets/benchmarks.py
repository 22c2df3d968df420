"""The benchmarks of CoOp that a split file describes; the others are in `fgvc_aircraft` and `imagenet`.

Class names are those of the split files, which contain CoOp's renamings (EuroSAT's "Annual Crop Land", Caltech's "face").
Numbers of images are those of the published files.
"""

from __future__ import annotations

from gram_meta.datasets.base import Published, SplitDataset
from gram_meta.engine import register_dataset

DRIVE = "https://drive.google.com/file/d/"


@register_dataset
class Caltech101(SplitDataset):
    """Objects; without the folders BACKGROUND_Google and Faces_easy."""

    dataset_dir = "caltech-101"
    image_dir = "101_ObjectCategories"
    split_file = "split_zhou_Caltech101.json"
    published = Published(
        counts=(100, 4128, 1649, 2465),
        sources={
            "101_ObjectCategories": "http://www.vision.caltech.edu/Image_Datasets/Caltech101/101_ObjectCategories.tar.gz",
            split_file: f"{DRIVE}1hyarUivQE36mY6jSomru6Fjd-JzwcCzN/view",
        },
        note="the first link is CoOp's, of 2022; the authors' present page is https://data.caltech.edu/records/mzrjq-6wc02",
    )


@register_dataset
class OxfordPets(SplitDataset):
    """Breeds of cats and dogs."""

    dataset_dir = "oxford_pets"
    split_file = "split_zhou_OxfordPets.json"
    published = Published(
        counts=(37, 2944, 736, 3669),
        sources={
            "images": "https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz",
            split_file: f"{DRIVE}1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs/view",
        },
    )


@register_dataset
class StanfordCars(SplitDataset):
    """Makes, models and years of cars; paths start from the dataset's folder: cars_train/00001.jpg."""

    dataset_dir = "stanford_cars"
    image_dir = ""
    split_file = "split_zhou_StanfordCars.json"
    published = Published(
        counts=(196, 6509, 1635, 8041),
        sources={
            "cars_train": "http://ai.stanford.edu/~jkrause/car196/cars_train.tgz",
            "cars_test": "http://ai.stanford.edu/~jkrause/car196/cars_test.tgz",
            split_file: f"{DRIVE}1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT/view",
        },
        note="Stanford's links are dead (CoOp's issue 61, torchvision's issue 7545, whose thread names copies on Kaggle); "
        "a copy has to have the files cars_train/00001.jpg to 08144.jpg and cars_test/00001.jpg to 08041.jpg; one sorted "
        "into class folders does not fit the split file",
    )


@register_dataset
class OxfordFlowers(SplitDataset):
    """Flowers, 102 kinds."""

    dataset_dir = "oxford_flowers"
    image_dir = "jpg"
    split_file = "split_zhou_OxfordFlowers.json"
    published = Published(
        counts=(102, 4093, 1633, 2463),
        sources={
            "jpg": "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz",
            split_file: f"{DRIVE}1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT/view",
        },
    )


@register_dataset
class Food101(SplitDataset):
    """Dishes."""

    dataset_dir = "food-101"
    split_file = "split_zhou_Food101.json"
    published = Published(
        counts=(101, 50500, 20200, 30300),
        sources={
            "images": "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
            split_file: f"{DRIVE}1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl/view",
        },
    )


@register_dataset
class SUN397(SplitDataset):
    """Scenes."""

    dataset_dir = "sun397"
    image_dir = "SUN397"
    split_file = "split_zhou_SUN397.json"
    published = Published(
        counts=(397, 15880, 3970, 19850),
        sources={
            "SUN397": "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
            split_file: f"{DRIVE}1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq/view",
        },
        note="Princeton's link is dead (CoOp's issue 90); the copy named there, kaggle.com/datasets/lash45/sun397-50-50, has "
        "the folders train and test instead of SUN397/a/abbey/sun_*.jpg and does not fit the split file as it is",
    )


@register_dataset
class DescribableTextures(SplitDataset):
    """Textures (DTD)."""

    dataset_dir = "dtd"
    split_file = "split_zhou_DescribableTextures.json"
    published = Published(
        counts=(47, 2820, 1128, 1692),
        sources={
            "images": "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
            split_file: f"{DRIVE}1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x/view",
        },
    )


@register_dataset
class EuroSAT(SplitDataset):
    """Land seen from a satellite."""

    dataset_dir = "eurosat"
    image_dir = "2750"
    split_file = "split_zhou_EuroSAT.json"
    published = Published(
        counts=(10, 13500, 5400, 8100),
        sources={
            "2750": "http://madm.dfki.de/files/sentinel/EuroSAT.zip",
            split_file: f"{DRIVE}1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o/view",
        },
    )


@register_dataset
class UCF101(SplitDataset):
    """Actions; the middle frame of each video."""

    dataset_dir = "ucf101"
    image_dir = "UCF-101-midframes"
    split_file = "split_zhou_UCF101.json"
    published = Published(
        counts=(101, 7639, 1898, 3783),
        sources={
            "UCF-101-midframes": f"{DRIVE}10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O/view",
            split_file: f"{DRIVE}1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y/view",
        },
    )
