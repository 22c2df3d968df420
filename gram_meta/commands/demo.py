"""`gram demo`: the whole path on the emoji world."""

import argparse

HELP = """The whole path on the emoji world, from drawings to a table: image-text pairs, clustering, meta-training,
and few-shot training of CoOpGRAM beside ZeroshotCLIP and CoOp, on base and new classes.

Needs no data, no GPU and no model hub: only the extra `demo`. Every stage is one command, which is printed. Finished
stages are kept: a second run prints the table at once, and an interrupted one resumes. Remove the folder to start anew.

The plain version takes up to 15 minutes on 2 cores. --full takes an hour or two: all datasets, five seeds, accuracy
after 0, 1, 5, 20, ... steps, and controls: smaller steps instead of the regulator, other initialisations."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--full", action="store_true", help="all datasets, five seeds, controls and curves")
    add("--out", metavar="DIR", help="default: demo-output, or demo-output-full with --full")
    add("--seeds", type=int, nargs="+", metavar="N", help="default: 1 2 3, or 1 2 3 4 5 with --full")
    add("--datasets", nargs="+", metavar="NAME", help="animals, food, travel, ...")


def run(args: argparse.Namespace) -> int:
    from gram_meta.demo.run import default_settings, run_demo

    run_demo(default_settings(args.out, args.full, args.datasets, args.seeds))
    return 0
