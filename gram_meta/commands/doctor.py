"""`gram doctor`: what this environment has and lacks, and the command that mends it."""

from __future__ import annotations

import argparse

HELP = """Say what this environment has and lacks, and the command that mends it. Nothing is changed or downloaded.

  fine     as it should be
  note     something is missing that CoOpGRAM can run without
  problem  CoOpGRAM cannot run here, or not as asked with --root, --meta, --backbone

It ends by training CoOpGRAM for one step on random weights in a temporary folder. The exit status is 0 only if CoOpGRAM
can run, else 1.

  gram doctor
  gram doctor --root DATA --meta output/meta --backbone ViT-B/16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--root", default="", metavar="DATA", help="folder that holds the datasets' folders")
    add(
        "--meta",
        nargs="+",
        default=[],
        metavar="PATH",
        help="meta-checkpoints, or folders of them; default: output/meta",
    )
    add("--backbone", default="", metavar="NAME", help="the CLIP that is to be used; it is loaded")
    add("--output-dir", default="output", metavar="FOLDER", help="where results are to go; default: output")
    add("--verify", action="store_true", help="compare cached CLIP weights with their published SHA-256")
    add("--traceback", action="store_true", help="where a check fails unforeseen, show the whole of it on stderr")
    add("--format", choices=("text", "json"), default="text", help="default: text")


def run(args: argparse.Namespace) -> int:
    from gram_meta.tools.doctor import Patient, as_text, can_run, examine

    checks = examine(Patient(args.root, args.meta, args.backbone, args.output_dir, args.verify, args.traceback))
    if args.format == "json":
        import json
        from dataclasses import asdict

        print(json.dumps({"can_run": can_run(checks), "checks": [asdict(it) for it in checks]}, indent=2))
    else:
        print(as_text(checks))
    return 0 if can_run(checks) else 1
