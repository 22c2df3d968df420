"""`gram estimate`: time, memory and disk of the path to a table, on this machine."""

import argparse
from dataclasses import asdict

HELP = """Estimate what a corpus costs on this machine: time, memory and disk of `gram embed`, `gram cluster`, `gram
pretrain` and the protocols.

The command measures for about a minute: images decoded a second, passes of the towers, a meta-step of each kind of
prompt. `measured` rests on these rates alone, `formula` also on arithmetic over sizes, `assumption` on a measurement of
another machine, or on several processes being as many times faster.

  gram estimate --pairs 3000000 --backbone ViT-B/16 --prompts text visual
  gram estimate --pairs 3000000 --backbone random-ViT-B/16            # no download: random weights take as long
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pairs", type=int, required=True, metavar="N", help="image-text pairs of the corpus")
    add("--backbone", metavar="NAME", default="random-ViT-B/16", help="the CLIP (default: %(default)s)")
    add("--precision", default="fp32", help="of its towers (default: %(default)s)")
    kinds = "text, visual, joint or conditional (default: text)"
    add("--prompts", nargs="+", default=["text"], metavar="KIND", help=f"kinds of prompt to meta-train: {kinds}")
    add("--config", default="", metavar="SUFFIX", help="of the meta configs, such as vit_l14; default: the CLIP's")
    add("--device", default="", help="cpu, cuda, ...; default: cuda where there is one")
    add("--json", action="store_true", help="print everything as JSON, unrounded")
    add("opts", nargs="*", metavar="KEY VALUE", help="settings of meta-training")


def run(args: argparse.Namespace) -> int:
    from tabulate import tabulate

    from gram_meta.backbone.clip import load_backbone
    from gram_meta.commands.lists import give_back_options
    from gram_meta.files import to_json
    from gram_meta.processes import ALONE, device_for
    from gram_meta.tools.estimate import estimate

    give_back_options(args, "prompts")
    backbone = load_backbone(args.backbone, device_for(ALONE, args.device), args.precision)
    rates, rows = estimate(backbone, args.pairs, args.prompts, config=args.config, opts=args.opts)
    if args.json:
        facts = {"backbone": backbone.name, "precision": backbone.precision, "device": str(backbone.device)}
        value = {"pairs": args.pairs, **facts, "rates": asdict(rates), "rows": [asdict(row) for row in rows]}
        print(to_json(value, "--json", indent=2))
        return 0
    print(f"{args.pairs:,} pairs, {backbone.name} in {backbone.precision} on {backbone.device}\n")
    cells = [(row.step, row.what, str(row), row.origin, row.how) for row in rows]
    print(tabulate(cells, ("step", "what", "about", "origin", "from"), disable_numparse=True))
    return 0
