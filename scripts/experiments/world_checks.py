"""Check the emoji world before it is frozen: the section "Checks" of docs/results/emoji-world.md.

    python scripts/experiments/world_checks.py --out output/checks

For each dataset, in its own look: zero-shot accuracy of random tasks, among downstream and meta concepts of the same
groups, and on base and new classes; CoOp's accuracy after 10 and 50 epochs. The script skips finished runs and writes
the table, checks.md.
"""

import argparse
import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from few_shot_batch import few_shot
from tabulate import tabulate

from gram_meta import load_backbone
from gram_meta.demo.emoji import load_drawings
from gram_meta.demo.roles import DATASETS, Role, classes_of, roles
from gram_meta.demo.styles import render, sample_scenes
from gram_meta.demo.world import SPECS, ZERO_SHOT_TEMPLATE, write_world
from gram_meta.intervals import mean

WAYS, PARTS, SIDES = (10, 18), ("downstream", "meta"), ("base", "new")
SEEDS = {10: (1, 2, 3), 50: (1, 2)}  # of CoOp, by epochs
TASKS = 400
PICTURES = 12  # of each concept
STEPS_PER_EPOCH = 9  # 18 base classes, 16 shots, batches of 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    write_world(args.out / "world", corpus_size=0)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        runs = {
            (name, epochs, seed): pool.submit(coop, args.out, name, epochs, seed)
            for epochs, seeds in SEEDS.items()
            for seed in seeds
            for name in SPECS
        }
        tasks = dict(zip(SPECS, pool.map(zero_shot_tasks, SPECS), strict=True))
        curves = {key: future.result() for key, future in runs.items()}
    rows = {name: numbers(name, curves) | tasks[name] for name in SPECS}
    rows["average"] = {key: mean(row[key] for row in rows.values()) for key in rows["animals"]}
    text = tabulate([cells(name, row) for name, row in rows.items()], "keys", "pipe", disable_numparse=True)
    (args.out / "checks.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def numbers(dataset: str, curves: dict[tuple[str, int, int], list[dict]]) -> dict[str, float]:
    """Return means over seeds: zero-shot, CoOp's after 10 and 50 epochs, and how much the longer training adds."""
    short, long = ([curves[dataset, epochs, seed] for seed in seeds] for epochs, seeds in SEEDS.items())
    row = {}
    for side in SIDES:
        row[f"zero-shot {side}"] = mean(curve[0][side] for curve in short)
        row[f"CoOp {side}"] = mean(curve[-1][side] for curve in short)
        row[f"long {side}"] = mean(curve[-1][side] for curve in long)
        row[f"longer {side}"] = row[f"long {side}"] - mean(curve[-1][side] for curve in short[: len(long)])
    return row


def coop(out: Path, name: str, epochs: int, seed: int) -> list[dict]:
    """Train CoOp; return its accuracy on base and new classes before the first step and after the last."""
    options = ["OPTIM.MAX_EPOCH", str(epochs), "TEST.AT_STEPS", str((0, epochs * STEPS_PER_EPOCH))]
    folder = out / name / f"epochs{epochs}" / f"seed{seed}"
    return few_shot(str(out / "world"), f"emoji_{name}", "CoOp", folder, seed, options)


def zero_shot_tasks(name: str) -> dict[str, float]:
    """Return the accuracy of random tasks of downstream and of meta concepts in one dataset's look."""
    meta = [role for role in roles() if role.part == "meta" and role.concept.group in DATASETS[name]]
    logits = [zero_shot_logits(members, name) for members in (classes_of(name), meta)]
    pairs = itertools.product(WAYS, zip(PARTS, logits, strict=True))
    return {f"{ways}-way {part}": 100 * task_accuracy(its, ways) for ways, (part, its) in pairs}


def zero_shot_logits(members: list[Role], name: str) -> np.ndarray:
    """Return the similarity (C, PICTURES, C) of each concept's pictures and each concept's sentence."""
    drawings = load_drawings([(role.concept, source) for role in members for source in role.seen])
    shown = np.repeat(np.arange(len(drawings)), PICTURES // 3)
    scenes = sample_scenes(SPECS[name].look, shown, np.arange(len(drawings)), np.random.default_rng(0))
    backbone = load_backbone("gram-small")
    pixels = backbone.normalise(torch.from_numpy(render(drawings, scenes)).permute(0, 3, 1, 2))
    with torch.no_grad():
        images = torch.cat([backbone.encode_images(part) for part in pixels.split(256)])
        texts = backbone.encode_texts([ZERO_SHOT_TEMPLATE.format(role.concept.name) for role in members])
    return (images @ texts.T).reshape(len(members), PICTURES, len(members)).numpy()


def task_accuracy(logits: np.ndarray, ways: int) -> float:
    """Return the mean accuracy of tasks of `ways` concepts each."""
    rng = np.random.default_rng(0)
    tasks = [rng.choice(len(logits), ways, replace=False) for _ in range(TASKS)]
    right = [logits[np.ix_(task, range(PICTURES), task)].argmax(-1) == np.arange(ways)[:, None] for task in tasks]
    return float(np.mean(right))


def cells(name: str, row: dict[str, float]) -> dict[str, str]:
    texts = {"dataset": name, "styles": ", ".join(SPECS[name].look.styles) if name in SPECS else ""}
    for kind, sides in (("10-way", PARTS), ("18-way", PARTS), ("zero-shot", SIDES), ("CoOp", SIDES)):
        title = f"{kind} {' / '.join(sides)}" + " (10 epochs)" * (kind == "CoOp")
        texts[title] = " / ".join(f"{row[f'{kind} {side}']:.1f}" for side in sides)
    gain = row["CoOp base"] - row["zero-shot base"]
    last = {"base - zero-shot": f"{gain:+.1f}", "CoOp new (50 epochs)": f"{row['long new']:.1f}"}
    return texts | last | {"new 50 - 10 epochs": f"{row['longer new']:+.1f}"}


if __name__ == "__main__":
    main()
