"""A few-shot dataset in CoOp's layout, of noise."""

import json

import numpy as np
from PIL import Image

CLASSES = ("red", "green", "blue", "grey")


def write_emoji_food(folder):
    """Write EmojiFood of four classes, noise around a brightness: 3 / 1 / 2 pictures each."""
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    split = {"train": [], "val": [], "test": []}
    for label, name in enumerate(CLASSES):
        for part, count in (("train", 3), ("val", 1), ("test", 2)):
            for i in range(count):
                pixels = random.integers(0, 160, (32, 32, 3)) + 30 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{name}_{part}_{i}.png")
                split[part].append([f"{name}_{part}_{i}.png", label, name])
    (folder / "split_zhou_EmojiFood.json").write_text(json.dumps(split), encoding="utf-8")
