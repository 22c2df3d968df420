"""Few-shot datasets over the emoji world that `gram demo` draws: ROOT/emoji_<name>/ and ROOT/emoji_<name>_shift/.

EmojiTravelShift has the classes of EmojiTravel in other styles, as the target of a domain shift. EmojiTravelHalftone,
EmojiTravelMosaic and EmojiTravelShadow contain its pictures of one style.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from gram_meta.datasets.base import SplitDataset, Splits, define, read_split
from gram_meta.errors import GramError

# "animals": the dataset EmojiAnimals, in the folder emoji_animals
NAMES = ("animals", "food", "travel", "objects", "activities", "faces")
SHIFT_STYLES = ("halftone", "mosaic", "shadow")
TRUTH = "truth.tsv"  # beside the split file, a row for each picture


class StyleDataset(SplitDataset):
    """The pictures of a split file whose style, in the column `style` of the truth.tsv beside it, is `style`."""

    style = ""

    @classmethod
    def read(cls, path: Path) -> Splits:
        styles = read_styles(path.with_name(TRUTH))
        whole = read_split(path)
        splits = {
            part: [entry for entry in entries if styles.get(f"{cls.image_dir}/{entry[0]}") == cls.style]
            for part, entries in whole.items()
        }
        classes = {label for _, label, _ in whole["train"]}
        for part in ("train", "test"):
            if missing := classes - {label for _, label, _ in splits[part]}:
                raise GramError(
                    f"{path.with_name(TRUTH)}: expected pictures of style {cls.style!r} for all {len(classes)} classes "
                    f"in {part!r}, found none for {len(missing)} of them"
                )
        return splits


def read_styles(path: Path) -> dict[str, str]:
    """Return picture -> style from a truth.tsv."""
    if not path.is_file():
        raise GramError(f"{path}: expected the table of what was drawn, found no such file")
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        if not {"image", "style"} <= set(rows.fieldnames or ()):
            raise GramError(f"{path}: expected the columns image and style, found {rows.fieldnames}")
        return {row["image"]: row["style"] for row in rows}


def _dataset(title: str, folder: str, split: str, **style: str) -> type[SplitDataset]:
    doc = f"Emoji in {folder}{', style ' + style['style'] if style else ''}."
    base = StyleDataset if style else SplitDataset
    return define(__name__, title, doc, base, dataset_dir=folder, split_file=f"split_zhou_{split}.json", **style)


def _all() -> Iterator[type[SplitDataset]]:
    for name in NAMES:
        group, shift = f"Emoji{name.title()}", f"emoji_{name}_shift"
        yield _dataset(group, f"emoji_{name}", group)
        yield _dataset(f"{group}Shift", shift, f"{group}Shift")
        for style in SHIFT_STYLES:
            few_shot_dir = f"split_fewshot_{style}"
            title = f"{group}{style.title()}"
            yield _dataset(title, shift, f"{group}Shift", style=style, few_shot_dir=few_shot_dir)


_ALL = {dataset.__name__: dataset for dataset in _all()}
DATASETS = {name: cls for name, cls in _ALL.items() if not issubclass(cls, StyleDataset)}  # a split file each
STYLE_DATASETS = {name: cls for name, cls in _ALL.items() if issubclass(cls, StyleDataset)}
globals().update(_ALL)
