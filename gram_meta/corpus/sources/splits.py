"""The splits of a source: which are read, and which are left out."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from gram_meta.errors import GramError

log = logging.getLogger(__name__)

TRAIN = ("train", "restval")  # the splits that are read if the user names none


def choose_split(path: Path, found: Counter[str], given: str | None) -> str | None:
    """Return the splits to read, separated by commas; None: all.

    Without `--split` only training data is read: captions of test images in a meta-corpus are a leak.

    Args:
        found: split -> number of images; "" for images without a split.
        given: as `--split`, `all` for every split; None: train (and restval, which the Karpathy split of COCO adds to
            it) if there is one, else all.
    """
    named = {split: count for split, count in found.items() if split}
    if given == "all":
        return None
    if given:
        missing = [split for split in given.split(",") if split not in named]
        if missing:
            has = ", ".join(f"{split} ({count})" for split, count in named.items()) or "none"
            raise GramError(f"{path}: expected the split {missing[0]!r}, found {has}; --split all takes every one")
        return given
    chosen = [split for split in TRAIN if split in named]
    if "train" not in chosen:
        return None
    rest = [split for split in named if split not in chosen]
    if rest:
        log.info("%s: split %s taken, not %s (--split all takes every one)", path, ", ".join(chosen), ", ".join(rest))
    return ",".join(chosen)


def is_chosen(split: str, chosen: str | None) -> bool:
    """Return whether `split` is one of the splits to read."""
    return chosen is None or split in chosen.split(",")
