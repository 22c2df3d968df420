"""Few-shot datasets over the emoji world that `gram demo` draws: ROOT/emoji_<name>/."""

from __future__ import annotations

from gram_meta.datasets.base import SplitDataset
from gram_meta.engine import register_dataset

# one word per dataset: "animals" lies in emoji_animals and is called EmojiAnimals
NAMES = ("animals", "food", "travel", "objects", "activities", "faces")


def _dataset(name: str) -> type[SplitDataset]:
    title = f"Emoji{name.title().replace('_', '')}"
    facts = {
        "__module__": __name__,
        "__doc__": f"Emoji of the group {name!r}.",
        "dataset_dir": f"emoji_{name}",
        "split_file": f"split_zhou_{title}.json",
    }
    return register_dataset(type(title, (SplitDataset,), facts))


DATASETS = {dataset.__name__: dataset for dataset in map(_dataset, NAMES)}
globals().update(DATASETS)
