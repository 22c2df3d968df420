"""Few-shot datasets over the emoji world that `gram demo` draws: ROOT/emoji_<name>/."""

from __future__ import annotations

from gram_meta.datasets.base import SplitDataset
from gram_meta.engine import register_dataset

# one line per dataset: its folder is emoji_<lower case>, its class in the registry Emoji<Name>
NAMES = ("Animals", "Food", "Travel", "Objects", "Activities")


def _dataset(name: str) -> type[SplitDataset]:
    facts = {
        "__module__": __name__,
        "__doc__": f"Emoji of the group {name.lower()}.",
        "dataset_dir": f"emoji_{name.lower()}",
        "split_file": f"split_zhou_Emoji{name}.json",
    }
    return register_dataset(type(f"Emoji{name}", (SplitDataset,), facts))


DATASETS = {f"Emoji{name}": _dataset(name) for name in NAMES}
globals().update(DATASETS)
