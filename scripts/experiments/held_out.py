"""Base to new on topics that meta-training held out: it chose the temperature in docs/results/emoji-world.md.

    python scripts/experiments/held_out.py --store STORE --hierarchy HIERARCHY --out output/grid --only VARIANT ...

Variants and meta-trainings are those of meta_grid.py. For each meta-seed, a task has 36 of its held-out topics with
different words. Training takes 16 images of one domain of each of 18 topics, and CoOp's 90 steps; the test takes their
other images (base) and all images of the other 18 topics (new). These tasks show far more drawings than *animals*.
"""

import math

import numpy as np
import torch
from few_shot_batch import STEPS, Recording, TestSet, adapt
from meta_grid import COOP, add_controls, controls, grid_parser, meta_train, variants_of, with_interval
from tabulate import tabulate

from gram_meta import load_backbone
from gram_meta.clustering.hierarchy import Hierarchy
from gram_meta.corpus.store import PairStore
from gram_meta.intervals import harmonic, mean
from gram_meta.method.checkpoint import load_meta_checkpoint
from gram_meta.method.prompts import context_from_words
from gram_meta.method.tasks import images_by_domain

HALF, SHOTS, BATCH, EPOCH = 18, 16, 32, 9


def main() -> None:
    parser = grid_parser(__doc__)
    add_controls(parser)
    parser.add_argument("--tasks", type=int, default=6, help="of each meta-seed; default: 6")
    args = parser.parse_args()
    torch.set_num_threads(1)
    variants = variants_of(args)
    hierarchy, store = Hierarchy.open(args.hierarchy), PairStore.open(args.store)
    domains = images_by_domain(hierarchy, None)
    words = context_from_words(load_backbone("gram-small"), "a photo of a")
    paths = {name: meta_train(args, name, settings) for name, settings in variants.items()}
    gains: dict[tuple[str, str], list[list[float]]] = {}  # of each meta-seed: base, new, H
    for seed in args.meta_seeds:
        starts = {(COOP, COOP): (words, None)}
        for name, of_seed in paths.items():
            for control, start in controls(of_seed[seed], args.store, args.hierarchy, words, args.controls).items():
                starts[name, control] = start
        (held,) = {tuple(load_meta_checkpoint(of[seed]).provenance["held_out_topics"]) for of in paths.values()}
        done = [adapt(*draw(hierarchy, domains, store, held, [seed, number]), starts) for number in range(args.tasks)]
        ends = {key: [mean(one[key][STEPS][side] for one in done) for side in (0, 1)] for key in starts}
        ends = {key: [*sides, harmonic(*sides)] for key, sides in ends.items()}
        for key in starts:
            gains.setdefault(key, []).append([a - b for a, b in zip(ends[key], ends[COOP, COOP], strict=True)])
    rows = [[*key, *map(with_interval, zip(*gains[key], strict=True))] for key in gains if key[0] != COOP]
    print(tabulate(rows, ["variant", "gradient", "base", "new", "H"], "pipe", disable_numparse=True))


def draw(
    hierarchy: Hierarchy, domains: list[list[np.ndarray]], store: PairStore, topics: tuple[int, ...], seed: list[int]
) -> tuple[Recording, TestSet]:
    """Draw one task: what the steps of a training see, and what it is tested on."""
    random = np.random.default_rng(seed)
    chosen: dict[str, int] = {}
    for topic in random.permutation(topics):
        if len(chosen) < 2 * HALF and max(map(len, domains[topic])) >= 10 and sum(map(len, domains[topic])) >= 24:
            chosen.setdefault(hierarchy.topics[topic].word.lower(), int(topic))
    train, test = [], []  # image and label
    for label, topic in enumerate(chosen.values()):
        images = [random.permutation(rows) for rows in domains[topic]]
        if label < HALF:
            source = images[random.integers(len(images))]
            train += [(row, label) for row in source[: min(SHOTS, len(source) - 2)]]
        seen = {row for row, _ in train}
        test += [(row, label) for rows in images for row in rows if row not in seen]

    def take(pairs: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        rows, labels = map(np.array, zip(*pairs, strict=True))
        return torch.from_numpy(store.image_features[rows].astype(np.float32)), torch.from_numpy(labels)

    features, labels = take(train)
    order = np.concatenate([random.permutation(len(train)) for _ in range(STEPS * BATCH // len(train) + 1)])
    steps = torch.from_numpy(order[: STEPS * BATCH].reshape(STEPS, BATCH))
    rates = [0.001 * (1 + math.cos(math.pi * (step // EPOCH) / 10)) if step >= EPOCH else 1e-5 for step in range(STEPS)]
    return Recording(features[steps], labels[steps], rates, []), TestSet(*take(test), list(chosen))


if __name__ == "__main__":
    main()
