"""`gram eval-meta`: adaptation on held-out tasks."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gram_meta.method.evaluation import Adaptation

HELP = """Adapt to tasks that meta-training has not seen, from theta* and from where meta-training started, with R on and
off, and score their query sets: minutes that say whether hours downstream are worth it.

"R off, same length" stretches each raw gradient to the length of the regulated one: what it lacks against "R on" is the
direction that R gives. With the hierarchy of the meta-training, tasks come from the topics it held out.

  gram eval-meta meta/best.safetensors --store STORE --hierarchy HIERARCHY
  gram eval-meta meta/best.safetensors --store STORE --hierarchy HIERARCHY --steps 0 1 10 TASKS.WAYS 10
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a meta-checkpoint, from `gram pretrain`")
    parser.add_argument("--store", required=True, help="pair store, from `gram embed`")
    parser.add_argument("--hierarchy", required=True, help="hierarchy, from `gram cluster`")
    parser.add_argument("--tasks", type=int, default=100, help="how many tasks; default: 100")
    parser.add_argument(
        "--steps", nargs="+", default=["0", "1", "5", "20"], help="inner steps to look after; default: 0 1 5 20"
    )
    parser.add_argument("--seed", type=int, default=1000, help="of the tasks; default: 1000")
    parser.add_argument("--device", default="", help="cpu, cuda, ...; default: cuda where there is one")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, unrounded")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings that replace the meta-training's")


def run(args: argparse.Namespace) -> int:
    import json

    from gram_meta.commands.lists import give_back_options
    from gram_meta.errors import GramError

    give_back_options(args, "steps")
    if bad := [word for word in args.steps if not word.isdecimal()]:
        raise GramError(f"--steps: expected numbers from 0 on, found {bad[0]!r}")

    import torch

    from gram_meta.clustering.hierarchy import Hierarchy
    from gram_meta.corpus.store import PairStore
    from gram_meta.method.checkpoint import load_meta_checkpoint
    from gram_meta.method.evaluation import evaluate_adaptation

    result = evaluate_adaptation(
        load_meta_checkpoint(args.checkpoint),
        PairStore.open(args.store),
        Hierarchy.open(args.hierarchy),
        args.tasks,
        [int(word) for word in args.steps],
        args.seed,
        args.opts,
        args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    print(json.dumps(result.as_dict(), indent=2) if args.json else _table(result))
    return 0


def _table(result: Adaptation) -> str:
    from tabulate import tabulate

    steps = [cell.steps for cell in result.lines[0].cells]
    rows = [
        [line.start, line.gradient, *(_text(c.accuracy, c.accuracy_half_width, 1) for c in line.cells)]
        + [_text(c.loss, c.loss_half_width, 3) for c in line.cells]
        for line in result.lines
    ]
    headers = ["start", "gradient", *(f"acc. {s}" for s in steps), *(f"loss {s}" for s in steps)]
    aligned = ", ".join(f"{name} {value:.3f}" for name, value in result.alignment.items())
    return "\n".join(
        [
            tabulate(rows, headers, disable_numparse=True),
            "",
            f"{result.tasks} {result.ways}-way tasks from {result.topics}; query accuracy (percent) and loss after so many "
            f"inner steps of size {result.alpha:g}; ± is the 95 % interval over tasks (Student's t).",
            *([f"Inner product with the query gradient at theta* (Fig. 3b): {aligned}."] if aligned else []),
        ]
    )


def _text(mean: float, half_width: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + (f" ± {half_width:.{digits}f}" if half_width is not None else "")
