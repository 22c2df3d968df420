"""`gram doctor`: what this environment has and lacks, and the command that fixes it."""

import argparse
from dataclasses import asdict

from gram_meta.files import to_json

HELP = """Report what this environment has and lacks, with a command that fixes each problem. It downloads nothing.

A note is what CoOpGRAM can run without; with a problem it cannot run here, or not with the given --root, --meta or
--backbone. The command ends by training CoOpGRAM for one step on random weights. The exit status is 1 if there is a
problem, else 0.

  gram doctor --root DATA --meta output/meta --backbone ViT-B/16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--root", default="", metavar="DATA", help="folder that holds the datasets' folders")
    metas = "meta-checkpoints, or folders of them; default: output/meta"
    add("--meta", nargs="+", default=[], metavar="PATH", help=metas)
    add("--backbone", default="", metavar="NAME", help="the CLIP to use; the command loads it")
    add("--output-dir", default="output", metavar="FOLDER", help="folder for results; default: output")
    add("--verify", action="store_true", help="compare cached CLIP weights with their published SHA-256")
    add("--traceback", action="store_true", help="print the traceback of a check that raises, on stderr")
    add("--format", choices=("text", "json"), default="text", help="default: text")


def run(args: argparse.Namespace) -> int:
    from gram_meta.tools.doctor import Environment, as_text, can_run, examine

    checks = examine(Environment(args.root, args.meta, args.backbone, args.output_dir, args.verify, args.traceback))
    if args.format == "json":
        value = {"can_run": can_run(checks), "checks": [asdict(check) for check in checks]}
        print(to_json(value, "--format json", indent=2))
    else:
        print(as_text(checks))
    return 0 if can_run(checks) else 1
