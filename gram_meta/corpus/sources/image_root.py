"""Where the images of a file of captions lie."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gram_meta.errors import GramError

log = logging.getLogger(__name__)

# Folders that usually hold the images of such a file, relative to its own folder or the one above.
IMAGE_FOLDERS: tuple[str, ...] = ("", "images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr8k_images")
IMAGE_FOLDERS += ("flickr30k_images", "flickr30k-images", "train2014", "val2014", "train2017", "val2017")
TRIED = 200  # images looked for in each folder


def find_images(path: Path, given: Path | None, forms: Mapping[str, Sequence[str]]) -> tuple[Path, str]:
    """Return the folder that image names start from, and the form of names of which most were found there.

    Looks up TRIED names of each form in the folders that usually hold such images: in `given`, or (None) beside the
    file and one level above it. The folder that has most of them is chosen.

    Raises:
        GramError: no image was found anywhere.
    """
    bases = [given] if given else [path.parent, path.parent.parent]
    folders = [folder for base in bases for name in IMAGE_FOLDERS if (folder := base / name).is_dir()]
    best, most = None, 0
    for folder in dict.fromkeys(folders):
        for form, names in forms.items():
            hits = sum((folder / name).is_file() for name in _some(names))
            if hits > most:
                best, most = (folder, form), hits
    if best is None:
        first = next((name for names in forms.values() for name in names), "")
        tried = ", ".join(str(folder) for folder in bases)
        raise GramError(
            f"{path}: expected its images, such as {first}, below {tried}, found none of {TRIED} that were looked for; "
            "name their folder with --image-root"
        )
    log.info("%s: images are in %s", path, best[0])
    return best[0].resolve(), best[1]


def _some(names: Sequence[str]) -> Iterable[str]:
    """Return up to TRIED names, spread over the whole list, that are safe to look up."""
    some = names[:: max(1, len(names) // TRIED)][:TRIED]
    return [name for name in some if "\0" not in name and len(name) < 1000]
