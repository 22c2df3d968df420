"""Draw Figures 1 and 3 of the paper on the emoji world: accuracy in a long training, inner product in meta-training.

    python scripts/experiments/curves.py --store STORE --hierarchy HIERARCHY --out output/grid \\
        --only VARIANT ... --meta-seeds 1 2 3 4 5

Variants and meta-trainings are those of meta_grid.py: one with R, one without, and perhaps one with the paper's R. CoOp
takes 50 epochs on 16 shots of the base classes of each reported dataset; the same steps are taken from theta* of each
meta-seed, with R and, for the variant without R, with raw gradients. CoOp's usual 10 epochs are taken from other words
and from random vectors, too. The script writes results/curves.json, assets/emoji-epochs.webp, emoji-initialisation.webp
and emoji-inner-product.webp to the folder of --docs.
"""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import torch
from meta_grid import COOP, controls, few_shot_runs, grid_parser, meta_train, variants_of
from PIL import Image

from gram_meta import load_backbone
from gram_meta.bench.emoji import DATASETS
from gram_meta.demo.world import SPECS
from gram_meta.files import write_json
from gram_meta.intervals import estimate, mean
from gram_meta.method.prompts import context_from_words, random_context
from gram_meta.report.figures import BLUE, GREEN, GREY, VERMILLION, draw_panels

EPOCHS, STEPS_PER_EPOCH = 10, 9  # 16 shots in 18 classes, batches of 32
SIDES = ("base classes", "new classes")
GRAM, PAPER, WITHOUT = "CoOp + GRAM", "CoOp + GRAM, the paper's R", "CoOp + GRAM, meta-trained without R"
STYLES = {COOP: (GREY, "--", "o"), GRAM: (BLUE, "-", "o"), PAPER: (GREEN, "-.", "^"), WITHOUT: (VERMILLION, "-", "s")}
WORDS = ("a photo of a", "a picture of a", "an image of a", "a drawing of a", "an icon of the", "here is a small")
DRAWS = 10  # random initialisations, N(0, 0.02) as in CoOp
INITIALISATIONS = {
    "CoOp from random vectors": (GREY, "--", "o"),
    "CoOp from words": (VERMILLION, "-", "s"),
    "CoOp + GRAM from theta*": (BLUE, "-", "o"),
}
GRADIENTS = {  # of which variant, key of log.jsonl
    "regulated support gradient": (GRAM, "alignment", (GREEN, "-", "o")),
    "raw support gradient": (GRAM, "alignment_raw", (GREY, "--", "s")),
    "raw, meta-trained without R": (WITHOUT, "alignment_raw", (VERMILLION, ":", "^")),
}


def main() -> None:
    parser = grid_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=50)
    reported = [folder.removeprefix("emoji_") for folder in DATASETS["base2new"]]
    parser.add_argument("--sets", nargs="+", default=reported, choices=list(SPECS), help="few-shot datasets")
    parser.add_argument("--docs", type=Path, default=Path(__file__).resolve().parents[2] / "docs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    variants = {kind_of(settings): (name, settings) for name, settings in variants_of(args).items()}
    if not {GRAM, WITHOUT} <= set(variants) or len(variants) < len(args.only or []):
        parser.error(f"--only: expected one variant with R, one without, and perhaps one with the paper's: {args.only}")
    paths = {kind: meta_train(args, name, settings) for kind, (name, settings) in variants.items()}
    words = context_from_words(load_backbone("gram-small"), "a photo of a")
    starts = {(COOP, 0): (words, None)}
    for kind, of in paths.items():
        control = "R off" if kind == WITHOUT else "R on"
        for seed, path in of.items():
            (starts[kind, seed],) = controls(path, args.store, args.hierarchy, words, [control]).values()
    found = {
        "epochs": args.epochs,
        "seeds": len(args.seeds),
        "datasets": args.sets,
        "accuracy": accuracy_curves(args, starts),
        "initialisation": accuracy_of_starts(args, {s: start for (kind, s), start in starts.items() if kind == GRAM}),
        "inner product": inner_products(paths),
    }
    write_json(args.docs / "results" / "curves.json", found)
    for name, picture in drawn(found).items():
        Image.open(io.BytesIO(picture)).save(args.docs / "assets" / f"emoji-{name}.webp", lossless=True)


def kind_of(settings: dict[str, object]) -> str:
    """Return which line a variant of the grid is."""
    if settings.get("REGULATOR.ENABLED") is False:
        return WITHOUT
    return GRAM if settings.get("REGULATOR.BETA") == "relative" else PAPER


def accuracy_curves(args: argparse.Namespace, starts: dict) -> dict[str, dict[str, list[list[float]]]]:
    """Return side -> kind -> for each meta-seed the accuracy at epochs 0, 1, ..., a mean over datasets and seeds."""
    ends = range(0, args.epochs * STEPS_PER_EPOCH + 1, STEPS_PER_EPOCH)
    runs = [run for name in args.sets for run in few_shot_runs(args, name, starts, args.epochs, ends)]
    kinds = dict.fromkeys(kind for kind, _ in starts)
    curves: dict[str, dict[str, list[list[float]]]] = {side: {kind: [] for kind in kinds} for side in SIDES}
    for key in starts:
        for index, side in enumerate(SIDES):
            curves[side][key[0]].append([round(mean(run[key][end][index] for run in runs), 3) for end in ends])
    return curves


def accuracy_of_starts(args: argparse.Namespace, learned: dict) -> dict[str, dict[str, list[float]]]:
    """Return side -> kind -> the accuracy after 10 epochs from each start, a mean over datasets and seeds; sorted."""
    backbone, epochs = load_backbone("gram-small"), min(EPOCHS, args.epochs)
    draw, words, theta = INITIALISATIONS
    starts = {(draw, seed): (random_context(backbone.text_width, 4, _seeded(seed)), None) for seed in range(DRAWS)}
    starts |= {(words, text): (context_from_words(backbone, text), None) for text in WORDS}
    starts |= {(theta, seed): start for seed, start in learned.items()}
    end = epochs * STEPS_PER_EPOCH
    runs = [run for name in args.sets for run in few_shot_runs(args, name, starts, epochs, [end])]
    return {
        side: {
            kind: sorted(round(mean(run[key][end][index] for run in runs), 3) for key in starts if key[0] == kind)
            for kind in INITIALISATIONS
        }
        for index, side in enumerate(SIDES)
    }


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inner_products(paths: dict[str, dict[int, Path]]) -> dict[str, Any]:
    """Return steps, and gradient -> for each meta-seed its inner product with the query gradient, on held-out tasks."""
    logs = {kind: [_log(path.parent / "log.jsonl") for path in paths[kind].values()] for kind in (GRAM, WITHOUT)}
    steps = [row["step"] for row in logs[GRAM][0]]
    values = {
        title: [[round(row[key], 4) for row in log] for log in logs[kind]]
        for title, (kind, key, _) in GRADIENTS.items()
    }
    return {"steps": steps, **values}


def drawn(found: dict[str, Any]) -> dict[str, bytes]:
    """Return the pictures, PNG: lines are means over meta-seeds, bands their 95 % intervals."""
    sides = {
        side: [(kind, STYLES[kind], _points(range(len(of[0])), of)) for kind, of in kinds.items()]
        for side, kinds in found["accuracy"].items()
    }
    ranked = {
        side: [(kind, INITIALISATIONS[kind], _points(range(1, len(of) + 1), [of])) for kind, of in kinds.items()]
        for side, kinds in found["initialisation"].items()
    }
    products = found["inner product"]
    lines = [(title, style, _points(products["steps"], products[title])) for title, (_, _, style) in GRADIENTS.items()]
    return {
        "epochs": draw_panels(sides, 2, (4.0, 3.0), "epoch", "accuracy (%)"),
        "initialisation": draw_panels(ranked, 2, (4.0, 3.0), "initialisation, worst to best", "accuracy (%)"),
        "inner-product": draw_panels(
            {"held-out tasks": lines}, 1, (6.0, 3.0), "meta-training step", "normalised inner\nproduct (cosine)"
        ),
    }


def _points(at: Any, of_seeds: list[list[float]]) -> list:
    return [(x, estimate(values, len(of_seeds))) for x, values in zip(at, zip(*of_seeds, strict=True), strict=True)]


def _log(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
