"""How many made-up near-duplicates gram check-overlap finds, and how many other images it takes for such.

    python scripts/bench/near_duplicates.py STORE [--images N] [--against FOLDER ...] [--half tune|report]

N images of the store are taken, changed in each of the ways below, and looked for in the store as if they were test
images: the share whose original is among the candidates (by CLIP's features, by pictures of 8 x 8 pixels), and the share whose
original is then confirmed. Beside it the distance of imagehash's 64-bit pHash, where that is installed. False alarms: the
same images unchanged, looked for in the store without themselves; or, with --against, images of folders that are known not to
be in the store. `--half` parts images by a hash of their names: thresholds are set on one half and reported on the other.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import time
from pathlib import Path

import numpy as np
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
    """A box of one colour and a line of text, a fortieth and more of the picture."""
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
    return half is None or (hashlib.sha256(name.encode()).digest()[0] % 2 == 0) == (half == "tune")


def candidates(images, store, backbone, tiny, k):
    """(T, 2 k) rows and cosines by CLIP and by thumbnails, each with those of the mirror images; the small copies."""
    import torch

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
    parser.add_argument("--save", metavar="NPZ", help="keep distances, to look at thresholds")
    args = parser.parse_args()
    import torch

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
    tiny = np.concatenate(
        [
            overlap._read_corpus(
                store, np.arange(s, min(s + overlap.CHUNK, len(places))), settings, overlap.thumbnails
            )[0]
            for s in range(0, len(places), overlap.CHUNK)
        ]
    )
    originals = [places.image(int(row)) for row in rows]
    small = np.stack([overlap.small_copy(image) for image in originals])
    kept = {}
    print(
        f"{len(rows)} of {len(places):,} images, half: {args.half}, {args.neighbours} neighbours, distance <= {overlap.DISTANCE}"
    )
    print(
        "| change | candidate by CLIP | cosine, lowest 5 % | by 8 x 8 pixels | cosine, lowest 5 % | distance, highest 5 % | found | pHash <= 8 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in args.changes:
        change = CHANGES[name]
        changed = [change(image, random) for image in originals]
        by_clip, by_pixels, theirs = candidates(changed, store, backbone, tiny, args.neighbours)
        cells, reached = [], []
        for found, cosines in (by_clip, by_pixels):
            hit = found == rows[:, None]
            cosine = np.where(hit, cosines, -1).max(1)
            reached.append(hit.any(1))
            cells += [
                f"{100 * hit.any(1).mean():.1f}",
                f"{np.quantile(cosine[hit.any(1)], 0.05):.2f}" if hit.any() else "",
            ]
        distance = overlap.distances(theirs, small)
        kept[name] = distance
        cells += [
            f"{np.quantile(distance, 0.95):.2f}",
            f"{100 * (reached[0] & (distance <= overlap.DISTANCE)).mean():.1f}",
        ]
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
    if args.save:
        order = np.argsort(distance)[:200]
        np.savez(
            args.save,
            nearest=nearest,
            pairs=pairs[order],
            distance=distance[order],
            rows=rows,
            **{f"change {n}": d for n, d in kept.items()},
        )
        sheet = Image.new("RGB", (8 * 210, 5 * 106), "white")
        for place, i in enumerate(order[:40]):
            x, y = place % 8 * 210, place // 8 * 106
            sheet.paste(others[pairs[i, 0]].resize((100, 100)), (x, y))
            sheet.paste(places.image(int(pairs[i, 1])).resize((100, 100)), (x + 102, y))
        sheet.save(f"{args.save}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
