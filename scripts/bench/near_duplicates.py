"""Measure how many made-up near-duplicates `gram check-overlap` finds, and how many other images it reports wrongly.

    python scripts/bench/near_duplicates.py STORE [--images N] [--against FOLDER ...] [--half tune|report]

The script draws N images from the store, changes them and searches the store for the results as if they were test
images. False alarms are of the same images, searched in the store without themselves; with --against, of images of
folders that are known not to be in the store. `--half`: a half of the images by a hash of their names, so that the
distance is set on one and reported on the other. docs/results/corpus.md explains the columns.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import common
import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torchvision.transforms.v2.functional import jpeg

from gram_meta.backbone.clip import Backbone, load_backbone
from gram_meta.corpus.places import Places
from gram_meta.corpus.store import PairStore
from gram_meta.images import read_image
from gram_meta.tools import overlap

try:
    import imagehash
except ImportError:
    imagehash = None

Picture = Image.Image
Random = np.random.Generator
LIMITS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6)


def cropped(image: Picture, share: float, random: Random) -> Picture:
    """Cut away this share of the width and of the height, at a random place."""
    width, height = (round(side * (1 - share)) for side in image.size)
    left, top = random.integers(image.width - width + 1), random.integers(image.height - height + 1)
    return image.crop((left, top, left + width, top + height))


def overlaid(image: Picture, random: Random) -> Picture:
    """Draw a box of one colour (a fortieth of the picture) and a line of text."""
    image = image.copy()
    width, height = image.size
    x, y = int(random.integers(width - width // 5)), int(random.integers(height - height // 8))
    draw = ImageDraw.Draw(image)
    draw.rectangle((x, y, x + width // 5, y + height // 8), fill=tuple(random.integers(0, 256, 3).tolist()))
    draw.text((2, 2), "example.org", fill="white")
    return image


CHANGES: dict[str, Callable[[Picture, Random], Picture]] = {
    "JPEG, quality 75": lambda image, random: jpeg(image, 75),
    "JPEG, quality 20": lambda image, random: jpeg(image, 20),
    "half the size": lambda image, random: ImageOps.scale(image, 0.5),
    "0.7 of the size, JPEG 50": lambda image, random: jpeg(ImageOps.scale(image, 0.7, Image.Resampling.BILINEAR), 50),
    "cropped by 5 %": lambda image, random: cropped(image, 0.05, random),
    "cropped by 10 %": lambda image, random: cropped(image, 0.1, random),
    "cropped by 20 %": lambda image, random: cropped(image, 0.2, random),
    "middle 3/4 of the width": lambda image, random: ImageOps.fit(image, (image.width * 3 // 4, image.height)),
    "white border of 10 %": lambda image, random: ImageOps.expand(image, image.width // 10, "white"),
    "brightness x 1.3": lambda image, random: ImageEnhance.Brightness(image).enhance(1.3),
    "brightness x 0.7": lambda image, random: ImageEnhance.Brightness(image).enhance(0.7),
    "contrast x 1.4": lambda image, random: ImageEnhance.Contrast(image).enhance(1.4),
    "grey": lambda image, random: image.convert("L").convert("RGB"),
    "box and text over it": overlaid,
    "mirrored": lambda image, random: ImageOps.mirror(image),
    "mirrored, cropped by 5 %, JPEG 50": lambda image, random: jpeg(cropped(ImageOps.mirror(image), 0.05, random), 50),
}


def candidates(
    images: Sequence[Picture], store: PairStore, backbone: Backbone, k: int = overlap.NEIGHBOURS
) -> Iterator[np.ndarray]:
    """Yield rows (T, 2 k) of the store by CLIP, then by thumbnails (mirror images included)."""
    transform, total = backbone.preprocess(), len(store.locations)
    batches = [images[start : start + 64] for start in range(0, len(images), 64)]
    parts = [overlap._features(backbone, [transform(image) for image in batch]) for batch in batches]
    queries = map(np.concatenate, zip(*parts, strict=True))
    size, features = overlap.CORPUS_BLOCK, store.image_features
    blocks = ((start, features[start : start + size]) for start in range(0, total, size))
    yield overlap.candidates(*queries, blocks, total, k, "cpu")[0]
    tiny = overlap.thumbnails(small_copies(images))
    small = overlap._pixel_blocks(store, overlap.SearchSettings(cache=Path(f"{store.path}.pictures")))
    yield overlap.candidates(*map(overlap.unit_vectors, (tiny, tiny[:, :, ::-1])), small, total, k, "cpu")[0]


def small_copies(images: Sequence[Picture]) -> np.ndarray:
    return np.stack([overlap.small_copy(image) for image in images])


def in_half(name: str, half: str | None) -> bool:
    """Return whether an image belongs to this half by the hash of its name; every image does if half is None."""
    return half is None or (hashlib.sha256(name.encode()).digest()[0] % 2 == 0) == (half == "tune")


def main() -> None:
    parser = common.plain_parser(__doc__)
    parser.add_argument("store")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--against", nargs="+", default=[], metavar="FOLDER")
    parser.add_argument("--half", choices=("tune", "report"))
    args = parser.parse_args()
    random = np.random.default_rng(0)
    store = PairStore.open(args.store)
    search = partial(candidates, store=store, backbone=load_backbone(store.manifest["settings"]["clip"]["name"]))
    places = store.places()
    rows = [row for row in random.permutation(len(places)).tolist() if in_half(store.locations[row], args.half)]
    rows = np.array(rows[: args.images])
    originals = [places.image(row) for row in rows.tolist()]
    print(f"{len(rows)} of {len(places):,} images, half: {args.half}\n")
    lines = []
    for name, change in CHANGES.items():
        changed = [change(image, random) for image in originals]
        line: dict[str, object] = {"change": name}
        for way, found in zip(("CLIP", "pixels"), search(changed), strict=True):
            line[f"candidate by {way} (%)"] = f"{100 * (found == rows[:, None]).any(1).mean():.1f}"
        distance = overlap.distances(small_copies(changed), small_copies(originals))
        line["distance, highest 5 %"] = f"{np.quantile(distance, 0.95):.2f}"
        if imagehash:
            far = [imagehash.phash(a) - imagehash.phash(b) for a, b in zip(changed, originals, strict=True)]
            line["pHash <= 8 (%)"] = f"{100 * np.mean(np.array(far) <= 8):.1f}"
        lines.append(line)
    common.print_table(lines)
    others = originals
    if args.against:
        paths = [p for folder in args.against for p in sorted(Path(folder).rglob("*")) if p.suffix in (".png", ".jpg")]
        paths = [path for path in paths if in_half(path.name + path.parent.name, args.half)]
        others = [read_image(paths[i])[0] for i in random.permutation(len(paths))[: 3 * args.images]]
    found = np.concatenate(list(search(others, k=overlap.NEIGHBOURS + 1)), axis=1)  # (T, 4 k)
    print_false_alarms(others, found, places, None if args.against else rows)


def print_false_alarms(others: Sequence[Picture], found: np.ndarray, places: Places, own: np.ndarray | None) -> None:
    """Print, for several limits of the distance, how many images are reported; `own`: their rows in the store."""
    pairs = np.stack([np.repeat(np.arange(len(others)), found.shape[1]), found.ravel()], axis=1)
    pairs = np.unique(pairs[found.ravel() >= 0], axis=0)  # a store of fewer images has -1 at the end
    if own is not None:
        pairs = pairs[pairs[:, 1] != own[pairs[:, 0]]]
    needed = np.unique(pairs[:, 1])
    of_corpus = small_copies([places.image(row) for row in needed.tolist()])
    began = time.process_time()
    distance = overlap.distances(small_copies(others)[pairs[:, 0]], of_corpus[np.searchsorted(needed, pairs[:, 1])])
    print(f"{len(pairs):,} pairs of other images, {1000 * (time.process_time() - began) / len(pairs):.2f} ms each\n")
    nearest = np.full(len(others), 2.0)
    np.minimum.at(nearest, pairs[:, 0], distance)
    shares = {limit: f"{100 * (nearest <= limit).mean():.2f}" for limit in LIMITS}
    common.print_table([{"distance up to": limit, "false alarms (%)": share} for limit, share in shares.items()])


if __name__ == "__main__":
    main()
