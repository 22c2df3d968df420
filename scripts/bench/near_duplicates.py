"""Measure how many made-up near-duplicates `gram check-overlap` finds, and how many other images it reports wrongly.

    python scripts/bench/near_duplicates.py STORE [--images N] [--against FOLDER ...] [--half tune|report]

The script draws N images from the store, changes them in each way below and searches the store for the results as if
they were test images. It prints the share whose original is among the candidates (by CLIP features, by thumbnails of
8 x 8 pixels) and the share whose original is then confirmed; also the distance of imagehash's 64-bit pHash if that
package is installed. False alarms: the same images unchanged, searched in the store without themselves; with --against,
images of folders that are known not to be in the store. `--half` splits images by a hash of their names: set thresholds
on one half and report on the other.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from gram_meta.backbone.clip import load_backbone
from gram_meta.corpus.images import read_image
from gram_meta.corpus.store import PairStore
from gram_meta.tools import overlap


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def resized(image, scale, how=Image.Resampling.BICUBIC):
    return image.resize((round(image.width * scale), round(image.height * scale)), how)


def cropped(image, share, random):
    width, height = (round(side * (1 - share)) for side in image.size)
    left, top = random.integers(image.width - width + 1), random.integers(image.height - height + 1)
    return image.crop((left, top, left + width, top + height))


def overlaid(image, random):
    """Draw a box of one colour (a fortieth of the picture) and a line of text."""
    image = image.copy()
    width, height = image.size
    x, y = int(random.integers(width - width // 5)), int(random.integers(height - height // 8))
    draw = ImageDraw.Draw(image)
    draw.rectangle((x, y, x + width // 5, y + height // 8), fill=tuple(random.integers(0, 256, 3).tolist()))
    draw.text((2, 2), "example.org", fill="white")
    return image


CHANGES = {
    "JPEG, quality 75": lambda image, random: jpeg(image, 75),
    "JPEG, quality 20": lambda image, random: jpeg(image, 20),
    "half the size": lambda image, random: resized(image, 0.5),
    "0.7 of the size, JPEG 50": lambda image, random: jpeg(resized(image, 0.7, Image.Resampling.BILINEAR), 50),
    "cropped by 5 %": lambda image, random: cropped(image, 0.05, random),
    "cropped by 10 %": lambda image, random: cropped(image, 0.1, random),
    "cropped by 20 %": lambda image, random: cropped(image, 0.2, random),
    "middle 3/4 of the width": lambda image, random: image.crop(
        (image.width // 8, 0, image.width - image.width // 8, image.height)
    ),
    "white border of 10 %": lambda image, random: ImageOps.expand(image, image.width // 10, "white"),
    "brightness x 1.3": lambda image, random: ImageEnhance.Brightness(image).enhance(1.3),
    "brightness x 0.7": lambda image, random: ImageEnhance.Brightness(image).enhance(0.7),
    "contrast x 1.4": lambda image, random: ImageEnhance.Contrast(image).enhance(1.4),
    "grey": lambda image, random: image.convert("L").convert("RGB"),
    "box and text over it": overlaid,
    "mirrored": lambda image, random: ImageOps.mirror(image),
    "mirrored, cropped by 5 %, JPEG 50": lambda image, random: jpeg(cropped(ImageOps.mirror(image), 0.05, random), 50),
}


def in_half(name, half):
    """Return whether an image belongs to this half by the hash of its name; every image does where half is None."""
    return half is None or (hashlib.sha256(name.encode()).digest()[0] % 2 == 0) == (half == "tune")


def candidates(images, store, backbone, tiny, k):
    """Return (T, 2 k) rows and cosines by CLIP and by thumbnails (mirror images included), and the small copies."""
    transform = backbone.preprocess()
    small = np.stack([overlap.small_copy(image) for image in images])
    parts = []
    for start in range(0, len(images), 64):
        parts.append(overlap._features(backbone, [transform(image) for image in images[start : start + 64]]))
    with torch.inference_mode():
        by_clip = overlap.candidates(
            *(np.concatenate(column) for column in zip(*parts, strict=True)),
            overlap._feature_blocks(store.image_features),
            len(store.locations),
            k,
            "cpu",
        )
        mine = overlap.thumbnails(small)
        by_pixels = overlap.candidates(
            overlap.unit_vectors(mine),
            overlap.unit_vectors(mine[:, :, ::-1]),
            [(0, overlap.unit_vectors(tiny))],
            len(tiny),
            k,
            "cpu",
        )
    return by_clip, by_pixels, small


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--against", nargs="+", default=[], metavar="FOLDER")
    parser.add_argument("--half", choices=("tune", "report"))
    parser.add_argument("--neighbours", type=int, default=overlap.NEIGHBOURS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--changes", nargs="*", default=list(CHANGES), metavar="NAME", help="some of them; none: false alarms alone"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        import imagehash
    except ImportError:
        imagehash = None
    random = np.random.default_rng(0)
    store = PairStore.open(args.store)
    backbone = load_backbone(store.manifest["settings"]["clip"]["name"])
    places = store.places()
    rows = [row for row in random.permutation(len(store.locations)) if in_half(store.locations[row], args.half)][
        : args.images
    ]
    rows = np.array(rows)
    settings = overlap.SearchSettings(cache=Path(f"{args.store}.pictures"))
    chunks = np.split(np.arange(len(places)), range(overlap.CHUNK, len(places), overlap.CHUNK))
    tiny = np.concatenate([overlap._read_corpus(store, chunk, settings, overlap.thumbnails)[0] for chunk in chunks])
    originals = [places.image(int(row)) for row in rows]
    small = np.stack([overlap.small_copy(image) for image in originals])
    kept = {}
    print(
        f"{len(rows)} of {len(places):,} images, half: {args.half}, {args.neighbours} neighbours, distance <= {overlap.DISTANCE}"
    )
    low = "cosine, lowest 5 %"
    header = [
        "change",
        "candidate by CLIP",
        low,
        "by 8 x 8 pixels",
        low,
        "distance, highest 5 %",
        "found",
        "pHash <= 8",
    ]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for name in args.changes:
        change = CHANGES[name]
        changed = [change(image, random) for image in originals]
        by_clip, by_pixels, theirs = candidates(changed, store, backbone, tiny, args.neighbours)
        cells, reached = [], []
        for found, cosines in (by_clip, by_pixels):
            hit = found == rows[:, None]
            cosine = np.where(hit, cosines, -1).max(1)
            reached.append(hit.any(1))
            cells.append(f"{100 * hit.any(1).mean():.1f}")
            cells.append(f"{np.quantile(cosine[hit.any(1)], 0.05):.2f}" if hit.any() else "")
        distance = overlap.distances(theirs, small)
        kept[name] = distance
        cells.append(f"{np.quantile(distance, 0.95):.2f}")
        cells.append(f"{100 * (reached[0] & (distance <= overlap.DISTANCE)).mean():.1f}")
        if imagehash:
            far = [imagehash.phash(a) - imagehash.phash(b) for a, b in zip(changed, originals, strict=True)]
            cells.append(f"{100 * np.mean(np.array(far) <= 8):.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    others = originals
    if args.against:
        paths = [p for folder in args.against for p in sorted(Path(folder).rglob("*")) if p.suffix in (".png", ".jpg")]
        paths = [path for path in paths if in_half(path.name + path.parent.name, args.half)]
        others = [read_image(paths[i])[0] for i in random.permutation(len(paths))[: 3 * args.images]]
    by_clip, by_pixels, theirs = candidates(others, store, backbone, tiny, args.neighbours + 1)
    found = np.concatenate([by_clip[0], by_pixels[0]], 1)  # (T, 4 k)
    pairs = np.unique(np.stack([np.repeat(np.arange(len(others)), found.shape[1]), found.ravel()], 1), axis=0)
    if not args.against:
        pairs = pairs[pairs[:, 1] != rows[pairs[:, 0]]]
    needed = np.unique(pairs[:, 1])
    of_corpus = np.stack([overlap.small_copy(places.image(int(row))) for row in needed])
    began = time.process_time()
    distance = overlap.distances(theirs[pairs[:, 0]], of_corpus[np.searchsorted(needed, pairs[:, 1])])
    print(f"\n{len(pairs):,} pairs of other images, {1000 * (time.process_time() - began) / len(pairs):.2f} ms each")
    nearest = np.full(len(others), 2.0)
    np.minimum.at(nearest, pairs[:, 0], distance)
    for limit in (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6):
        found = [f"{100 * np.mean(far <= limit):.1f}" for far in kept.values()]
        confirmed = f"; originals confirmed: least {min(found, key=float)} %" if found else ""
        print(
            f"distance <= {limit}: false alarms {100 * (nearest <= limit).mean():.2f} % of images, "
            f"{100 * (distance <= limit).mean():.3f} % of pairs{confirmed}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
