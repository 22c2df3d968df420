"""`gram interpret`: the words nearest to learned context tokens."""

from __future__ import annotations

import argparse
import csv
import sys
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
    """Options of the command."""
    parser.add_argument(
        "source", metavar="RUN|CHECKPOINT", help="output folder, checkpoint file, or meta-checkpoint (.safetensors)"
    )
    parser.add_argument("--topk", type=int, default=5, help="words per context token; default: 5")
    parser.add_argument(
        "--backbone",
        default="",
        help="CLIP that the prompt was learned with: a name, file or folder; default: as its run says",
    )
    parser.add_argument("--load-epoch", type=int, help="of a run's checkpoints; default: the one it is tested with")
    parser.add_argument(
        "--format",
        choices=("text", "json", "csv"),
        default="text",
        help="default: text; json and csv have the distances unrounded",
    )


def run(args: argparse.Namespace) -> int:
    """Print the words."""
    from gram_meta.tools.interpret import interpret

    found = interpret(args.source, args.topk, args.backbone, args.load_epoch)
    {"text": _print_text, "json": _print_json, "csv": _print_csv}[args.format](found)
    return 0


_COLUMNS = ("class_index", "classname", "token", "rank", "word", "piece", "id", "distance")


def _print_text(found: Interpretation) -> None:
    """A line per context token, with CoOp's pieces: `</w>` ends a word."""
    prompt = found.saved
    whose = ", ".join(filter(None, [prompt.trainer, f"epoch {prompt.epoch}" if prompt.epoch else ""]))
    print(f"{prompt.path}{f' ({whose})' if whose else ''}: words of {found.backbone}")
    place = None
    for word in found.words:
        if word.rank == 1 and word.class_index is not None and word.token == 1:
            print(f"class {word.class_index}{f' ({word.classname})' if word.classname else ''}")
        if (word.class_index, word.token) != place:
            place = (word.class_index, word.token)
            near = [it for it in found.words if (it.class_index, it.token) == place]
            print(f"{word.token}: {'  '.join(f'{it.piece} {it.distance:.4f}' for it in near)}")
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
        "words": [{name: getattr(word, name) for name in _COLUMNS} for word in found.words],
        "notes": found.remarks,
    }
    print(to_json(facts, "--format json", indent=2))


def _print_csv(found: Interpretation) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for word in found.words:
        index = "" if word.class_index is None else word.class_index
        writer.writerow([index, *(getattr(word, name) for name in _COLUMNS[1:])])
    for remark in found.remarks:
        print(f"Note: {remark}", file=sys.stderr)
