"""Rows of a source, split into good and skipped ones, images as bytes, and a small corpus on disk."""

import io
from collections import Counter

import numpy as np
from PIL import Image

from gram_meta.corpus.sources import all_rows, open_source


def rows_of(path, **options):
    return list(all_rows(open_source(path, **options)))


def good(rows):
    """Return (location, caption) of the rows that are not skipped."""
    return [(row.location, row.caption) for row in rows if not row.skip]


def skips(rows):
    """Return how many rows are skipped for each reason."""
    return Counter(row.skip for row in rows if row.skip)


def encoded(image, kind="PNG", **options):
    """Return an image's file as bytes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_pairs(folder):
    """Write 96 pictures of noise, and pairs.tsv with captions of six words."""
    random = np.random.default_rng(0)
    lines = ["image\tcaption"]
    for row, word in enumerate(["cat", "dog", "house", "tree", "boat", "lamp"] * 16):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{row}.png")
        lines.append(f"{row}.png\t{word} {word} {word} number {row}")
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
