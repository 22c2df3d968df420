"""Compare settings of meta-training on one dataset: how docs/results/emoji-world.md chose what `gram demo` uses.

    python scripts/experiments/meta_grid.py --store STORE --root DATA --dataset emoji_animals \\
        --grid scripts/experiments/emoji.yaml --out output/grid --seeds 1 2 3 --meta-seeds 1 2 3 --jobs 2

The grid is a YAML file: a name for each variant, HIERARCHY, and KEY: VALUE settings of `gram_meta.config` that differ
from `base`. The script meta-trains each variant with each meta-seed, all meta-seeds at once. Then it trains CoOpGRAM
from them: with theta* and R ("R on"), with theta* and raw gradients ("R off"), and with R from CoOp's own words ("R
from words"). It compares base and new accuracy with CoOp's from the same few-shot seeds. The script skips finished
parts, prints a Markdown table and writes grid.json.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import yaml
from tabulate import tabulate

from gram_meta.intervals import half_width, harmonic, mean

CONFIG = "gram_small_c4_ep10_batch32_ctxv1"
CONTROLS = {"R on": [], "R off": ["TRAINER.GRAM.REGULATE", "False"], "R from words": ["TRAINER.GRAM.INIT", "False"]}
Curves = dict[int, list[dict]]  # by few-shot seed: accuracies before the first step and after the last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--root", required=True, help="folder of the downstream datasets")
    parser.add_argument("--dataset", required=True, help="config name of the dataset to tune on")
    parser.add_argument("--grid", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--meta-seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--only", nargs="+", help="variants to run; default: all in the grid")
    args = parser.parse_args()

    grid = yaml.safe_load(args.grid.read_text())
    base = grid.pop("base", {})
    variants = {name: {**base, **(grid[name] or {})} for name in args.only or grid}
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers import torch
    with ProcessPoolExecutor(args.jobs) as pool:
        coop = _all_seeds(pool, args, "CoOp", args.out / "coop", [])
        meta = {name: pool.submit(meta_train, args, name, variants[name]) for name in variants}
        runs = {name: _downstream(pool, args, name, meta[name].result()) for name in variants}
        plain = _results(coop)
        rows = [{"variant": "CoOp", **_means([_ends(plain)])}]
        record = {"settings": variants, "coop": plain, "rows": {}}
        for name, controls in runs.items():
            record["rows"][name] = {key: {m: _results(c) for m, c in by.items()} for key, by in controls.items()}
            record["rows"][name]["held_out"] = {m: each["held_out"] for m, each in meta[name].result().items()}
            rows += [
                summary(f"{name}, {key}", by, plain, record["rows"][name]["held_out"])
                for key, by in record["rows"][name].items()
                if key in CONTROLS
            ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "grid.json").write_text(json.dumps(record, indent=2))
    print(tabulate(rows, "keys", "pipe", disable_numparse=True))


def meta_train(args: argparse.Namespace, name: str, settings: dict[str, object]) -> dict[int, dict]:
    """Meta-train a variant with every meta-seed; return the path and the held-out facts of each best checkpoint."""
    from gram_meta.config import load_meta_config
    from gram_meta.method.checkpoint import load_meta_checkpoint
    from gram_meta.method.meta_run import BEST
    from gram_meta.method.together import open_trainers

    opts = [str(item) for key, value in settings.items() if key != "HIERARCHY" for item in (key, value)]
    config = load_meta_config([], [*opts, "SEEDS", str(tuple(args.meta_seeds))])
    folders = {seed: args.out / name / "meta" / f"seed{seed}" for seed in args.meta_seeds}
    if not all(_finished(folder, config.OUTER.STEPS) for folder in folders.values()):
        resume = all((folder / "run.json").exists() for folder in folders.values())
        open_trainers(args.store, settings["HIERARCHY"], args.out / name / "meta", config, progress=False).run(resume)
    found = {}
    for seed, folder in folders.items():
        facts = load_meta_checkpoint(folder / BEST).provenance
        held = facts["held_out"] | {"step": facts["step"]}
        found[seed] = {"path": str(folder / BEST), "held_out": held, "regulated": config.REGULATOR.ENABLED}
    return found


def few_shot(root: str, dataset: str, trainer: str, out: Path, seed: int, opts: list[str]) -> dict:
    """Train on 16 shots of the base classes, unless the run is finished; return `curve`, accuracies by step."""
    from gram_meta.coop.launch import train

    if not {"TEST.AT_STEPS", "TEST.PER_EPOCH"} & set(opts):
        opts = ["TEST.AT_STEPS", "(0,90)", *opts]  # 90: ten epochs of 18 classes
    result = train(
        [
            *("--trainer", trainer, "--root", root, "--seed", str(seed), "--output-dir", str(out)),
            *("--config-file", CONFIG, "--dataset-config-file", dataset, "DATASET.NUM_SHOTS", "16"),
            *("DATASET.SUBSAMPLE_CLASSES", "base", *opts),
        ],
        quiet=True,
    )
    return {"curve": result["curve"], "regulator": result.get("regulator", {}).get("text", {})}


def summary(name: str, scores: dict[int, Curves], coop: Curves, held: dict[int, dict]) -> dict[str, object]:
    """Return one row: means over meta-seeds and few-shot seeds, and the interval of H - CoOp over meta-seeds."""
    mean_of = lambda key: mean(each[key] for each in held.values())  # noqa: E731
    ends = [_ends(curves) for curves in scores.values()]
    gains = [harmonic(*end) - harmonic(*_ends(coop)) for end in ends]
    half = half_width(gains)
    return {
        "variant": name,
        **_means(ends, [_ends(curves, 0) for curves in scores.values()]),
        "H - CoOp": f"{mean(gains):+.2f}" + (f" ± {half:.2f}" if half else ""),
        "each meta-seed": ", ".join(f"{gain:+.1f}" for gain in gains),
        "held-out loss": f"{mean_of('loss_before'):.3f} -> {mean_of('loss_after'):.3f}",
        "alignment raw, R": f"{mean_of('alignment_raw'):.3f}, {mean_of('alignment'):.3f}",
        "step": ", ".join(str(each["step"]) for each in held.values()),
    }


def _all_seeds(
    pool: ProcessPoolExecutor, args: argparse.Namespace, trainer: str, folder: Path, opts: list[str]
) -> dict[int, Future]:
    return {
        seed: pool.submit(few_shot, args.root, args.dataset, trainer, folder / f"seed{seed}", seed, opts)
        for seed in args.seeds
    }


def _downstream(
    pool: ProcessPoolExecutor, args: argparse.Namespace, name: str, meta: dict[int, dict]
) -> dict[str, dict[int, dict[int, Future]]]:
    """Return the runs by control, meta-seed and few-shot seed."""
    regulated = all(each["regulated"] for each in meta.values())
    return {
        control: {
            number: _all_seeds(
                pool,
                args,
                "CoOpGRAM",
                args.out / name / control.replace(" ", "_") / f"meta{number}",
                ["TRAINER.GRAM.CHECKPOINT", each["path"], *opts],
            )
            for number, each in meta.items()
        }
        for control, opts in CONTROLS.items()
        if regulated or control == "R off"
    }


def _results(futures: dict[int, Future]) -> Curves:
    return {seed: future.result()["curve"] for seed, future in futures.items()}


def _ends(curves: Curves, at: int = -1) -> tuple[float, float]:
    return mean(c[at]["base"] for c in curves.values()), mean(c[at]["new"] for c in curves.values())


def _means(ends: list[tuple[float, float]], starts: list[tuple[float, float]] | None = None) -> dict[str, str]:
    base, new = (mean(end[side] for end in ends) for side in (0, 1))
    row = {"start base / new": " / ".join(f"{mean(s[side] for s in starts):.1f}" for side in (0, 1))} if starts else {}
    return row | {"base": f"{base:.2f}", "new": f"{new:.2f}", "H": f"{harmonic(base, new):.2f}"}


def _finished(folder: Path, steps: int) -> bool:
    log = folder / "log.jsonl"
    return log.exists() and any(json.loads(line)["step"] == steps for line in log.read_text().splitlines())


if __name__ == "__main__":
    main()
