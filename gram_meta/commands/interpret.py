"""`gram interpret`: the words nearest to learned context tokens."""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import asdict, astuple, fields
from itertools import groupby
from typing import TYPE_CHECKING

from gram_meta.files import to_json

if TYPE_CHECKING:
    from gram_meta.tools.interpret import Interpretation

HELP = """The vocabulary words nearest to each learned context token, by Euclidean distance on CLIP's token embedding:
what CoOp's interpret_prompt.py prints, for any backbone, with a context per class too.

  gram interpret output/pets/CoOpGRAM/seed1                          a run of ours or of a CoOp checkout
  gram interpret output/.../prompt_learner/model.pth.tar-50 --backbone ViT-B/16
  gram interpret meta/best.safetensors --topk 10 --format csv"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    source = "output folder, checkpoint file, or meta-checkpoint (.safetensors)"
    add("source", metavar="RUN|CHECKPOINT", help=source)
    add("--topk", type=int, default=5, help="words per context token; default: 5")
    backbone = "CLIP that the prompt was learned with: a name, file or folder; default: the run's"
    add("--backbone", default="", help=backbone)
    add("--load-epoch", type=int, help="of a run's checkpoints; default: the one it is tested with")
    unrounded = "default: text; json and csv have the distances unrounded"
    add("--format", choices=("text", "json", "csv"), default="text", help=unrounded)


def run(args: argparse.Namespace) -> int:
    from gram_meta.tools.interpret import interpret

    found = interpret(args.source, args.topk, args.backbone, args.load_epoch)
    {"text": _print_text, "json": _print_json, "csv": _print_csv}[args.format](found)
    return 0


def _print_text(found: Interpretation) -> None:
    """Print a line per context token, with CoOp's pieces: `</w>` ends a word."""
    prompt = found.saved
    whose = ", ".join(filter(None, [prompt.trainer, f"epoch {prompt.epoch}" if prompt.epoch else ""]))
    print(f"{prompt.path}{f' ({whose})' if whose else ''}: words of {found.backbone}")
    for (index, classname, token), near in groupby(found.words, lambda it: (it.class_index, it.classname, it.token)):
        if index is not None and token == 1:
            print(f"class {index}{f' ({classname})' if classname else ''}")
        print(f"{token}: {'  '.join(f'{it.piece} {it.distance:.4f}' for it in near)}")
    for remark in found.remarks:
        print(f"Note: {remark}")


def _print_json(found: Interpretation) -> None:
    prompt = found.saved
    facts = {
        "source": str(prompt.path),
        "trainer": prompt.trainer,
        "epoch": prompt.epoch,
        "backbone": found.backbone,
        "shape": list(found.context.shape),
        "words": [asdict(word) for word in found.words],
        "notes": found.remarks,
    }
    print(to_json(facts, "--format json", indent=2))


def _print_csv(found: Interpretation) -> None:
    from gram_meta.tools.interpret import NearWord

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([it.name for it in fields(NearWord)])
    writer.writerows(map(astuple, found.words))
    for remark in found.remarks:
        print(f"Note: {remark}", file=sys.stderr)
