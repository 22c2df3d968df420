"""Run the controls on one dataset: what theta*, the regulator and a smaller step each contribute.

    python scripts/experiments/controls.py --checkpoint META/best.safetensors --root DATA --dataset emoji_animals \\
        --out output/controls --seeds 1 2 3 --jobs 2

Accuracy on base and new classes after 0, 1, 5, 20, 50 and 90 steps (ten epochs of 18 classes). Finished runs are kept.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from common import few_shot

from gram_meta.intervals import harmonic, mean

STEPS = (0, 1, 5, 20, 50, 90)
RAW = ["TRAINER.GRAM.REGULATE", "False"]
WORDS = ["TRAINER.GRAM.INIT", "False"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers import torch
    with ProcessPoolExecutor(args.jobs) as pool:

        def run_all(variants: dict[str, list[str]]) -> dict[str, list[dict]]:
            """Run every variant on every seed; return the results of each variant."""
            started = {
                n: [pool.submit(run, args, n, seed, opts) for seed in args.seeds] for n, opts in variants.items()
            }
            return {name: [future.result() for future in futures] for name, futures in started.items()}

        results = run_all({"theta*, R on": [], '"a photo of a", R on': WORDS})
        ratios = [r["regulator"]["text"]["mean_ratio"] for r in results["theta*, R on"]]
        scale = ["TRAINER.GRAM.STEP_SCALE", f"{sum(ratios) / len(ratios):.4f}"]
        raw = {
            "theta*, R off": RAW,
            f"theta*, raw gradient x {scale[1]}": RAW + scale,
            '"a photo of a", R off (CoOp)': RAW + WORDS,
            f'"a photo of a", raw gradient x {scale[1]}': RAW + WORDS + scale,
        }
        results |= run_all(raw)
    print("| start, gradient | " + " | ".join(f"step {s}" for s in STEPS) + " | H |\n|" + "---|" * (len(STEPS) + 2))
    for name, runs in results.items():
        points = [[mean(r["curve"][i][side] for r in runs) for side in ("base", "new")] for i in range(len(STEPS))]
        base, new = points[-1]
        cells = [f"{b:.1f} / {n:.1f}" for b, n in points]
        print(f"| {name} | " + " | ".join(cells) + f" | {harmonic(base, new):.2f} |")


def run(args: argparse.Namespace, name: str, seed: int, opts: list[str]) -> dict:
    """One training run; results.json's contents."""
    folder = args.out / "".join(c if c.isalnum() else "-" for c in name) / f"seed{seed}"
    options = ["TEST.AT_STEPS", str(STEPS), "TRAINER.GRAM.CHECKPOINT", args.checkpoint, *opts]
    return few_shot(args.root, args.dataset, "CoOpGRAM", folder, seed, options)


if __name__ == "__main__":
    main()
