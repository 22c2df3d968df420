"""The command `gram`."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from gram_meta import __version__
from gram_meta.coop import checkout
from gram_meta.errors import exit_status
from gram_meta.files import expand_home

COMMANDS = {
    "embed": "turn image-text pairs into a store of features",
    "cluster": "organise a store into topics and visual domains (CHC, Sec. 3.2)",
    "inspect": "look at a hierarchy: topics, words, domains, sizes",
    "check-overlap": "near-duplicates between a corpus and the test images of datasets",
    "pretrain": "meta-learn a prompt and a gradient regulator from a hierarchy (Algorithm 1)",
    "eval-meta": "what a meta-checkpoint's adaptation does on held-out tasks, R on and off",
    "check-data": "which datasets are under a folder, what is missing or wrong, and where to get it",
    "train": "train or evaluate a trainer on a dataset: CoOp's train.py",
    "bench": "many trainers, datasets and seeds over a protocol, resumable",
    "report": "the paper's tables and figures from output folders",
    "predict": "classes of your own images, with the prompts of a run",
    "interpret": "the words nearest to learned context tokens",
    "export": "a meta-checkpoint's prompt as a checkpoint that CoOp's trainers start from",
    "estimate": "time, memory and disk of the path to a table, on this machine",
    "doctor": "what this environment has and lacks, and the command that fixes it",
    "demo": "the whole path on the emoji world, ending in a table",
}

EPILOG = """the path:  gram embed SOURCE -o STORE  ->  gram cluster STORE -o HIERARCHY  ->  gram pretrain ... -o META
           ->  gram train --trainer CoOpGRAM ... TRAINER.GRAM.CHECKPOINT META/best.safetensors  ->  gram report OUTPUT

`gram COMMAND --help` describes each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 fine, 1 failed, 2 bad input, 130 interrupted)."""
    typed = argv is None
    argv = expand_home(list(sys.argv[1:] if argv is None else argv))
    if typed and argv[:1] == ["train"] and (script := checkout.train_py_for(argv[1:])):
        return exit_status("gram train", lambda: checkout.run(script, argv[1:]))
    parser = argparse.ArgumentParser(
        prog="gram",
        description="Gradient-Regulated Meta-Prompt Learning (ICCV 2023) for CLIP prompt tuning.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gram-meta {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        subparser = commands.add_parser(name, help=summary, description=summary, add_help=name != "train")
        if name == chosen:  # the others need no more than their line in the list
            module = importlib.import_module(f"gram_meta.commands.{name.replace('-', '_')}")
            subparser.description = module.HELP
            subparser.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "opts") and not any(word.startswith("--") for word in rest):
        args.opts += rest  # KEY VALUE after options: argparse closes its list of positionals at the first option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command is None:
        parser.print_help()
        return 2
    args.argv = argv
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return exit_status(f"gram {args.command}", lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
