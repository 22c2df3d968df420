"""Check the emoji world before it is frozen: the section "Checks" of docs/results/emoji-world.md.

    python scripts/experiments/world_checks.py --out output/checks --jobs 2

GRAM plays no part in it. For each dataset, in its own look:
(a) zero-shot accuracy of random tasks of 10 and 18 classes, among downstream and meta concepts of the same groups;
(b) zero-shot accuracy on base and on new classes;
(c) CoOp's accuracy on base classes after 10 epochs, against zero-shot;
(d) CoOp's accuracy on new classes after 50 epochs, against 10 epochs.
The script skips finished runs and writes checks.json and the table, checks.md.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from few_shot_batch import few_shot

from gram_meta.demo.roles import DATASETS, Role, classes_of, roles
from gram_meta.demo.world import SPECS, ZERO_SHOT_TEMPLATE, write_world
from gram_meta.files import write_json
from gram_meta.intervals import mean

WAYS = (10, 18)
EPOCHS = (10, 50)
TASKS = 400
PICTURES = 12  # of each concept
STEPS_PER_EPOCH = 9  # 18 base classes, 16 shots, batches of 32
COLUMNS = (
    "dataset,styles,10-way downstream / meta,18-way downstream / meta,zero-shot base / new,"
    "CoOp base / new (10 epochs),base - zero-shot,CoOp new (50 epochs),new 50 - 10 epochs"
).split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of CoOp with 10 epochs")
    parser.add_argument("--long-seeds", type=int, nargs="+", default=[1, 2], help="of CoOp with 50 epochs")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers import torch
    write_world(args.out / "world", corpus_size=0)
    with ProcessPoolExecutor(args.jobs) as pool:
        runs = {
            (name, epochs, seed): pool.submit(coop, args.out, name, epochs, seed)
            for epochs, seeds in zip(EPOCHS, (args.seeds, args.long_seeds), strict=True)
            for seed in seeds
            for name in SPECS
        }
        tasks = dict(zip(SPECS, pool.map(zero_shot_tasks, SPECS), strict=True))
        curves = {key: future.result() for key, future in runs.items()}
    rows = {}
    for name in SPECS:
        short = [curves[name, EPOCHS[0], seed] for seed in args.seeds]
        long = [curves[name, EPOCHS[1], seed] for seed in args.long_seeds]
        same_seeds = [curves[name, EPOCHS[0], seed] for seed in args.long_seeds if seed in args.seeds]
        rows[name] = {"tasks": tasks[name]}
        for side in ("base", "new"):
            rows[name][f"zero_shot_{side}"] = mean(curve[0][side] for curve in short)
            rows[name][f"coop_{side}"] = mean(curve[-1][side] for curve in short)
            rows[name][f"coop_long_{side}"] = mean(curve[-1][side] for curve in long)
            rows[name][f"longer_{side}"] = rows[name][f"coop_long_{side}"] - mean(c[-1][side] for c in same_seeds)
    write_json(args.out / "checks.json", rows)
    text = table(rows)
    (args.out / "checks.md").write_text(text, encoding="utf-8")
    print(text)


def coop(out: Path, name: str, epochs: int, seed: int) -> list[dict]:
    """Train CoOp; return its accuracy on base and new classes before the first step and after the last."""
    steps = (0, epochs * STEPS_PER_EPOCH)
    options = ["OPTIM.MAX_EPOCH", str(epochs), "TEST.AT_STEPS", str(steps)]
    folder = out / name / f"epochs{epochs}" / f"seed{seed}"
    return few_shot(str(out / "world"), f"emoji_{name}", "CoOp", folder, seed, options)


def zero_shot_tasks(name: str) -> dict[str, list[float]]:
    """Return the accuracy of random tasks by number of ways: [downstream, meta] concepts in one dataset's look."""
    meta = [role for role in roles() if role.part == "meta" and role.concept.group in DATASETS[name]]
    logits = [zero_shot_logits(members, name) for members in (classes_of(name), meta)]
    return {str(ways): [100 * task_accuracy(part, ways) for part in logits] for ways in WAYS}


def zero_shot_logits(members: list[Role], name: str) -> np.ndarray:
    """Return the similarity (C, PICTURES, C) of each concept's pictures and each concept's sentence."""
    import torch

    from gram_meta import load_backbone
    from gram_meta.demo.emoji import load_drawings
    from gram_meta.demo.styles import render, sample_scenes

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


def table(rows: dict[str, dict]) -> str:
    """Return the Markdown table, with the average as its last row."""
    keys = [key for key in rows[next(iter(rows))] if key != "tasks"]
    average = {key: mean(row[key] for row in rows.values()) for key in keys}
    average["tasks"] = {
        str(ways): [mean(row["tasks"][str(ways)][i] for row in rows.values()) for i in (0, 1)] for ways in WAYS
    }
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for name, row in {**rows, "average": average}.items():
        lines.append([name, ", ".join(SPECS[name].look.styles) if name in SPECS else ""])
        lines[-1] += [" / ".join(f"{value:.1f}" for value in row["tasks"][str(ways)]) for ways in WAYS]
        lines[-1] += [f"{row[f'{kind}_base']:.1f} / {row[f'{kind}_new']:.1f}" for kind in ("zero_shot", "coop")]
        gain = row["coop_base"] - row["zero_shot_base"]
        lines[-1] += [f"{gain:+.1f}", f"{row['coop_long_new']:.1f}", f"{row['longer_new']:+.1f}"]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
