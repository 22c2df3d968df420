"""FGVCAircraft: aircraft variants, split by the lists that come with the images."""

from __future__ import annotations

from pathlib import Path

from gram_meta.datasets.base import PARTS, Published, SplitDataset, check_splits
from gram_meta.datasets.few_shot import Entry, Splits
from gram_meta.engine import register_dataset
from gram_meta.errors import GramError

ARCHIVE = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"


@register_dataset
class FGVCAircraft(SplitDataset):
    """Labels are the lines of variants.txt; images_variant_<part>.txt has lines "image variant"."""

    dataset_dir = "fgvc_aircraft"
    source = "images_variant_{train,val,test}.txt"
    published = Published(
        classes=100,
        train=3334,
        val=3333,
        test=3333,
        sources={"images, variants.txt and images_variant_*.txt": ARCHIVE},
        note="keep the archive's folder data/ alone and call it fgvc_aircraft",
    )

    @classmethod
    def read(cls, path: Path) -> Splits:
        variants = path / "variants.txt"
        labels = {name: label for label, name in enumerate(_lines(variants))}
        splits = {part: _entries(path / f"images_variant_{part}.txt", labels) for part in PARTS}
        check_splits(splits, path)
        return splits


def _entries(path: Path, labels: dict[str, int]) -> list[Entry]:
    entries = []
    for number, line in enumerate(_lines(path), 1):
        image, _, name = line.partition(" ")
        if name not in labels:
            raise GramError(f'{path}, line {number}: expected "image variant", found {line[:60]!r}')
        entries.append((f"{image}.jpg", labels[name], name))
    return entries


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        raise GramError(f"{path}: expected the file that comes with the images ({ARCHIVE}), found none") from None
    except UnicodeDecodeError as error:
        raise GramError(f"{path}: expected UTF-8 text, found something else ({error})") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
