"""`gram eval-meta`: adaptation on held-out tasks."""

import argparse

from gram_meta.commands.lists import give_back_options
from gram_meta.errors import GramError
from gram_meta.files import to_json

HELP = """Adapt to held-out tasks from theta* and from the initialisation of meta-training, with R on and off, and score
their query sets. This takes minutes and shows whether hours of few-shot training are worth it.

"R off, same length" scales each raw gradient to the length of the regulated one: its difference from "R on" is the
effect of R's direction. "R's mean" fixes gamma and beta at their means over other tasks: its difference from "R on" is
the effect of R's dependence on the gradient. "theta* moved by the mean beta" starts where the constant part of R leads.
With the hierarchy of the meta-training, tasks come from its held-out topics.

  gram eval-meta meta/best.safetensors --store STORE --hierarchy HIERARCHY
  gram eval-meta meta/best.safetensors --store STORE --hierarchy HIERARCHY --steps 0 1 10 TASKS.WAYS 10
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a meta-checkpoint, from `gram pretrain`")
    add("--store", required=True, help="pair store, from `gram embed`")
    add("--hierarchy", required=True, help="hierarchy, from `gram cluster`")
    add("--tasks", type=int, default=100, help="how many tasks; default: 100")
    add("--steps", nargs="+", default=["0", "1", "5", "20"], help="inner steps before scoring; default: 0 1 5 20")
    add("--seed", type=int, default=1000, help="of the tasks; default: 1000")
    add("--device", default="", help="cpu, cuda, ...; default: cuda where there is one")
    add("--json", action="store_true", help="print everything as JSON, unrounded")
    add("opts", nargs="*", metavar="KEY VALUE", help="settings that replace the meta-training's")


def run(args: argparse.Namespace) -> int:
    give_back_options(args, "steps")
    if bad := [word for word in args.steps if not word.isdecimal()]:
        raise GramError(f"--steps: expected numbers from 0 on, found {bad[0]!r}")

    from gram_meta import api

    steps = [int(word) for word in args.steps]
    drawn = {"tasks": args.tasks, "steps": steps, "seed": args.seed}
    result = api.evaluate(args.checkpoint, args.store, args.hierarchy, **drawn, opts=args.opts, device=args.device)
    print(to_json(result.as_dict(), "--json", indent=2) if args.json else result)
    return 0
