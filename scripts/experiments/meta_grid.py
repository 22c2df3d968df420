"""Compare settings of meta-training on one dataset: how docs/results/emoji-world.md chose what `gram demo` uses.

    python scripts/experiments/meta_grid.py --store STORE --hierarchy HIERARCHY --out output/grid

The grid is a YAML file; default: emoji_grid.yaml. The script meta-trains each variant with every meta-seed, all of them
at once. Then it adapts from the meta-checkpoints to the few-shot datasets, with R and with the controls of `controls`,
and compares accuracies with CoOp's. It goes on with what is there, prints a table and writes grid.json, which
`claims.py` reads as docs/results/controls.json.
"""

import argparse
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from few_shot_batch import STEPS, Regulate, Scores, adapt, record, test_set
from tabulate import tabulate
from torch import Tensor
from tries import trying

from gram_meta import load_backbone
from gram_meta.clustering.hierarchy import Hierarchy
from gram_meta.config import load_meta_config, stored_config
from gram_meta.corpus.store import PairStore
from gram_meta.demo.world import SPECS, write_dataset
from gram_meta.files import write_json
from gram_meta.intervals import half_width, harmonic, mean
from gram_meta.method.adaptation import mean_gates
from gram_meta.method.bilevel import InnerLoop
from gram_meta.method.checkpoint import load_meta_checkpoint
from gram_meta.method.episodes import Episodes
from gram_meta.method.prompts import context_from_words
from gram_meta.method.tasks import TaskConfig, TaskSampler
from gram_meta.method.together import SeedsTrainer, open_trainer

# What settings are chosen on: animals in their own look and in those of other datasets, so that no reported class plays
# a part
TUNING = {
    "animals": SPECS["animals"],
    "animals_as_food": replace(SPECS["animals"], look=SPECS["food"].look),
    "animals_as_objects": replace(SPECS["animals"], look=SPECS["objects"].look),
}
SETS = {**SPECS, **TUNING}
TASKS = 32  # of held-out topics, for the means of gamma and beta
COOP = "CoOp"
TRY = "TRY"  # key of a variant that needs more than settings
CONTROLS = (
    *("R on", "R off", "R off, same length", "R's mean", "R without beta", "theta* moved"),
    "R from CoOp's words",
)
Key = tuple[str, str, int]  # variant, control, meta-seed


def grid_parser(text: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of scripts that run a grid."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--hierarchy", required=True)
    parser.add_argument("--grid", type=Path, default=Path(__file__).with_name("emoji_grid.yaml"))
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--meta-seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", help="variants to run; default: all in the grid")
    return parser


def add_controls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--controls", nargs="+", choices=CONTROLS, default=CONTROLS, help="default: all")


def variants_of(args: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Return the settings of each variant of the grid, or of those of --only."""
    grid = yaml.safe_load(args.grid.read_text())
    base = grid.pop("base", {})
    return {name: {**base, **(grid[name] or {})} for name in args.only or grid}


def main() -> None:
    parser = grid_parser(__doc__)
    add_controls(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--sets", nargs="+", default=list(TUNING), choices=list(SETS), help="few-shot datasets")
    args = parser.parse_args()

    torch.set_num_threads(1)  # faster than two, at this size
    variants = variants_of(args)
    words = context_from_words(load_backbone("gram-small"), "a photo of a")
    starts: dict[Key, tuple[Tensor, Regulate | None]] = {(COOP, COOP, 0): (words, None)}
    held = {}
    for name, settings in variants.items():
        paths = meta_train(args, name, settings)
        held[name] = [load_meta_checkpoint(path).provenance["held_out"] for path in paths.values()]
        for seed, path in paths.items():
            for control, start in controls(path, args.store, args.hierarchy, words, args.controls).items():
                starts[name, control, seed] = start
    of_seeds = {name: few_shot_runs(args, name, starts) for name in args.sets}
    found = {name: {key: [scores[key] for scores in runs] for key in starts} for name, runs in of_seeds.items()}
    rows = [summary(name, control, found, held.get(name, [])) for name, control in dict.fromkeys(k[:2] for k in starts)]
    write_json(args.out / "grid.json", {"settings": variants, "seeds": len(args.seeds), "runs": ends_of(found)})
    print(tabulate(rows, "keys", "pipe", disable_numparse=True))


def meta_train(args: argparse.Namespace, name: str, settings: dict[str, object]) -> dict[int, Path]:
    """Meta-train a variant with every meta-seed, or go on; return the paths of the best checkpoints."""
    opts = [str(item) for key, value in settings.items() if key != TRY for item in (key, value)]
    config = load_meta_config([], [*opts, "SEEDS", str(tuple(args.meta_seeds))])
    out = args.out / name / "meta"
    with trying(settings.get(TRY)):
        paths = open_trainer(SeedsTrainer, args.store, args.hierarchy, out, config, progress=False).run(resume=True)
    return dict(zip(args.meta_seeds, paths, strict=True))


def controls(
    path: Path, store: str, hierarchy: str, words: Tensor, wanted: Collection[str]
) -> dict[str, tuple[Tensor, Regulate | None]]:
    """Return what to start from and what gradients pass through, for the `wanted` of `CONTROLS`.

    "R off, same length" scales each raw gradient to the length that R gives it. "R's mean" has constant gamma and beta,
    their means over tasks of held-out topics at theta*; "moved" has theta* moved by the mean beta along the path of the
    inner loop, and raw gradients.
    """
    checkpoint = load_meta_checkpoint(path)
    theta, regulator = checkpoint.prompts["text"], checkpoint.regulator
    if regulator is None:
        return {"R off": (theta, None)} if "R off" in wanted else {}
    config, opened = stored_config(checkpoint.config, []), Hierarchy.open(hierarchy)
    backbone, inner = load_backbone("gram-small"), InnerLoop.from_config(config)
    held, pairs = checkpoint.provenance["held_out_topics"], PairStore.open(store)
    sampler = TaskSampler(opened, TaskConfig.from_config(config), 1000, held, features=pairs.image_features)
    episodes = Episodes.from_config(backbone, pairs, [t.word for t in opened.topics], config)
    gamma, beta = mean_gates(regulator, checkpoint.prompts, episodes, sampler.draw_batch(0, TASKS), inner)["text"]

    def regulate(raw: Tensor) -> Tensor:
        return regulator.parts("text", raw).regulated

    known = {
        "R on": (theta, regulate),
        "R off": (theta, None),
        "R off, same length": (theta, lambda raw: raw * regulate(raw).norm() / raw.norm().clamp_min(1e-12)),
        "R's mean": (theta, lambda raw: gamma * raw + beta),
        "R without beta": (theta, lambda raw: regulator.parts("text", raw).gated),
        "theta* moved": (theta - inner.path * beta, None),
        "R from CoOp's words": (words, regulate),
    }
    return {control: start for control, start in known.items() if control in wanted}


def few_shot_runs(
    args: argparse.Namespace, name: str, starts: dict[Any, tuple], epochs: int = 10, at: Collection[int] = (0, STEPS)
) -> list[dict[Any, Scores]]:
    """Return the accuracies of each start on a dataset after these numbers of steps, for each few-shot seed."""
    root, spec = args.out / "sets" / name, SETS[name]
    write_dataset(root / spec.folder, spec, progress=False)
    test = test_set(str(root), spec.folder)
    return [adapt(record(str(root), spec.folder, seed, epochs), test, starts, at) for seed in args.seeds]


def ends_of(found: dict[str, dict[Key, list[Scores]]]) -> list[dict[str, object]]:
    """Return base and new accuracy at the end, of each dataset, variant, control and meta-seed (0: none)."""
    return [
        {"dataset": name, "variant": key[0], "control": key[1], "meta": key[2]}
        | {side: round(mean(one[STEPS][index] for one in scores), 3) for index, side in enumerate(("base", "new"))}
        for name, runs in found.items()
        for key, scores in runs.items()
    ]


def summary(
    name: str, control: str, found: dict[str, dict[Key, list[Scores]]], held: list[dict[str, float]]
) -> dict[str, str]:
    """Return one row: means over datasets, meta-seeds and few-shot seeds; intervals over meta-seeds."""

    def ends(key: Key, step: int = STEPS) -> list[tuple[float, float]]:  # of each dataset
        return [tuple(mean(one[step][side] for one in runs[key]) for side in (0, 1)) for runs in found.values()]

    keys = [key for key in next(iter(found.values())) if key[:2] == (name, control)]
    every = [end for key in keys for end in ends(key)]
    before = [end for key in keys for end in ends(key, 0)]
    row = {"variant": name, "gradient": control}
    row["start base / new"] = " / ".join(f"{mean(end[side] for end in before):.1f}" for side in (0, 1))
    row |= {side: f"{mean(end[index] for end in every):.2f}" for index, side in enumerate(("base", "new"))}
    gains = [
        [harmonic(*end) - harmonic(*plain) for end, plain in zip(ends(key), ends((COOP, COOP, 0)), strict=True)]
        for key in keys
    ]
    if name == COOP:
        return row
    row["H - CoOp"] = with_interval([mean(gain) for gain in gains])
    row["of each dataset"] = ", ".join(f"{mean(gain):+.1f}" for gain in zip(*gains, strict=True))
    row["of each meta-seed"] = ", ".join(f"{mean(gain):+.1f}" for gain in gains)
    row["held-out loss"] = " -> ".join(f"{mean(one[key] for one in held):.2f}" for key in ("loss_before", "loss_after"))
    return row


def with_interval(values: Sequence[float]) -> str:
    """Return the mean of a value for each meta-seed, with its 95 % interval."""
    half = half_width(values)
    return f"{mean(values):+.2f}" + (f" ± {half:.2f}" if half is not None else "")


if __name__ == "__main__":
    main()
