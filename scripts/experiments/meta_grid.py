"""Compare settings of meta-training on one dataset: how docs/results/emoji-world.md chose what `gram demo` uses.

    python scripts/experiments/meta_grid.py --store STORE --hierarchy HIERARCHY --root DATA --dataset emoji_animals \\
        --grid scripts/experiments/emoji.yaml --out output/grid --seeds 1 2 3 --jobs 2

The grid is a YAML file: a name for each variant, and KEY: VALUE settings of `gram_meta.config` that differ from `base`.
The script meta-trains each variant, then trains CoOpGRAM from it on the dataset, and compares base and new accuracy
with CoOp's from the same seeds and with theta* before the first step. It skips finished parts, prints a Markdown table
and writes grid.json.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import yaml
from tabulate import tabulate

from gram_meta.intervals import harmonic, mean

CONFIG = "gram_small_c4_ep10_batch32_ctxv1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--hierarchy", required=True)
    parser.add_argument("--root", required=True, help="folder of the downstream datasets")
    parser.add_argument("--dataset", required=True, help="config name of the dataset to tune on")
    parser.add_argument("--grid", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--only", nargs="+", help="variants to run; default: all in the grid")
    args = parser.parse_args()

    grid = yaml.safe_load(args.grid.read_text())
    base = grid.pop("base", {})
    names = args.only or list(grid)
    variants = {name: {**base, **(grid[name] or {})} for name in names}
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers import torch
    with ProcessPoolExecutor(args.jobs) as pool:
        coop = {
            seed: pool.submit(few_shot, args.root, args.dataset, "CoOp", args.out / "coop" / f"seed{seed}", seed, [])
            for seed in args.seeds
        }
        rows = list(pool.map(run_variant, [args] * len(names), names, variants.values()))
        before = {seed: future.result() for seed, future in coop.items()}
    table = [summary("CoOp", before, before, {})]
    table += [summary(name, row["scores"], before, row["held_out"]) for name, row in zip(names, rows, strict=True)]
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"settings": variants, "coop": before, "rows": dict(zip(names, rows, strict=True))}
    (args.out / "grid.json").write_text(json.dumps(record, indent=2))
    print(tabulate(table, "keys", "pipe", disable_numparse=True))


def run_variant(args: argparse.Namespace, name: str, settings: dict[str, object]) -> dict:
    """Meta-train, then train CoOpGRAM; return the scores by seed and the held-out facts of the checkpoint."""
    from gram_meta.config import load_meta_config
    from gram_meta.method.checkpoint import load_meta_checkpoint
    from gram_meta.method.meta_run import BEST
    from gram_meta.method.together import MetaTrainer, open_trainer

    folder = args.out / name
    opts = [str(item) for pair in settings.items() for item in pair]
    best = folder / "meta" / BEST
    config = load_meta_config([], opts)
    if not best.exists() or not _finished(folder / "meta", config.OUTER.STEPS):
        resume = (folder / "meta" / "run.json").exists()
        inputs = args.store, args.hierarchy, folder / "meta", config
        open_trainer(MetaTrainer, *inputs, progress=False).run(resume)
    checkpoint = load_meta_checkpoint(best)
    regulate = str(checkpoint.regulator is not None)
    gram = ["TRAINER.GRAM.CHECKPOINT", str(best), "TRAINER.GRAM.REGULATE", regulate]
    scores = {
        seed: few_shot(args.root, args.dataset, "CoOpGRAM", folder / f"seed{seed}", seed, gram) for seed in args.seeds
    }
    return {"scores": scores, "held_out": checkpoint.provenance["held_out"] | {"step": checkpoint.provenance["step"]}}


def few_shot(root: str, dataset: str, trainer: str, out: Path, seed: int, opts: list[str]) -> dict:
    """Train on 16 shots of the base classes, unless the run is finished; return base and new accuracy.

    They are those before the first step (`start`) and after the last (`end`).
    """
    from gram_meta.coop.launch import train

    result = train(
        [
            *("--trainer", trainer, "--root", root, "--seed", str(seed), "--output-dir", str(out)),
            *("--config-file", CONFIG, "--dataset-config-file", dataset, "DATASET.NUM_SHOTS", "16"),
            *("DATASET.SUBSAMPLE_CLASSES", "base", "TEST.PER_EPOCH", "True", *opts),
        ],
        quiet=True,
    )
    curve, facts = result["curve"], result.get("regulator", {}).get("text", {})
    return {"start": curve[0], "end": curve[-1], "curve": curve, "regulator": facts}


def summary(name: str, scores: dict, coop: dict, held: dict) -> dict[str, object]:
    """Return one row: means over seeds; H is that of the mean base and new."""
    base, new = (mean(s["end"][side] for s in scores.values()) for side in ("base", "new"))
    start_base, start_new = (mean(s["start"][side] for s in scores.values()) for side in ("base", "new"))
    coop_base, coop_new = (mean(s["end"][side] for s in coop.values()) for side in ("base", "new"))
    row: dict[str, object] = {
        "variant": name,
        "start base / new": f"{start_base:.1f} / {start_new:.1f}",
        "base": f"{base:.2f}",
        "new": f"{new:.2f}",
        "H": f"{harmonic(base, new):.2f}",
        "H - CoOp": f"{harmonic(base, new) - harmonic(coop_base, coop_new):+.2f}",
    }
    if held:
        row |= {
            "held-out loss before -> after": f"{held['loss_before']:.3f} -> {held['loss_after']:.3f}",
            "accuracy": f"{100 * held['accuracy_before']:.1f} -> {100 * held['accuracy_after']:.1f}",
            "alignment raw, R": f"{held['alignment_raw']:.3f}, {held['alignment']:.3f}",
            "step": held["step"],
            "norm of R(g) / g": f"{mean(s['regulator'].get('mean_ratio') or 1.0 for s in scores.values()):.2f}",
            "beta / gated path": f"{mean(_share(s['regulator']) for s in scores.values()):.2f}",
        }
    return row


def _finished(folder: Path, steps: int) -> bool:
    log = folder / "log.jsonl"
    return log.exists() and any(json.loads(line)["step"] == steps for line in log.read_text().splitlines())


def _share(facts: dict) -> float:
    return facts.get("path_beta", 0.0) / facts["path_gated"] if facts.get("path_gated") else 0.0


if __name__ == "__main__":
    main()
