"""`gram estimate`: time, memory and disk of the path to a table, on this machine or a named GPU."""

import argparse
from dataclasses import asdict

HELP = """Estimate what a corpus costs on this machine: time, memory and disk of `gram embed`, `gram cluster`, `gram
pretrain` and the protocols.

The command measures for about a minute: images decoded a second, passes of the towers, a meta-step of each kind of
prompt. `measured` rests on these rates alone, `formula` also on arithmetic over sizes, `assumption` on a measurement of
another machine, or on several processes being as many times faster.

With --card the estimate is for a GPU that is not here: published peaks and the efficiency measured on an H200. It can
be wrong by a factor of two.

  gram estimate --pairs 3000000 --backbone ViT-B/16 --prompts text visual
  gram estimate --corpus cc3m --card "RTX 4090" --precision bf16 --prompts text visual
  gram estimate --pairs 3000000 --backbone random-ViT-B/16            # no download: random weights take as long
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    size, where = parser.add_mutually_exclusive_group(required=True), parser.add_mutually_exclusive_group()
    size.add_argument("--pairs", type=int, metavar="N", help="image-text pairs of the corpus")
    known = "the corpus: a path, as for gram embed, or cc3m, cc12m, coco, flickr30k"
    size.add_argument("--corpus", metavar="PATH|NAME", help=known)
    add("--backbone", metavar="NAME", default="random-ViT-B/16", help="the CLIP (default: %(default)s)")
    add("--precision", default="fp32", help="of its towers (default: %(default)s)")
    kinds = "text, visual, joint or conditional (default: text)"
    add("--prompts", nargs="+", default=["text"], metavar="KIND", help=f"kinds of prompt to meta-train: {kinds}")
    add("--config", default="", metavar="SUFFIX", help="of the meta configs, such as vit_l14; default: the CLIP's")
    where.add_argument("--device", default="", help="cpu, cuda, ...; default: cuda where there is one")
    where.add_argument("--card", metavar="NAME", help="a GPU that is not here: H100, A100, 'RTX 4090', T4, ...")
    add("--json", action="store_true", help="print everything as JSON, unrounded")
    add("opts", nargs="*", metavar="KEY VALUE", help="settings of meta-training")


def run(args: argparse.Namespace) -> int:
    from tabulate import tabulate

    from gram_meta.backbone.clip import load_backbone
    from gram_meta.commands.lists import give_back_options
    from gram_meta.files import to_json
    from gram_meta.processes import ALONE, device_for
    from gram_meta.tools.cards import find_card
    from gram_meta.tools.estimate import estimate, read_corpus

    give_back_options(args, "prompts")
    card = None if args.card is None else find_card(args.card, args.precision)
    pairs, images = (args.pairs, []) if args.corpus is None else read_corpus(args.corpus)
    backbone = load_backbone(args.backbone, "cpu" if card else device_for(ALONE, args.device), args.precision)
    rates, rows = estimate(backbone, pairs, args.prompts, config=args.config, opts=args.opts, images=images, card=card)
    device = card.name if card else str(backbone.device)
    if args.json:
        facts = {"corpus": args.corpus, "backbone": backbone.name, "precision": backbone.precision, "device": device}
        value = {"pairs": pairs, **facts, "rates": asdict(rates), "rows": [asdict(row) for row in rows]}
        print(to_json(value, "--json", indent=2))
        return 0
    corpus = f"{args.corpus}: " if args.corpus else ""
    print(f"{corpus}{pairs:,} pairs, {backbone.name} in {backbone.precision} on {device}\n")
    cells = [(row.step, row.what, str(row), row.origin, row.how) for row in rows]
    print(tabulate(cells, ("step", "what", "about", "origin", "from"), disable_numparse=True))
    return 0
